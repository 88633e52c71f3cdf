"""Runs a list of experiments and writes one table of their results. Start it again to resume.

    python -m utils.benchmark.experiments LIST                      # trains and tests whatever is missing
    python -m utils.benchmark.experiments LIST --classes pole,sign  # adds columns with their test IoU
    python -m utils.benchmark.experiments LIST --table_only         # only writes the table

A line of the list is `<label>: <flags of main.py>`. The flags after `all:` come before those of every line.
`--random_seed 1,2,3` makes three runs, each in RUN_DIR/<label>_s<seed>. Paths are relative to the repository.
Empty lines and lines that begin with # are skipped.
"""

import argparse
import contextlib
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from datasets.loader import open_split
from datasets.transforms import eval_transform
from utils.checkpoint import out_of_patience
from utils.cli import Parser, friendly_errors
from utils.errors import InputError
from utils.files import write_csv, write_text
from utils.options import START_FLAGS, check_options, get_parser
from utils.pictures.report_data import read_csv
from utils.run import Run
from utils.weights.load import resolve_model

ROOT = Path(__file__).parent.parent.parent
RESERVED = {"--run_name", "--continue_training", "--test_only"}  # flags that this script sets itself
IGNORED = START_FLAGS - {"backbone_weights", "init_from"}  # flags that do not change the result of a whole run
SCORES, COSTS = ["best val mIoU", "test mIoU", "test mean boundary IoU"], ["train seconds", "peak memory MB"]
IOU = "test IoU "  # begins the column of a class


@dataclass
class Experiment:
    """One run of the list: the arguments of its training, as given and parsed."""

    label: str
    arguments: list[str]
    opts: argparse.Namespace
    exit_code: int = 0

    @property
    def folder(self) -> Path:
        return ROOT / self.opts.run_dir / self.opts.run_name

    @property
    def command(self) -> str:
        return shlex.join(["python", "main.py", *self.arguments])

    def trained(self) -> bool:
        """Whether the history reaches the last iteration, or where `--patience` has ended the run."""
        rows = Run(self.folder).history()
        best = max(rows, key=lambda row: row["mean_iou"], default={"itr": 0})
        since_best = sum(row["itr"] > max(best["itr"], self.opts.warmup_itrs) for row in rows)
        ended = out_of_patience(self.opts.patience, since_best)
        return ended or any(row["itr"] >= self.opts.total_itrs for row in rows)

    def run(self, split: str) -> int:
        """Trains and tests as far as that is missing; returns the exit code of what failed, otherwise 0."""
        if self.trained() and (not split or (self.folder / f"test_{split}" / "class_iou.csv").is_file()):
            return 0
        if split:
            # A wrong --test_split shows now, not after hours of training.
            try:
                with contextlib.chdir(ROOT):
                    open_split(self.opts, split, eval_transform(), checkpoint=None, lists=self.folder / "splits")
            except InputError as error:
                print(f"experiments.py: error: {error}; or give another --test_split, or none", file=sys.stderr)
                return 2
        # This exits at once if only the test is missing.
        code = run_main([*self.arguments, "--continue_training"])
        test = ["--test_only", "--ckpt", str(self.folder / "best.pth"), "--val_split", split]
        return run_main([*self.arguments, *test]) if split and not code else code

    def results(self, split: str) -> dict[str, float]:
        """Returns the results by column name; none before the training is complete."""
        if not self.trained():
            return {}
        rows, test = Run(self.folder).history(), self.folder / f"test_{split}"
        values = {
            "best val mIoU": max(row["mean_iou"] for row in rows),
            "train seconds": sum(row["train_seconds"] for row in rows),
            "peak memory MB": max(row["peak_memory_mb"] for row in rows),
        }
        if (test / "class_iou.csv").is_file():
            ious = {IOU + name: iou for name, iou, *_ in read_csv(test / "class_iou.csv")[1]}
            values |= ious | {"test mIoU": statistics.fmean(iou for iou in ious.values() if not math.isnan(iou))}
        if (test / "card.json").is_file():
            boundary = read_json(test / "card.json").get("mean_boundary_iou")
            values |= {} if boundary is None else {SCORES[2]: boundary}
        return values


def read_json(path: Path) -> dict:
    """Reads a file that main.py wrote. Raises InputError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: not valid JSON; restore it or remove it") from None


def run_main(arguments: list[str]) -> int:
    """Runs main.py and returns its exit code. If the user stops this script, main.py may save first."""
    process = subprocess.Popen([sys.executable, "main.py", *arguments], cwd=ROOT)
    try:
        code = process.wait()
    except SystemExit:  # SIGTERM, perhaps sent to this process alone
        process.terminate()
        code = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to both
        code = process.wait()
    # Below 0 it was ended by a signal; take the exit code that a shell shows.
    code = 128 - code if code < 0 else code
    if code in (130, 143):
        raise SystemExit(code)
    return code


def read_list(path: Path) -> list[Experiment]:
    """Reads the list. Raises InputError, naming the line, if it cannot be used."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); name a list of experiments (see --help)") from None
    shared, entries = [], {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        label, colon, flags = (part.strip() for part in line.partition(":"))
        name, where = re.sub(r"\W+", "_", label.lower()).strip("_"), f"{path}, line {number}"
        if not (colon and name) or label.startswith("-"):
            raise InputError(f"{where}: has no label; write <label>: <flags of main.py>")
        if name in entries:
            raise InputError(f"{where}: {label} has the run name of {entries[name][0]}; choose another label")
        try:
            given = shlex.split(flags)
        except ValueError as error:
            raise InputError(f"{where}: {error}; close the quotation") from None
        if reserved := RESERVED & {flag.partition("=")[0] for flag in given}:
            raise InputError(f"{where}: {min(reserved)} is set by this script; leave it out")
        if label == "all":
            shared += given
        else:
            entries[name] = where, label, given
    if not entries:
        raise InputError(f"{path}: has no experiment; write lines <label>: <flags of main.py>")
    experiments = []
    for name, (where, label, given) in entries.items():
        try:
            experiments += one_per_seed(label, name, [*shared, *given])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return experiments


def one_per_seed(label: str, name: str, flags: list[str]) -> list[Experiment]:
    """Returns the runs of a line. Raises InputError if main.py refuses the flags or an existing run had others."""
    parser, runs = Parser(add_help=False), []
    parser.add_argument("--random_seed", default="1")
    seeds, others = parser.parse_known_args(flags)
    for seed in dict.fromkeys(seeds.random_seed.split(",")):
        arguments = [*others, "--random_seed", seed, "--run_name", f"{name}_s{seed}"]
        runs.append(Experiment(label, arguments, get_parser().parse_args(arguments)))
        check_options(runs[-1].opts)
        require_same_flags(runs[-1])
    return runs


def require_same_flags(run: Experiment) -> None:
    """Raises InputError if the run exists and was trained with flags other than those in the list."""
    path, listed = run.folder / "options.json", vars(run.opts)
    stored = read_json(path) if path.is_file() else {}
    # With --ckpt the checkpoint decides on the model.
    if not run.opts.ckpt:
        resolve_model(run.opts, None)
    for name in sorted((stored.keys() & listed.keys()) - IGNORED):
        if listed[name] not in (None, stored[name]):
            raise InputError(
                f"{run.folder} was trained with --{name} {stored[name]}, the list has {listed[name]}; choose another "
                "label, or remove that folder"
            )


def summary(values: list[float], count: int, digits: int = 3) -> str:
    """Formats mean and sample standard deviation, with the number of values if that is not `count`."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "not measured"
    text = f"{statistics.fmean(values):.{digits}f}"
    text += f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return text if len(values) == count else f"{text} (n = {len(values)})"


def write_table(path: Path, experiments: list[Experiment], *, split: str, classes: list[str]) -> None:
    """Writes a row per label to `path` and a row per run to the .csv beside it.

    Raises InputError for an unknown class and for files that cannot be written.
    """
    results = [run.results(split) for run in experiments]
    ious = list(dict.fromkeys(name for values in results for name in values if name.startswith(IOU)))
    if unknown := [name for name in classes if ious and IOU + name not in ious]:
        known = ", ".join(name.removeprefix(IOU) for name in ious)
        raise InputError(f"--classes {unknown[0]}: is not a class; choose from {known}")

    columns = [*SCORES, *(IOU + name for name in classes)]
    rows = [["label", "seeds", *columns, "train minutes a run", "command"], ["---"] * (len(columns) + 4)]
    for label, pairs in groupby(zip(experiments, results, strict=True), key=lambda pair: pair[0].label):
        runs, found = zip(*pairs, strict=True)
        seeds = ", ".join(str(run.opts.random_seed) for run in runs)
        failed = [f"seed {run.opts.random_seed} failed (exit code {run.exit_code})" for run in runs if run.exit_code]
        cells = [summary([values[name] for values in found if name in values], len(runs)) for name in columns]
        minutes = summary([values["train seconds"] / 60 for values in found if values], len(runs), digits=1)
        command = f"`{runs[0].command}`" + (f", seeds {seeds}" if len(runs) > 1 else "")
        rows.append([label, "; ".join([str(len(runs)), *failed]), *cells, minutes, command])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    tested = f"Test: its `best.pth` by `--test_only --val_split {split}`." if split else "No test."
    note = f"Mean ± sample standard deviation over the seeds. Best val mIoU: the best validation of a run. {tested}"
    write_text(path, "\n".join([*lines, "", note, ""]))

    columns = [*SCORES, *ious, *COSTS]
    table = [
        [run.label, run.opts.random_seed, run.folder.name, *(values.get(name, "") for name in columns), run.command]
        for run, values in zip(experiments, results, strict=True)
    ]
    write_csv(path.with_suffix(".csv"), ["label", "seed", "run", *columns, "command"], table)


@friendly_errors
def main(argv: list[str] | None = None) -> None:
    """Runs the list and writes the table, before the first run and after each."""
    about = "Run a list of experiments and write one table of their results. Start it again to resume."
    parser = Parser(prog="python -m utils.benchmark.experiments", usage="%(prog)s FILE [flags]", description=about)
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="the list of experiments")
    add("--test_split", metavar="LIST", default="test", help="list to test best.pth on; none: no test")
    add("--classes", metavar="A,B", help="classes that get a column with their test IoU")
    add("--table", metavar="FILE.md", type=Path, help="(default: FILE with the suffix .md); a .csv goes beside it")
    add("--table_only", action="store_true", help="run nothing, only write the table")
    opts = parser.parse_args(argv)
    table = opts.table or opts.file.with_suffix(".md")
    if table.suffix != ".md" or opts.file.resolve() in (table.resolve(), table.with_suffix(".csv").resolve()):
        raise InputError(f"--table {table}: must end in .md and must not overwrite {opts.file}; choose another")
    experiments = read_list(opts.file)
    split = "" if opts.test_split == "none" else opts.test_split
    classes = opts.classes.split(",") if opts.classes else []

    write_table(table, experiments, split=split, classes=classes)
    for number, run in enumerate([] if opts.table_only else experiments, 1):
        print(f"[{number}/{len(experiments)}] {run.label}, seed {run.opts.random_seed}", flush=True)
        run.exit_code = run.run(split)
        write_table(table, experiments, split=split, classes=classes)
    print(f"Table: {table}")
    if failed := [f"{run.folder.name} (exit code {run.exit_code})" for run in experiments if run.exit_code]:
        sys.exit(f"experiments.py: error: failed: {', '.join(failed)}; fix what is reported above and start again")


if __name__ == "__main__":
    # As an exception, so that run_main ends main.py.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
