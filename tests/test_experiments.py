import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest

import main
from tests.conftest import ROOT, TINY
from utils.benchmark import experiments
from utils.errors import InputError
from utils.options import get_parser
from utils.run import HISTORY


@pytest.fixture
def make_list(tmp_path):
    """Writes a list of experiments whose runs are in tmp_path/runs."""

    def make(*lines, shared=""):
        path = tmp_path / "list.txt"
        path.write_text("\n".join(["# a comment", "", f"all: --run_dir {tmp_path / 'runs'} {shared}", *lines]) + "\n")
        return path

    return make


@pytest.fixture
def fake_run(tmp_path):
    """Writes what a finished run leaves, except weights: validations with these mIoUs and a test with these IoUs."""

    def make(name, *, mious, ious=None, itr=5000, boundary=None, **options):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        count = len(mious)
        rows = [[1, itr * n // count, 1, 0.1, 0, 0, 0, miou, 60, 5, 100 * n, 1] for n, miou in enumerate(mious, 1)]
        write_csv(folder / "history.csv", [HISTORY, *rows])
        if ious:
            (folder / "test_test").mkdir()
            write_csv(
                folder / "test_test" / "class_iou.csv",
                [["class", "iou", "f1"], *([*each, 0.9] for each in ious.items())],
            )
        if boundary:
            (folder / "test_test" / "card.json").write_text(json.dumps({"mean_boundary_iou": boundary}))
        if options:
            (folder / "options.json").write_text(json.dumps(options))
        return folder

    return make


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def table_of(path):
    """Reads the rows of the markdown table by label, as dicts."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        experiments.main(list(map(str, arguments)))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_list_becomes_runs_in_order_with_shared_flags_first(make_list):
    path = make_list("Focal, gamma 2: --lr 0.1 --random_seed 3,1", "ohem:", shared="--lr 0.2 --total_itrs 7")
    runs = experiments.read_list(path)
    assert [run.folder.name for run in runs] == ["focal_gamma_2_s3", "focal_gamma_2_s1", "ohem_s1"]
    parsed = [get_parser().parse_args(run.arguments) for run in runs]
    assert [(opts.lr, opts.random_seed, opts.total_itrs) for opts in parsed] == [
        (0.1, 3, 7),
        (0.1, 1, 7),
        (0.2, 1, 7),
    ]


class MainHere:
    """Replaces `subprocess.Popen`: runs main.py in this process, without a new Python that imports torch again."""

    def __init__(self, command, cwd):
        assert command[1] == "main.py" and cwd == ROOT
        self.arguments = command[2:]

    def wait(self):
        try:
            main.main(self.arguments)
        except SystemExit as stop:
            return stop.code
        return 0


def test_runs_go_once_go_on_where_they_stopped_and_end_in_a_table(make_list, folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(experiments, "subprocess", SimpleNamespace(Popen=MainHere))
    flags = f"--dataset folder --data_root {folder} --total_itrs 2 {' '.join(TINY)}"
    path = make_list("wrong: --ckpt no_such_file", "small: --random_seed 1,2", shared=flags)
    with pytest.raises(SystemExit) as stop:  # a text: Python prints it on stderr and exits with 1
        experiments.main([str(path), "--test_split", "val", "--classes", "car"])
    assert stop.value.code.startswith("experiments.py: error: failed: wrong_s1 (exit code 2);")
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("[")] == [
        "[1/3] wrong, seed 1",
        "[2/3] small, seed 1",
        "[3/3] small, seed 2",
    ]
    table = table_of(tmp_path / "list.md")
    assert table["wrong"]["seeds"] == "1; seed 1 failed (exit code 2)"
    assert table["wrong"]["test mIoU"] == "not measured"
    rows = rows_of(tmp_path / "list.csv")[1:]
    tests = [float(row["test mIoU"]) for row in rows]
    assert tests == pytest.approx([float(row["best val mIoU"]) for row in rows], abs=1e-6)  # of one list
    assert table["small"]["test mIoU"] == f"{statistics.mean(tests):.3f} ± {statistics.stdev(tests):.3f}"
    assert all(0 <= float(row["test IoU car"]) <= 1 for row in rows)

    command = re.search("`(.*)`, seeds 1, 2", table["small"]["command"])[1]
    assert get_parser().parse_args(shlex.split(command)[2:]).run_name == "small_s1"

    (tmp_path / "runs" / "small_s2" / "test_val" / "class_iou.csv").unlink()  # as if interrupted before its test
    path.write_text(path.read_text().replace("wrong: --ckpt no_such_file\n", ""))
    one, two = tmp_path / "runs" / "small_s1", tmp_path / "runs" / "small_s2"
    kept = [*(file for file in one.rglob("*") if file.is_file()), two / "log.txt", two / "best.pth"]
    before = [file.stat().st_mtime_ns for file in kept]
    experiments.main([str(path), "--test_split", "val"])
    out = capfd.readouterr().out
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert "Loss=" not in out and out.count("Scores saved in") == 1
    assert [float(row["test mIoU"]) for row in rows_of(tmp_path / "list.csv")] == tests


def test_the_table_has_mean_and_deviation_over_the_seeds(make_list, fake_run, tmp_path):
    fake_run("a_b_s1", mious=[0.5, 0.3], ious={"sky": 0.2, "car": 0.6, "void": math.nan}, boundary=0.25)
    fake_run("a_b_s2", mious=[0.6], ious={"sky": 0.4, "car": 1.0, "void": math.nan})
    fake_run("a_b_s3", mious=[0.9], itr=4999)  # not at its end
    path = make_list("a|b: --random_seed 1,2,3", "c:")
    experiments.main([str(path), "--table_only", "--classes", "car,void", "--table", str(tmp_path / "x.md")])
    table = table_of(tmp_path / "x.md")
    row = table["a\\|b"]
    assert row["seeds"] == "3"
    assert row["best val mIoU"] == "0.550 ± 0.071 (n = 2)"  # of 0.5 and 0.6: 0.1 / sqrt(2)
    assert row["test mIoU"] == "0.550 ± 0.212 (n = 2)"  # of 0.4 and 0.7
    assert row["test mean boundary IoU"] == "0.250 (n = 1)"
    assert row["test IoU car"] == "0.800 ± 0.283 (n = 2)"
    assert row["test IoU void"] == "not measured"
    assert row["train minutes a run"] == "1.5 ± 0.7 (n = 2)"
    assert row["command"].endswith("--run_name a_b_s1`, seeds 1, 2, 3")
    assert table["c"]["best val mIoU"] == table["c"]["train minutes a run"] == "not measured"
    first, _, third, _ = rows_of(tmp_path / "x.csv")
    assert (first["label"], first["seed"], first["run"]) == ("a|b", "1", "a_b_s1")
    assert (first["best val mIoU"], first["train seconds"], first["peak memory MB"]) == ("0.5", "120.0", "200.0")
    assert third["best val mIoU"] == third["test mIoU"] == ""


@pytest.fixture
def tested(folder):
    """The flags for a data set that also has the list test."""
    lists = folder / "ImageSets" / "Segmentation"
    shutil.copy(lists / "val.txt", lists / "test.txt")
    return f"--dataset folder --data_root {folder}"


@pytest.fixture
def commands(monkeypatch):
    """The command lines that would have run; each ends with the exit code that `codes` holds for it, or 0."""
    asked, codes = [], {}

    class Process:
        def __init__(self, command, **_):
            asked.append(get_parser().parse_args(command[2:]))

        def wait(self):
            return codes.get(len(asked), 0)

    monkeypatch.setattr(experiments.subprocess, "Popen", Process)
    return asked, codes


@pytest.mark.parametrize(("code", "exits"), [(130, 130), (143, 143), (-2, 130), (-15, 143)])
def test_an_interrupt_stops_the_list(make_list, commands, code, exits):
    commands[1][2] = code
    with pytest.raises(SystemExit) as stop:
        experiments.main([str(make_list("a:", "b:", "c:")), "--test_split", "none"])
    assert stop.value.code == exits and [opts.run_name for opts in commands[0]] == ["a_s1", "b_s1"]


@pytest.mark.parametrize("to_the_group", [True, False])
def test_a_run_may_save_before_the_list_ends(make_list, folder, tmp_path, to_the_group):
    shared = f"--dataset folder --data_root {folder} {' '.join(TINY)}"
    path = make_list("a: --total_itrs 100000 --val_interval 100000", shared=shared)
    process = subprocess.Popen(
        [sys.executable, "-m", "utils.benchmark.experiments", str(path), "--test_split", "val"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    next(line for line in process.stdout if "Itrs 2/" in line)
    (os.killpg if to_the_group else os.kill)(process.pid, signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(20) == 143 and "Add --continue_training to resume" in rest
    assert (tmp_path / "runs/a_s1/latest.pth").is_file()


@pytest.mark.parametrize(
    ("flags", "words"), [("--lr", "--lr"), ("--total_itrs 0", "--total_itrs"), ("--tta flip", "--tta")]
)
def test_flags_that_main_refuses_are_refused_before_any_run(make_list, commands, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        experiments.main([str(make_list("a:", f"b: {flags}"))])
    assert stop.value.code == 2 and commands[0] == []
    assert "line" in (error := capsys.readouterr().err) and words in error


def test_a_run_killed_for_memory_does_not_stop_the_list(make_list, tested, commands, tmp_path):
    commands[1][1] = -9
    with pytest.raises(SystemExit, match="failed: a_s1 .exit code 137.;"):
        experiments.main([str(make_list("a:", "b:", shared=tested))])
    asked = [(opts.run_name, opts.test_only, opts.val_split) for opts in commands[0]]
    assert asked == [("a_s1", False, "val"), ("b_s1", False, "val"), ("b_s1", True, "test")]
    assert commands[0][-1].ckpt == str(tmp_path / "runs" / "b_s1" / "best.pth")


def test_a_model_that_was_not_finished_is_tested_again(make_list, tested, fake_run, commands):
    fake_run("a_s1", mious=[0.5], ious={"sky": 0.2}, itr=10)
    experiments.main([str(make_list("a:", shared=tested))])
    assert [opts.test_only for opts in commands[0]] == [False, True]


@pytest.mark.parametrize(
    ("stored", "flags", "name"),
    [
        ({"lr": 0.01}, "--lr 0.1", "--lr 0.01"),
        ({"backbone_weights": "none"}, "", "--backbone_weights none"),
        ({"model": "deeplabv3_resnet50"}, "", "--model deeplabv3_resnet50"),
        ({"total_itrs": 5000}, "--total_itrs 6000", "--total_itrs 5000"),
    ],
)
def test_a_run_with_other_flags_is_not_taken_for_this_one(make_list, fake_run, capsys, stored, flags, name):
    fake_run("a_s1", mious=[0.5], **stored)
    line = refused(capsys, make_list(f"a: {flags}"), "--table_only")
    assert "line 4" in line and "a_s1 was trained with " + name in line


@pytest.mark.parametrize(
    ("flags", "commands_left"),
    [("", 2), ("--patience 2", 0), ("--patience 3", 2), ("--patience 2 --warmup_itrs 30", 2)],
)
def test_a_run_that_patience_has_ended_is_complete(make_list, tested, fake_run, commands, flags, commands_left):
    fake_run("a_s1", mious=[0.1, 0.5, 0.4, 0.5], ious={"sky": 0.2}, itr=40)
    experiments.main([str(make_list(f"a: {flags} --total_itrs 100", shared=tested))])
    assert len(commands[0]) == commands_left


def test_flags_that_change_no_result_may_differ(make_list, fake_run):
    fake_run("a_s1", mious=[0.5], lr=0.01, num_workers=7, run_dir="elsewhere", continue_training=True, since="then")
    assert len(experiments.read_list(make_list("a:"))) == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a: --lr 1", "A!: --lr 2"], ["line 5", "A! has the run name of", "line 4"]),
        (["--lr 1"], ["line 4", "no label"]),
        ([": --lr 1"], ["line 4", "no label"]),
        (["--data_root C:/x"], ["line 4", "no label"]),
        (["a: --random_seed 1,x"], ["line 4", "--random_seed", "'x'"]),
        (["a: --total_itrs many"], ["line 4", "--total_itrs", "many"]),
        (["a: --run_name=b"], ["line 4", "--run_name", "leave it out"]),
        (["a: --data_root 'x"], ["line 4", "quotation"]),
        ([], ["list.txt", "no experiment"]),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(make_list, lines, words):
    with pytest.raises(InputError) as error:
        experiments.read_list(make_list(*lines))
    assert all(word in str(error.value) for word in ["list.txt", *words]), error.value


def test_bad_flags_are_refused(make_list, fake_run, tmp_path, capsys):
    path = make_list("a:")
    assert "nowhere.txt" in refused(capsys, tmp_path / "nowhere.txt")
    assert "--table" in refused(capsys, path, "--table", tmp_path / "x.txt")
    assert "--table" in refused(capsys, path.rename(tmp_path / "list.md"))
    path = make_list("a:")
    assert "cannot be written" in refused(capsys, path, "--table", tmp_path / "no" / "x.md")
    fake_run("a_s1", mious=[0.5], ious={"sky": 0.2, "car": 0.6})
    assert "--classes dog: is not a class; choose from sky, car" in refused(capsys, path, "--classes", "sky,dog")


def test_a_file_of_a_run_that_is_not_whole_is_named(make_list, fake_run, capsys):
    run, path = fake_run("a_s1", mious=[0.5], ious={"sky": 0.2}), make_list("a:")
    for file in (run / "test_test" / "card.json", run / "options.json"):
        file.write_text("{")
        assert str(file) in refused(capsys, path, "--table_only")


def test_help_says_how_to_start_it():
    command = [sys.executable, "-m", "utils.benchmark.experiments", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (
        shown.stdout.startswith("usage: python -m utils.benchmark.experiments FILE")
        and "--test_split" in shown.stdout
    )


def test_a_list_to_test_on_that_is_not_there_is_found_before_the_training(make_list, folder, tmp_path, capfd):
    path = make_list("small:", shared=f"--dataset folder --data_root {folder} --total_itrs 1 {' '.join(TINY)}")
    with pytest.raises(SystemExit) as stop:
        experiments.main([str(path)])
    assert "small_s1 (exit code 2)" in stop.value.code
    assert "test.txt: there is no such split list" in (err := capfd.readouterr().err)
    assert "give another --test_split, or none" in err and not (tmp_path / "runs").exists()
