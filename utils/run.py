"""The folder of a run: what it was asked for, what it said, what it scored."""

import contextlib
import csv
import functools
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from tqdm import tqdm

from datasets.voc import SegmentationDataset
from utils.checkpoint import load_checkpoint
from utils.distributed import job_id, restarted
from utils.errors import InputError
from utils.files import naming, replacing, temporary_of
from utils.pictures.plotting import draw_curves, overlay

HISTORY = "epoch itr loss lr overall_acc mean_acc freqw_acc mean_iou train_seconds val_seconds peak_memory_mb".split()
CHECKPOINTS = ("latest.pth", "latest.prev.pth", "best.pth")
TABLES = (
    "options.json",
    "history.csv",
    "class_iou.csv",
    "confusion_matrix.csv",
    "curves.png",
    "card.json",
    "images.csv",
)
SCORE_COLUMNS = {
    "overall_acc": "Overall Acc",
    "mean_acc": "Mean Acc",
    "freqw_acc": "FreqW Acc",
    "mean_iou": "Mean IoU",
}


class Run:
    """`runs/<run_name>`. Nothing is written before `start`, so that bad input leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = False
        self.damaged: Path | None = None  # the latest.pth that training does not go on from, because it does not load
        self._early: list[str] = []  # what was logged before the start

    @property
    def is_of_this_job(self) -> bool:
        """Whether it was started by the torchrun that has now started this process anew."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            options = json.loads((self.folder / "options.json").read_text(encoding="utf-8"))
            return restarted() and options.get("job") == job_id()
        return False

    @property
    def exists(self) -> bool:
        """Whether training was started here; a test of a checkpoint from elsewhere leaves its own folder only."""
        names = ("options.json", "history.csv", *CHECKPOINTS)
        return any((self.folder / name).exists() for name in names)

    def start(self, options: dict, device: torch.device) -> None:
        """Makes the folder and writes `options.json`. Raises InputError where that cannot be done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (*CHECKPOINTS, *TABLES):  # a kill in the middle of a write left it
                temporary_of(self.folder / name).unlink(missing_ok=True)
            write_text(self.folder / "options.json", json.dumps(options | environment(device), indent=2) + "\n")
            self.started = True
            self._write_log([f"Command: {command()}", *self._early])
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}); give another --run_dir") from None

    def discard_unless_validated(self) -> None:
        """Removes what a start left that failed on its input before the first validation: its name is free again."""
        if not any((self.folder / name).exists() for name in ("history.csv", *CHECKPOINTS)):
            self.started = False
            for name in ("options.json", "log.txt", "splits"):
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else lies in it
                self.folder.rmdir()

    def log(self, message: str) -> None:
        """A line on the screen, above any progress bar, and in `log.txt`."""
        try:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the terminal is closed, or the program that reads has left: training goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self.started:
            self._write_log([message])
        else:
            self._early.append(message)

    def _write_log(self, lines: list[str]) -> None:
        path = self.folder / "log.txt"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises InputError, telling what is kept, for a file of the run that cannot be written inside."""
        try:
            yield
        except (OSError, InputError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # plotting makes an InputError of it
            if not isinstance(cause, OSError) or cause.filename is None:
                raise
            if not Path(str(cause.filename)).is_relative_to(self.folder):
                raise
            reason = cause.strerror or cause
            kept = self.kept() or "there is no checkpoint: the same command with --continue_training begins anew"
            raise InputError(f"{cause.filename}: cannot be written ({reason}); once it can be: {kept}") from None

    def kept(self) -> str:
        """What training can go on from, and how; empty if there is nothing."""
        for name in CHECKPOINTS:
            path = self.folder / name
            with contextlib.suppress(InputError):
                kept = f"{path} of iteration {load_checkpoint(path)['cur_itrs']} is kept"
                flags = f"--ckpt {path} --continue_training" if name == "best.pth" else "--continue_training"
                return f"{kept}, and the same command with {flags} goes on"
        return ""

    def history(self) -> list[dict[str, float]]:
        """The rows of `history.csv`, one per validation."""
        path = self.folder / "history.csv"
        if not path.is_file():
            return []
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return [{name: float(row[name]) for name in HISTORY} for row in csv.DictReader(file)]
        except (ValueError, TypeError, KeyError, csv.Error):
            raise InputError(f"{path}: is not a history that main.py wrote; restore it or remove it") from None

    def go_on_from(self, cur_itrs: int) -> None:
        """Drops the rows of the history past the checkpoint that training goes on from.

        A `latest.pth` that does not load is put aside, lest it take the place of the one before it.
        """
        if self.damaged and self.damaged.exists():
            self.damaged.replace(self.damaged.with_suffix(".damaged.pth"))
        rows = self.history()
        if any(row["itr"] > cur_itrs for row in rows):
            self._write_history([row for row in rows if row["itr"] <= cur_itrs])

    def add_history(self, scores: dict, **row: float) -> None:
        """One more row, and the curves drawn anew; the file is replaced whole, so it never holds half a row."""
        row |= {column: scores[name] for column, name in SCORE_COLUMNS.items()}
        rows = [*self.history(), row]
        self._write_history(rows)
        draw_curves({self.folder.name: rows}, self.folder / "curves.png")

    def keep_splits(self, splits: dict[str, SegmentationDataset]) -> None:
        """Writes down the division of a folder that has no split lists of its own, and says so."""
        for name, dataset in splits.items():
            path = self.folder / "splits" / f"{name}.txt"
            if dataset.made_split and not path.is_file():
                path.parent.mkdir(exist_ok=True)
                write_text(path, "\n".join(dataset.ids) + "\n")
                self.log(f"{dataset.folder} has no split lists: {len(dataset)} ids divided off as {name}, see {path}")

    def _write_history(self, rows: list[dict[str, float]]) -> None:
        table = [[f"{row[name]:.10g}" for name in HISTORY] for row in rows]
        write_csv(self.folder / "history.csv", HISTORY, table)

    def write_scores(self, scores: dict, matrix: torch.Tensor, class_names: list[str]) -> None:
        """`class_iou.csv` and `confusion_matrix.csv` (rows = target)."""
        ious = [[name, f"{iou:.6f}"] for name, iou in zip(class_names, scores["Class IoU"], strict=True)]
        write_csv(self.folder / "class_iou.csv", ["class", "iou"], ious)
        counts = [[name, *row] for name, row in zip(class_names, matrix.tolist(), strict=True)]
        write_csv(self.folder / "confusion_matrix.csv", ["target \\ prediction", *class_names], counts)


class SilentRun(Run):
    """A run to the processes of a job that neither write nor log: its first one does."""

    def start(self, options: dict, device: torch.device) -> None:
        pass

    def discard_unless_validated(self) -> None:
        pass

    def log(self, message: str) -> None:
        pass

    def history(self) -> list[dict[str, float]]:
        return []

    def go_on_from(self, cur_itrs: int) -> None:
        pass

    def add_history(self, scores: dict, **row: float) -> None:
        pass

    def keep_splits(self, splits: dict[str, SegmentationDataset]) -> None:
        pass

    def write_scores(self, scores: dict, matrix: torch.Tensor, class_names: list[str]) -> None:
        pass


class ResultWriter:
    """`--save_val_results`: for each picture `masks/<id>.png`, class ids in the data set's palette, and
    `overlays/<id>.jpg`, the same colours over the picture. An `on_batch` of `engine.evaluate`."""

    def __init__(self, folder: Path, dataset: SegmentationDataset) -> None:
        self.folder, self.ids, self.palette = folder, dataset.ids, dataset.palette

    def __call__(
        self, indices: list[int], images: torch.Tensor, masks: torch.Tensor, predictions: torch.Tensor
    ) -> None:
        for index, image, prediction in zip(indices, images.cpu(), predictions.cpu(), strict=True):
            mask = Image.fromarray(prediction.numpy())
            mask.putpalette(self.palette.tobytes())
            self._save(mask, f"masks/{self.ids[index]}.png")
            self._save(overlay(image, prediction, self.palette), f"overlays/{self.ids[index]}.jpg")

    def _save(self, picture: Image.Image, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            picture.save(temporary, format="JPEG" if path.suffix == ".jpg" else "PNG")


@functools.cache  # the commit is that of the start, whatever is committed while it trains
def environment(device: torch.device) -> dict:
    """What else decides a result: versions, the git commit, the device and the command."""
    here = Path(__file__).parent
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    except OSError:  # there is no git
        commit = None
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    versions |= {"torchvision": torchvision.__version__, "pillow": PIL.__version__}
    return {
        "versions": versions,
        "git_commit": commit,
        "device_name": device_name(device),
        "command": command(),
        "job": job_id(),
    }


def command() -> str:
    return shlex.join([Path(sys.executable).name, *sys.argv])


def device_name(device: torch.device) -> str:
    """The device in words, with the number of processes if there are several."""
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"{torch.get_num_threads()} threads"
    processes = f", {dist.get_world_size()} processes" if dist.is_initialized() else ""
    return f"{device} ({name}){processes}"


def write_text(path: Path, text: str) -> None:
    """Replaces a file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that tensors took on a CUDA device, or the process on the CPU, in MB; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
