"""Runs a list of experiments, goes on where it stopped, and writes one table of what came out.

    python -m utils.benchmark.experiments LIST                      # trains and tests what is missing
    python -m utils.benchmark.experiments LIST --classes pole,sign  # their test IoU in the table too
    python -m utils.benchmark.experiments LIST --table_only         # the table of what is there

A line of the list is `<label>: <flags of main.py>`; those after `all:` come before the flags of every line, and
`--random_seed 1,2,3` makes three runs, each RUN_DIR/<label>_s<seed>. Paths start at the repository's root. Empty
lines and lines that begin with # are skipped.
"""

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
from utils.cli import Parser, exit_codes
from utils.errors import InputError
from utils.options import ABOUT_THE_START, get_parser, require_fitting, settle_model
from utils.pictures.report_data import read_csv
from utils.run import Run, write_csv, write_text

ROOT = Path(__file__).parent.parent.parent
OURS = {"--run_name", "--continue_training", "--test_only"}  # flags that a list does not give
SCORES, COSTS = ["best val mIoU", "test mIoU", "test mean boundary IoU"], ["train seconds", "peak memory MB"]


@dataclass
class Experiment:
    """One run of the list, as `main.py` takes it (`arguments`), from RUN_DIR/NAME as given to its last iteration."""

    label: str
    seed: int
    arguments: list[str]
    given_folder: Path
    total_itrs: int
    exit_code: int = 0

    @property
    def folder(self) -> Path:
        return ROOT / self.given_folder

    def trained(self) -> bool:
        return any(row["itr"] >= self.total_itrs for row in Run(self.folder).history())

    def run(self, split: str) -> int:
        """Trains and tests as far as that was not done; returns the exit code of what failed, 0 if nothing did."""
        test = self.folder / f"test_{split}" / "class_iou.csv"
        if self.trained() and (test.is_file() or not split):
            return 0
        if split and (problem := self.problem_of(split)):
            print(f"experiments.py: error: {problem}", file=sys.stderr)
            return 2
        best = str(self.given_folder / "best.pth")
        code = run_main([*self.arguments, "--continue_training"])  # ends at once where only the test is missing
        if code or not split:
            return code
        return run_main([*self.arguments, "--test_only", "--ckpt", best, "--val_split", split])

    def problem_of(self, split: str) -> str:
        """What is wrong with the list to test on, before hours of training; empty if nothing is."""
        opts, lists = get_parser().parse_args(self.arguments), ROOT / self.given_folder / "splits"
        with contextlib.suppress(InputError):  # of the training, which tells it itself
            open_split(opts, opts.train_split, eval_transform(), lists)
            try:
                open_split(opts, split, eval_transform(), lists)
            except InputError as error:
                return f"{error}; --test_split names another list to test on, or none"
        return ""

    def results(self, split: str) -> dict[str, float]:
        """What was measured, by its column's name; nothing of a run that has not come to its end."""
        if not self.trained():
            return {}
        rows, test = Run(self.folder).history(), self.folder / f"test_{split}"
        values = {"best val mIoU": max(row["mean_iou"] for row in rows)}
        values |= {"train seconds": sum(row["train_seconds"] for row in rows)}
        values |= {"peak memory MB": max(row["peak_memory_mb"] for row in rows)}
        if (test / "class_iou.csv").is_file():
            ious = {f"test IoU {name}": iou for name, iou in read_csv(test / "class_iou.csv")[1]}
            values |= ious | {"test mIoU": statistics.fmean(iou for iou in ious.values() if not math.isnan(iou))}
        if (test / "card.json").is_file():
            boundary = read_json(test / "card.json").get("mean_boundary_iou")
            values |= {} if boundary is None else {"test mean boundary IoU": boundary}
        return values


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: is not as main.py wrote it; restore it or remove it") from None


def run_main(arguments: list[str]) -> int:
    """The exit code of `main.py`, which is let save where the user ends this script, and ends it then."""
    process = subprocess.Popen([sys.executable, "main.py", *arguments], cwd=ROOT)
    try:
        code = process.wait()
    except SystemExit:  # of a SIGTERM that may have come to this process alone
        process.terminate()
        code = process.wait()
    except KeyboardInterrupt:  # the terminal sends it to both
        code = process.wait()
    code = 128 - code if code < 0 else code  # of a signal, as a shell has it
    if code in (130, 143):
        raise SystemExit(code)
    return code


def integers(text: str) -> list[int]:
    return list(dict.fromkeys(map(int, text.split(","))))


def read_list(path: Path) -> list[Experiment]:
    """Raises InputError for a list that cannot be used, naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); name a list of experiments (see --help)") from None
    shared, entries = [], {}
    for number, line in enumerate(map(str.strip, lines), 1):
        label, colon, flags = (part.strip() for part in line.partition(":"))
        slug, where = re.sub(r"\W+", "_", label.lower()).strip("_"), f"{path}, line {number}"
        if not line or line.startswith("#"):
            continue
        if not (colon and slug) or label.startswith("-"):
            raise InputError(f"{where}: has no label; write <label>: <flags of main.py>")
        if slug in entries:
            raise InputError(f"{where}: {label} has the run name of {entries[slug][0]}; give it another label")
        try:
            given = shlex.split(flags)
        except ValueError as error:
            raise InputError(f"{where}: {error}; close the quotation") from None
        if ours := OURS & {flag.partition("=")[0] for flag in given}:
            raise InputError(f"{where}: {min(ours)} is set for each run by this script; leave it out")
        if label == "all":
            shared += given
        else:
            entries[slug] = (where, label, given)
    if not entries:
        raise InputError(f"{path}: has no experiment; write lines <label>: <flags of main.py>")
    return [run for slug, entry in entries.items() for run in expand(slug, shared, *entry)]


def expand(slug: str, shared: list[str], where: str, label: str, given: list[str]) -> list[Experiment]:
    """The runs of a line, one per seed. Raises InputError where such a run is there, but with other flags."""
    parser, runs = Parser(add_help=False), []
    parser.add_argument("--random_seed", type=integers, default=[1])
    parser.add_argument("--total_itrs", type=int, default=get_parser().get_default("total_itrs"))
    parser.add_argument("--run_dir", default="runs")
    try:
        opts, rest = parser.parse_known_args([*shared, *given])
        for seed in opts.random_seed:
            folder = Path(opts.run_dir) / f"{slug}_s{seed}"
            flags = f"--total_itrs {opts.total_itrs} --random_seed {seed}".split()
            flags = [*rest, *flags, "--run_dir", opts.run_dir, "--run_name", folder.name]
            runs.append(Experiment(label, seed, flags, folder, opts.total_itrs))
            require_usable(runs[-1])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return runs


def require_usable(run: Experiment) -> None:
    """Raises InputError for flags that main.py refuses, and for others than a run of this name was trained with."""
    opts = get_parser().parse_args(run.arguments)
    require_fitting(opts)
    if not (run.folder / "options.json").is_file():
        return
    stored = read_json(run.folder / "options.json")
    if not opts.ckpt:  # which would decide on the model
        settle_model(opts, None)
    for name in sorted((stored.keys() & vars(opts).keys()) - (ABOUT_THE_START - {"backbone_weights"})):
        if getattr(opts, name) not in (None, stored[name]):
            raise InputError(
                f"{run.folder} was trained with --{name} {stored[name]}, the list has {getattr(opts, name)}; "
                "give the line another label, or remove that folder"
            )


def summary(values: list[float], count: int, digits: int = 3) -> str:
    """Mean and sample standard deviation; says of how many runs where that is not `count`."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "not measured"
    text = f"{statistics.fmean(values):.{digits}f}"
    text += f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return text if len(values) == count else f"{text} (n = {len(values)})"


def write_table(path: Path, experiments: list[Experiment], *, split: str, classes: list[str]) -> None:
    """`path`, a row per label, and the .csv beside it, a row per run. Raises InputError for an unknown class."""
    results = [run.results(split) for run in experiments]
    names = list(dict.fromkeys(name for values in results for name in values))
    ious = [name for name in names if name.startswith("test IoU ")]
    wanted = [f"test IoU {name}" for name in classes]
    if ious and (unknown := [name for name in wanted if name not in ious]):
        known = ", ".join(name.removeprefix("test IoU ") for name in ious)
        raise InputError(f"--classes {unknown[0].removeprefix('test IoU ')}: is not a class; there are {known}")

    scores = [name for name in SCORES if name in names or name != SCORES[2]]
    rows = [["label", "seeds", *scores, *wanted, "train minutes a run", "command"]]
    for label, pairs in groupby(zip(experiments, results, strict=True), key=lambda pair: pair[0].label):
        runs, found = zip(*pairs, strict=True)
        failed = [f"seed {run.seed} failed (exit code {run.exit_code})" for run in runs if run.exit_code]
        cells = [summary([v[name] for v in found if name in v], len(runs)) for name in [*scores, *wanted]]
        minutes = summary([v["train seconds"] / 60 for v in found if v], len(runs), digits=1)
        seeds = ", ".join(str(run.seed) for run in runs)
        rows.append([label, "; ".join([str(len(runs)), *failed]), *cells, minutes])
        rows[-1].append(f"`{command(runs[0])}`" + (f", seeds {seeds}" if len(runs) > 1 else ""))
    rows.insert(1, ["---"] * len(rows[0]))
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    note = "Mean ± sample standard deviation over the seeds. Best val mIoU: of all validations of a run."
    note += f" Test: its `best.pth` by `--test_only --val_split {split}`.\n" if split else " No test was asked for.\n"

    columns = [*scores, *ious, *COSTS]
    table = [
        [run.label, run.seed, run.folder.name, *(values.get(name, "") for name in columns), command(run)]
        for run, values in zip(experiments, results, strict=True)
    ]
    try:
        write_text(path, "\n".join([*lines, "", note]))
        write_csv(path.with_suffix(".csv"), ["label", "seed", "run", *columns, "command"], table)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another --table") from None


def command(run: Experiment) -> str:
    return shlex.join(["python", "main.py", *run.arguments])


@exit_codes
def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    about = "Runs a list of experiments, goes on where it stopped, and writes one table of what came out."
    parser = Parser(prog="python -m utils.benchmark.experiments", usage="%(prog)s FILE [flags]", description=about)
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="the list of experiments")
    add("--test_split", metavar="LIST", default="test", help="the list to test best.pth on; none: no test")
    add("--classes", metavar="A,B", help="classes whose test IoU gets a column")
    add("--table", metavar="FILE.md", type=Path, help="(default: FILE with the suffix .md); a .csv beside it")
    add("--table_only", action="store_true", help="run nothing: the table of what is there")
    opts = parser.parse_args(argv)
    table = opts.table or opts.file.with_suffix(".md")
    if table.suffix != ".md" or opts.file.resolve() in (table.resolve(), table.with_suffix(".csv").resolve()):
        raise InputError(
            f"--table {table}: must end in .md, and neither it nor its .csv be {opts.file}; give another"
        )
    experiments = read_list(opts.file)
    split = "" if opts.test_split == "none" else opts.test_split
    classes = opts.classes.split(",") if opts.classes else []

    write_table(table, experiments, split=split, classes=classes)
    for number, run in enumerate([] if opts.table_only else experiments, 1):
        print(f"[{number}/{len(experiments)}] {run.label}, seed {run.seed}", flush=True)
        run.exit_code = run.run(split)
        write_table(table, experiments, split=split, classes=classes)
    print(f"Table: {table}")
    if failed := [f"{run.folder.name} (exit code {run.exit_code})" for run in experiments if run.exit_code]:
        sys.exit(f"experiments.py: error: failed: {', '.join(failed)}; see above, mend that and start it again")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, so that the run ends too
    main()
