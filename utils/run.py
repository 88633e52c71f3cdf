"""Manages the folder of a run: finds it and what it starts from, and writes its files."""

import argparse
import contextlib
import csv
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Self

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from datasets.voc import SegmentationDataset
from utils.checkpoint import TrainingState, load_newest, out_of_patience, previous_of, validated_itr
from utils.distributed import is_lost_process, job_id, restarted
from utils.engine import parse_tta
from utils.environment import command, environment, model_cost, peak_memory_mb
from utils.errors import InputError
from utils.files import cannot_write, make_folder, temporary_of, write_csv, write_text
from utils.metrics import CLASS_SCORES, SCORE_COLUMNS, format_class_table, format_scores
from utils.options import option_differences
from utils.weights.load import MODEL_DEFAULTS, load_checkpoint, options_of_init, resolve_model

HISTORY = "epoch itr loss lr overall_acc mean_acc freqw_acc mean_iou train_seconds val_seconds peak_memory_mb".split()
LATER = ("val_loss",)  # columns that the histories of older versions lack
HISTORY.extend(LATER)
CHECKPOINTS = ("latest.pth", "latest.prev.pth", "best.pth")
TABLES = ["options.json", "history.csv", "class_iou.csv", "confusion_matrix.csv", "curves.png"]
TABLES += ["card.json", "images.csv", "counts.npz"]
LOCK_SECONDS = 10  # the data workers of a killed training hold its lock for a few seconds
log = logging.getLogger("deeplab")


class RunLog(logging.Handler):
    """Prints log lines above any progress bar and, once `path` is set, appends them to that file."""

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self._early: list[str] = []  # lines before the folder exists

    def emit(self, record: logging.LogRecord) -> None:
        line = ("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the terminal or the reading program is gone: training continues
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
        self._early.append(line)
        if self.path is not None:
            lines, self._early = self._early, []
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
            except OSError as error:
                raise cannot_write(self.path, error) from None


class Run:
    """The folder `runs/<run_name>`. Nothing is written before `start`, and only the main process writes.

    As a context manager it releases the lock and the log and, after an error, prints which checkpoint is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: Path | None = None  # a latest.pth that does not load
        self.kept: tuple[Path, int] | None = None  # what a resumed run starts from, and its iteration
        self._log: RunLog | None = None
        self._lock: FileLock | None = None
        self._made: list[Path] = []  # folders that the lock needed, the innermost first

    def __reduce__(self) -> tuple:
        return Run, (self.folder,)  # lock and log stay with the main process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._lock and self._log.path and isinstance(error, Exception) and not is_lost_process(error):
            print(self.closing_line(), flush=True)
        self.close()

    @property
    def exists(self) -> bool:
        """Whether a training has left a result here: a history or a checkpoint."""
        return any((self.folder / name).exists() for name in ("history.csv", *CHECKPOINTS))

    def open_log(self) -> None:
        """Prints what is logged from now on; `start` adds log.txt."""
        self._log = RunLog()
        log.addHandler(self._log)
        log.setLevel(logging.INFO)
        log.propagate = False

    def lock(self) -> None:
        """Keeps a second training out of the folder until `close`. A kill releases the lock too.

        Raises InputError if another training has it.
        """
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        make_folder(self.folder)
        path = self.folder / ".lock"
        try:
            self._lock = FileLock(path, timeout=LOCK_SECONDS, fallback_to_soft=False)
        except TypeError:  # older versions have no fallback that would leave a marker file behind after a kill
            self._lock = FileLock(path, timeout=LOCK_SECONDS)
        try:
            self._lock.acquire()
        except Timeout:
            self._lock = None
            raise InputError(
                f"{self.folder}: this run is training in another process; wait for it, or give another --run_name"
            ) from None
        except (OSError, NotImplementedError) as error:
            log.warning(f"{self.folder}: no lock ({error}); do not start this run twice at the same time")

    def close(self) -> None:
        """Releases log and lock, and removes the folders that the lock has made if nothing else was written."""
        if self._log is not None:
            log.removeHandler(self._log)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.folder / ".lock").unlink()
            self._lock.release()
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty: the run has begun
                folder.rmdir()
        self._log = self._lock = None

    def start(
        self,
        opts: argparse.Namespace,
        device: torch.device,
        datasets: list[SegmentationDataset],
        *,
        resumed_at: int = 0,
    ) -> None:
        """Writes options.json, begins log.txt and records how a data folder without lists was divided.

        resumed_at: the iteration of the last validation before the checkpoint; later rows of the history are dropped.
        A damaged latest.pth is renamed. Raises InputError if the folder cannot be written.
        """
        make_folder(self.folder)
        try:
            for name in (*CHECKPOINTS, *TABLES):
                # A kill during a write may have left it.
                temporary_of(self.folder / name).unlink(missing_ok=True)
            if self.damaged and self.damaged.exists():
                self.damaged.replace(self.damaged.with_suffix(".damaged.pth"))
            # A start that failed may have left its splits.
            if not resumed_at and (self.folder / "splits").is_dir():
                shutil.rmtree(self.folder / "splits")
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        rows = self.history()
        if any(row["itr"] > resumed_at for row in rows):
            self._write_history([row for row in rows if row["itr"] <= resumed_at])
        stride = opts.eval_output_stride or opts.output_stride
        cost = model_cost(
            opts.model,
            num_classes=datasets[0].num_classes,
            output_stride=stride,
            separable_conv=opts.separable_conv,
        )
        about = json.dumps(vars(opts) | environment(device) | cost, indent=2)
        write_text(self.folder / "options.json", about + "\n")
        self._log.path = self.folder / "log.txt"
        log.info(f"Command: {command()}")
        size = f"{cost['parameters'] / 1e6:.1f} M parameters, {cost['gflops']:.1f} GFLOPs at 513 x 513"
        log.info(f"Model: {opts.model}, {size}")
        for dataset in datasets:
            path = self.folder / "splits" / f"{dataset.split}.txt"
            if dataset.made_split and not path.is_file():
                make_folder(path.parent)
                write_text(path, "\n".join(dataset.ids) + "\n")
                log.info(
                    f"{dataset.folder} has no split lists: {len(dataset)} ids drawn for {dataset.split}, see {path}"
                )

    def history(self) -> list[dict[str, float]]:
        """Returns the rows of `history.csv`, one per validation."""
        path = self.folder / "history.csv"
        if not path.is_file():
            return []
        try:
            with path.open(newline="", encoding="utf-8") as file:
                absent = dict.fromkeys(LATER, "nan")
                return [{name: float((absent | row)[name]) for name in HISTORY} for row in csv.DictReader(file)]
        except (ValueError, TypeError, KeyError, csv.Error):
            raise InputError(f"{path}: not a history that main.py wrote; restore it or remove it") from None

    def add_validation(
        self, state: TrainingState, matrix: torch.Tensor, class_names: list[str], *, trained: float
    ) -> list[dict[str, float]]:
        """Logs a validation, writes its tables and adds a row to history.csv; returns all rows.

        trained: when training since the previous row ended, by `time.perf_counter`.
        """
        self.write_scores(state.scores, matrix, class_names)
        log.info(f"validation cross-entropy: {state.val_loss:.6f}")
        row = {"epoch": state.epoch, "itr": state.itr, "loss": state.loss, "lr": state.lr}
        row |= {column: state.scores[name] for column, name in SCORE_COLUMNS.items()}
        row |= {"train_seconds": trained - state.clock, "val_seconds": time.perf_counter() - trained}
        row |= {"peak_memory_mb": peak_memory_mb(state.model.device), "val_loss": state.val_loss}
        rows = [*self.history(), row]
        self._write_history(rows)
        if state.best_itr == state.itr:
            log.info(f"new best mIoU: {state.best_score:.6f}")
        return rows

    def _write_history(self, rows: list[dict[str, float]]) -> None:
        table = [[f"{row[name]:.10g}" for name in HISTORY] for row in rows]
        write_csv(self.folder / "history.csv", HISTORY, table)

    def write_scores(
        self, scores: dict, matrix: torch.Tensor, class_names: list[str], *, boundary_iou: list[float] | None = None
    ) -> None:
        """Logs the scores and writes `class_iou.csv` and `confusion_matrix.csv` (rows = target)."""
        log.info("\n".join([*format_scores(scores), *format_class_table(scores, class_names, boundary_iou)]))
        values = zip(*(scores[name] for name in CLASS_SCORES.values()), strict=True)
        rows = [[name, *(f"{value:.6f}" for value in row)] for name, row in zip(class_names, values, strict=True)]
        write_csv(self.folder / "class_iou.csv", ["class", *CLASS_SCORES], rows)
        counts = [[name, *row] for name, row in zip(class_names, matrix.tolist(), strict=True)]
        write_csv(self.folder / "confusion_matrix.csv", ["target \\ prediction", *class_names], counts)

    def save(
        self, name: str, state: TrainingState, *, opts: argparse.Namespace, dataset: SegmentationDataset
    ) -> None:
        """Saves a checkpoint; the latest.pth before it stays as latest.prev.pth."""
        path = self.folder / name
        state.save(path, opts=opts, dataset=dataset, keep_previous=name == "latest.pth")
        if name == "latest.pth" or self.kept is None:  # which is what a resumed run starts from
            self.kept = path, state.itr
        log.info(f"Model saved as {path}")

    def closing_line(self) -> str:
        """Says which checkpoint is kept and how to resume from it."""
        if self.kept and self.kept[0].exists():
            return f"Kept: {self.kept[0]} of iteration {self.kept[1]}. Add --continue_training to resume."
        return "No checkpoint was saved. Add --continue_training to start from the beginning under the same name."


def open_run(opts: argparse.Namespace) -> tuple[Run, dict | None]:
    """Finds the folder of a run and the checkpoint that it starts from (None: from scratch).

    | flags               | the run            | starts from                                                  |
    | (none)              | new                | --ckpt's weights if given, otherwise from scratch            |
    | (none)              | exists             | refused: --continue_training or another --run_name is needed |
    | --continue_training | has a checkpoint   | latest.pth, latest.prev.pth if that is damaged, or best.pth  |
    | --continue_training | has none           | --ckpt with its training state if given, otherwise scratch   |
    | --test_only         | may exist          | --ckpt, or the run's best.pth; writes to test_<split>        |

    A restart by torchrun counts as --continue_training if the run has a checkpoint of its own, otherwise as a first
    start. Fills in `opts.run_name` and `opts.ckpt`; a restart sets `opts.continue_training`, and a test takes
    `opts.random_seed` from its checkpoint, because the seed divides folders without lists. The run holds its lock and
    its log: close it. Raises InputError, and writes nothing, if the run cannot start like this.
    """
    checkpoint = load_checkpoint(opts.ckpt, model=opts.model) if opts.ckpt else None
    opts.run_name = opts.run_name or default_run_name(opts, checkpoint)
    run = Run(Path(opts.run_dir) / opts.run_name)
    run.open_log()
    try:
        if opts.test_only:
            checkpoint = _open_test(opts, run, checkpoint)
        else:
            run.lock()
            checkpoint = _open_training(opts, run, checkpoint)
        resolve_model(opts, checkpoint)
        if checkpoint and (lines := option_differences(opts, checkpoint)):
            log.info("\n  ".join([f"Options that differ from those of {opts.ckpt}:", *lines]))
        return run, checkpoint
    except BaseException:
        run.close()
        raise


def _open_training(opts: argparse.Namespace, run: Run, checkpoint: dict | None) -> dict | None:
    own = run.folder / "latest.pth"
    if not (own.exists() or previous_of(own).exists()):
        own = run.folder / "best.pth"  # a kill came before the first latest.pth
    has_checkpoint = own.exists() or previous_of(own).exists()
    if restarted() and _job_of(run) == job_id():
        opts.continue_training |= has_checkpoint
    elif run.exists and not opts.continue_training:
        raise InputError(f"{run.folder}: this run exists; add --continue_training, or give another --run_name")
    if opts.continue_training and has_checkpoint:
        newest, loaded, damage = load_newest(own)
        if damage:
            log.warning(f"{str(damage).removeprefix('--ckpt ')}; resuming from {newest}")
            run.damaged = own
        elif checkpoint and Path(opts.ckpt) != own:
            log.info(f"{own} exists: resuming from it, not from {opts.ckpt}")
        opts.ckpt, checkpoint, run.kept = str(newest), loaded, (newest, loaded["cur_itrs"])
    elif opts.continue_training and checkpoint:
        # The best model of another run is not in this one.
        checkpoint |= {"best_score": -1.0, "best_itr": 0, "since_best": 0}
    elif opts.continue_training:
        known = sorted(path.parent.name for path in run.folder.parent.glob("*/latest.pth"))
        others = f" (existing runs: {', '.join(known[:10])})" if known else ""
        log.info(f"{run.folder / 'latest.pth'} does not exist: starting from the beginning{others}")
    if opts.continue_training and checkpoint and (source := checkpoint.get("published")):
        raise InputError(
            f"--ckpt {opts.ckpt}: has only weights ({source}), no training state to resume; leave out "
            "--continue_training to start from these weights"
        )
    return checkpoint


def _open_test(opts: argparse.Namespace, run: Run, checkpoint: dict | None) -> dict:
    if checkpoint is None:
        opts.ckpt = str(run.folder / "best.pth")
        checkpoint = load_checkpoint(opts.ckpt)
    opts.random_seed = checkpoint["options"].get("random_seed", opts.random_seed)
    beside = Path(opts.ckpt).parent  # the checkpoint's own run, if it still lies in one
    folder = beside if (beside / "options.json").is_file() else run.folder
    run.folder = folder / folder_of_test(opts, checkpoint["options"])
    return checkpoint


def _job_of(run: Run) -> str | None:
    """Returns the torchrun job that started a run; None if it was another kind of start."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((run.folder / "options.json").read_text(encoding="utf-8")).get("job")
    return None


def finished_scores(opts: argparse.Namespace, checkpoint: dict | None) -> dict | None:
    """Returns the scores of a run that `--continue_training` finds finished, and logs them; None for any other."""
    if not opts.continue_training or checkpoint is None:
        return None
    itr, since_best = checkpoint["cur_itrs"], checkpoint.get("since_best", 0)
    ended = out_of_patience(opts.patience, since_best)
    if itr > validated_itr(checkpoint) or not (itr >= opts.total_itrs or ended):
        return None
    scores = checkpoint["scores"]
    reason = f"--total_itrs is {opts.total_itrs}"
    if ended:
        reason = f"{since_best} validations brought no better mIoU, --patience is {opts.patience}"
    log.info(f"finished: {itr} iterations are done, {reason}")
    log.info("\n".join([*format_scores(scores), *format_class_table(scores, checkpoint["class_names"])]))
    log.info(f"last score and itr: {scores['Mean IoU']:.6f} {itr}")
    log.info(f"best score and itr: {checkpoint['best_score']:.6f} {checkpoint['best_itr']}")
    return scores


def default_run_name(opts: argparse.Namespace, checkpoint: dict | None) -> str:
    """Returns `<model>_<dataset>_os<stride>_<loss>`, with the class weights if there are any."""
    known = MODEL_DEFAULTS | (checkpoint["options"] if checkpoint else options_of_init(opts))
    model, stride = opts.model or known["model"], opts.output_stride or known["output_stride"]
    weights = "" if opts.class_weights == "none" else f"_{opts.class_weights}"
    return f"{model}_{opts.dataset}_os{stride}_{opts.loss_type}{weights}"


def folder_of_test(opts: argparse.Namespace, trained: dict) -> str:
    """Returns `test_<split>` with a suffix for each deviation, so that no evaluation overwrites another.

    A deviation is a flag of the test, or other data than in the options `trained`.
    """
    now, then = ((known.get("dataset"), known.get("data_root")) for known in (vars(opts), trained))
    data = "" if None in then or now == then else f"_{opts.dataset}_{Path(opts.data_root).resolve().name}"
    stride = f"_os{opts.eval_output_stride}" if opts.eval_output_stride else ""
    tta = ""
    if opts.tta:
        flip, scales = parse_tta(opts.tta)
        tta = "_tta" + "_flip" * flip + "".join(f"_{scale:g}" for scale in sorted(scales))
    return f"test_{opts.val_split}{data}{stride}{tta}" + (f"_crop{opts.crop_size}" if opts.crop_val else "")
