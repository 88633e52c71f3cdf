import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import main
from datasets.transforms import TrainTransform
from tests.conftest import ROOT, TINY, before, write_voc_layout
from utils import signals
from utils.signals import StopSignals
from utils.weights.load import load_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of four training and three validation images."""
    splits = {"train": ["a1", "a2", "a3", "a4"], "val": ["b1", "b2", "b3"]}
    return write_voc_layout(tmp_path_factory.mktemp("own"), splits, class_names=["sky", "road", "tree", "car"])


def train(data, run, *arguments):
    flags = ["--dataset", "folder", "--data_root", data, "--run_dir", run.parent, "--run_name", run.name]
    return main.main([*map(str, flags), *TINY, *map(str, arguments)])


@pytest.fixture
def start(data, tmp_path, capsys):
    def run(name, *arguments):
        return train(data, tmp_path / name, *arguments), capsys.readouterr().out

    return run


def seven_iterations(policy):
    return ["--total_itrs", 7, "--val_interval", 3, "--lr_policy", policy, "--step_size", 2]


@pytest.fixture(scope="module")
def wholes(data, tmp_path_factory):
    """By policy, the folder and the scores of a run of seven iterations that was never stopped, without workers."""
    torch.set_num_threads(1)
    runs = {policy: tmp_path_factory.mktemp("whole") / policy for policy in ("step", "poly")}
    return {policy: (run, train(data, run, *seven_iterations(policy))) for policy, run in runs.items()}


def history(path):
    with (path / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in rows]


class Killed(Exception):
    """In the place of a kill that the process itself survives."""


def killed(*_):
    raise Killed


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return first == second or (first != first and second != second)


@pytest.mark.parametrize("policy", ["step", "poly"])
@pytest.mark.parametrize("workers", [0, 1])
def test_run_that_stopped_at_a_validation_goes_on_bit_for_bit(
    start, wholes, tmp_path, monkeypatch, capsys, policy, workers
):
    (whole, scores), flags = wholes[policy], [*seven_iterations(policy), "--num_workers", workers]
    with monkeypatch.context() as patch:
        before(patch, "forward_backward", 5, killed)  # past the validation at 3
        with pytest.raises(Killed):
            start("halves", *flags)
    capsys.readouterr()
    again, out = start("halves", *flags, "--continue_training")
    assert f"Training state restored from {tmp_path / 'halves/latest.pth'}" in out
    assert "Itrs 4/7" in out and "Itrs 3/7" not in out
    assert same(again, scores)
    assert_same_run(tmp_path / "halves", whole)


def assert_same_run(first, second):
    assert history(first) == history(second)
    one, two = load_checkpoint(first / "latest.pth"), load_checkpoint(second / "latest.pth")
    for key in one.keys() - {"options", "about"}:  # they hold the name of the run, and when it was saved
        assert same(one[key], two[key]), key
    one, two = load_checkpoint(first / "best.pth"), load_checkpoint(second / "best.pth")
    assert same(one["model_state"], two["model_state"]) and one["cur_itrs"] == two["cur_itrs"]


def signal_at(monkeypatch, name, call, number):
    """Sends the process a signal at that call of a function of a training."""
    before(monkeypatch, name, call, lambda *_: os.kill(os.getpid(), number))


@pytest.mark.parametrize(
    ("name", "call", "number", "policy", "workers"),
    [
        ("forward_backward", 1, signal.SIGTERM, "step", 0),
        ("forward_backward", 2, signal.SIGINT, "poly", 1),
        ("forward_backward", 5, signal.SIGHUP, "poly", 0),
        ("forward_backward", 6, signal.SIGTERM, "step", 1),  # a validation follows
        ("evaluate", 1, signal.SIGTERM, "step", 0),
        ("evaluate", 2, signal.SIGINT, "poly", 1),
        ("evaluate", 3, signal.SIGTERM, "poly", 0),  # the last one
    ],
)
def test_a_signal_anywhere_saves_and_the_run_goes_on_bit_for_bit(
    start, wholes, tmp_path, monkeypatch, capsys, name, call, number, policy, workers
):
    (whole, scores), flags = wholes[policy], [*seven_iterations(policy), "--num_workers", workers]
    with monkeypatch.context() as patch:
        signal_at(patch, name, call, number)
        with pytest.raises(SystemExit) as stop:
            start("halves", *flags)
    assert stop.value.code == 128 + number
    out = capsys.readouterr().out
    assert f"{signal.Signals(number).name}: saving" in out and "Add --continue_training to resume." in out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again, out = start("halves", *flags, "--continue_training")
    assert same(again, scores)
    assert_same_run(tmp_path / "halves", whole)


def test_a_signal_before_the_first_iteration_saves_iteration_0(start, tmp_path, monkeypatch, capsys):
    signal_at(monkeypatch, "torch.utils.data.DataLoader.__iter__", 1, signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        start("a", "--total_itrs", 2)
    assert stop.value.code == 143 and "interrupted at iteration 0." in capsys.readouterr().out
    assert torch.load(tmp_path / "a/latest.pth", weights_only=True)["cur_itrs"] == 0


def test_an_interrupted_run_that_is_to_end_there_is_validated(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, "forward_backward", 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            start("a", "--total_itrs", 9, "--val_interval", 9)
    scores, out = start("a", "--total_itrs", 2, "--val_interval", 9, "--continue_training")
    assert f"Mean IoU: {scores['Mean IoU']:.6f}" in out and [row["itr"] for row in history(tmp_path / "a")] == ["2"]


def test_a_resume_in_the_middle_of_an_epoch_decodes_no_picture_again(start, monkeypatch, capsys):
    flags = ["--total_itrs", 4, "--val_interval", 4]  # two iterations an epoch
    with monkeypatch.context() as patch:
        signal_at(patch, "forward_backward", 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            start("a", *flags)
    read, transform = [], TrainTransform.__call__

    def spy(self, image, mask, *, epoch, index):
        read.append((epoch, index))
        return transform(self, image, mask, epoch=epoch, index=index)

    monkeypatch.setattr(TrainTransform, "__call__", spy)
    start("a", *flags, "--continue_training")
    assert len(read) == 2 and {epoch for epoch, _ in read} == {1}  # the last of the four batches


def test_a_second_signal_ends_at_once(folder, tmp_path):
    script = f"""
import os, signal, time
import main
def slow(*_, **__):
    print("training", flush=True)
    time.sleep(60)
main.forward_backward = slow
main.main({["--dataset", "folder", "--data_root", str(folder), "--run_dir", str(tmp_path), *TINY]!r})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line == "training\n":
            break
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the same once more, as launchers do
    time.sleep(1.2)
    assert process.poll() is None  # the iteration is being finished
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
    process.stdout.close()


def test_a_worse_model_after_a_resume_does_not_replace_the_best(start, tmp_path):
    start("a", "--total_itrs", 4)
    best = torch.load(tmp_path / "a/best.pth", weights_only=True)
    best["best_score"] = 2.0  # no mIoU reaches it
    latest = torch.load(tmp_path / "a/latest.pth", weights_only=True) | {"best_score": 2.0}
    torch.save(best, tmp_path / "a/best.pth")
    torch.save(latest, tmp_path / "a/latest.pth")
    before = (tmp_path / "a/best.pth").read_bytes()
    _, out = start("a", "--total_itrs", 6, "--continue_training")
    assert "Itrs 6/6" in out and "new best" not in out
    assert (tmp_path / "a/best.pth").read_bytes() == before
    assert torch.load(tmp_path / "a/latest.pth", weights_only=True)["best_score"] == 2.0


def test_a_kill_between_the_two_saves_does_not_lose_the_best(start, tmp_path, monkeypatch):
    before(monkeypatch, "torch.save", 2, killed)
    with pytest.raises(Killed):
        start("a", "--total_itrs", 2)
    assert [path.name for path in (tmp_path / "a").glob("*.pth")] == ["best.pth"]
    assert load_checkpoint(tmp_path / "a/best.pth")["cur_itrs"] == 2
    monkeypatch.undo()
    _, out = start("a", "--total_itrs", 4, "--continue_training")
    assert (
        "Itrs 3/4" in out and "Itrs 2/4" not in out and [row["itr"] for row in history(tmp_path / "a")] == ["2", "4"]
    )


def test_latest_holds_the_best_score_of_its_own_validation(start, tmp_path):
    scores, _ = start("a", "--total_itrs", 2)
    latest = torch.load(tmp_path / "a/latest.pth", weights_only=True)
    assert (latest["best_score"], latest["best_itr"]) == (scores["Mean IoU"], 2)


def test_finished_run_prints_its_scores_and_changes_nothing(start, tmp_path):
    scores, _ = start("a", "--total_itrs", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    again, out = start("a", "--total_itrs", 2, "--continue_training")
    assert same(again, scores) and f"Mean IoU: {scores['Mean IoU']:.6f}" in out and "finished" in out
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_continuing_what_has_not_begun_starts_it_and_says_so(start, tmp_path):
    _, out = start("a", "--total_itrs", 2, "--continue_training")
    assert "latest.pth does not exist: starting from the beginning" in out
    assert (tmp_path / "a/latest.pth").is_file()


def test_rows_past_the_checkpoint_are_removed_when_it_goes_on(start, tmp_path):
    start("a", "--total_itrs", 2)
    latest = (tmp_path / "a/latest.pth").read_bytes()
    start("a", "--total_itrs", 6, "--continue_training")
    assert [row["itr"] for row in history(tmp_path / "a")] == ["2", "4", "6"]
    (tmp_path / "a/latest.pth").write_bytes(latest)
    start("a", "--total_itrs", 4, "--continue_training")
    assert [row["itr"] for row in history(tmp_path / "a")] == ["2", "4"]


def test_options_that_changed_are_printed_and_hold(start, tmp_path):
    start("a", "--total_itrs", 2)
    _, out = start("a", "--total_itrs", 4, "--lr", 0.01, "--continue_training")
    assert "lr: 0.05 in the checkpoint, 0.01 now" in out
    assert [float(row["lr"]) for row in history(tmp_path / "a")] == [0.05, 0.01]


def test_runs_own_latest_wins_over_a_given_checkpoint(start, tmp_path):
    start("a", "--total_itrs", 2)
    from_a = ["--continue_training", "--ckpt", tmp_path / "a/latest.pth"]
    start("b", "--total_itrs", 4, *from_a)
    _, out = start("b", "--total_itrs", 6, *from_a)
    assert f"resuming from it, not from {tmp_path / 'a/latest.pth'}" in out
    assert "Itrs 5/6" in out and "Itrs 4/6" not in out
    assert [row["itr"] for row in history(tmp_path / "b")] == ["4", "6"]


def test_a_given_checkpoint_can_go_on_in_a_new_run(start, tmp_path):
    start("a", "--total_itrs", 2)
    _, out = start("b", "--total_itrs", 4, "--continue_training", "--ckpt", tmp_path / "a/latest.pth")
    assert "Itrs 3/4" in out and "Itrs 2/4" not in out
    assert [row["itr"] for row in history(tmp_path / "b")] == ["4"]
    assert (tmp_path / "b/best.pth").is_file()  # whatever the other run's best score is


def test_training_seconds_include_those_before_an_interrupted_validation(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        before(patch, "forward_backward", 2, lambda *_: time.sleep(0.5))
        signal_at(patch, "evaluate", 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            start("a", "--total_itrs", 2)
    start("a", "--total_itrs", 2, "--continue_training")
    with (tmp_path / "a/history.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0.5 < float(row["train_seconds"]) < 60


@pytest.mark.parametrize("text", ["epoch,itr\n1,2\n", "no table", "\0\0"])
def test_history_that_was_damaged_is_refused_by_name(start, tmp_path, capsys, text):
    start("a", "--total_itrs", 2)
    (tmp_path / "a/history.csv").write_text(text + "\nx\n")
    with pytest.raises(SystemExit) as stop:
        start("a", "--total_itrs", 4, "--continue_training")
    assert stop.value.code == 2 and "history.csv: not a history" in capsys.readouterr().err


def test_a_reader_that_leaves_does_not_end_the_training(folder, tmp_path):
    data = ["--dataset", "folder", "--data_root", folder, "--run_dir", tmp_path, "--run_name", "a"]
    command = [sys.executable, ROOT / "main.py", *data, *TINY, "--total_itrs", 2]
    job = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert job.stdout.readline().startswith("Device")
    job.stdout.close()
    assert job.wait(120) == 0 and job.stderr.read() == ""
    job.stderr.close()
    assert "best score and itr" in (tmp_path / "a/log.txt").read_text()


def test_a_process_that_ignores_hangups_goes_on_ignoring_them():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stop = StopSignals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested()
        stop.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch):
    def agree(value):
        """The other processes have no signal, and this one gets one in the middle of asking them."""
        os.kill(os.getpid(), signal.SIGTERM)
        return value

    monkeypatch.setattr(signals, "all_max", agree)
    stop = StopSignals()
    try:
        assert not stop.requested() and stop.received == signal.SIGTERM
        assert stop.requested()
    finally:
        stop.close()


# --- --patience ---


@pytest.fixture
def scored(monkeypatch):
    """`scored(0.3, 0.5, ...)`: the coming validations have these mIoUs."""

    def script(*mious):
        coming = iter(mious)

        def evaluate(*_, stop, **__):
            if stop.received:
                return torch.zeros(4, 4)  # incomplete, as that of a real one
            # A share q of each class is right, and the rest is taken for one other class: its IoU is q / (2 - q).
            q = 2 * (miou := next(coming)) / (1 + miou)
            return (1000 * (q * torch.eye(4) + (1 - q) * torch.eye(4).roll(1, 0))).round().long()

        monkeypatch.setattr(main, "evaluate", evaluate)

    return script


def iterations(path):
    return [int(row["itr"]) for row in history(path)]


PATIENT = ["--total_itrs", 9, "--val_interval", 1, "--patience"]


def test_a_run_ends_after_as_many_validations_without_a_better_miou(start, scored, tmp_path):
    scored(0.3, 0.5, 0.4, 0.5)  # an equal one is not better
    scores, out = start("a", *PATIENT, 2)  # it returns: exit code 0
    assert iterations(tmp_path / "a") == [1, 2, 3, 4]
    assert "--patience 2: stops after 2 iterations without a better mIoU" in out
    *_, why, last, best = out.splitlines()
    assert why == "--patience 2: ended after 2 validations without a better mIoU"
    assert last == f"last score and itr: {scores['Mean IoU']:.6f} 4" and best.endswith(" 2")
    assert load_checkpoint(tmp_path / "a/latest.pth")["cur_itrs"] == 4


def test_the_log_says_patience_in_iterations(start, tmp_path):
    _, out = start("a", "--total_itrs", 1, "--val_interval", 360, "--patience", 5)
    assert "--patience 5: stops after 1,800 iterations without a better mIoU" in out and "ended after" not in out


def test_without_patience_a_run_goes_to_its_end(start, scored, tmp_path):
    scored(0.5, *[0.1] * 8)
    _, out = start("a", *PATIENT, 0)
    assert iterations(tmp_path / "a") == list(range(1, 10)) and "--patience" not in out


@pytest.mark.parametrize("stopped_at", [2, 3, 4])
def test_a_resume_in_between_ends_at_the_same_validation(start, scored, tmp_path, monkeypatch, stopped_at):
    scored(0.3, 0.5, 0.4, 0.2)
    with monkeypatch.context() as patch:
        signal_at(patch, "forward_backward", stopped_at, signal.SIGTERM)
        with pytest.raises(SystemExit):
            start("a", *PATIENT, 2)
    itr = load_checkpoint(tmp_path / "a/latest.pth")["cur_itrs"]
    _, out = start("a", *PATIENT, 2, "--continue_training")
    assert itr == stopped_at and "ended after 2 validations" in out
    assert iterations(tmp_path / "a") == [1, 2, 3, 4]


def test_a_run_that_patience_ended_is_finished_until_the_patience_is_greater(start, scored, tmp_path):
    scored(0.5, 0.4, 0.3)
    scores, _ = start("a", *PATIENT, 2)
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    again, out = start("a", *PATIENT, 2, "--continue_training")
    assert same(again, scores)
    assert "finished: 3 iterations are done, 2 validations brought no better mIoU, --patience is 2" in out
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    scored(0.6, 0.1, 0.1, 0.1)
    start("a", *PATIENT, 3, "--continue_training")
    assert iterations(tmp_path / "a") == list(range(1, 8))


def test_validations_of_the_warm_up_do_not_count(start, scored, tmp_path):
    scored(0.5, 0.4, 0.3, 0.2, 0.1)
    start("a", *PATIENT, 2, "--warmup_itrs", 3)
    assert iterations(tmp_path / "a") == [1, 2, 3, 4, 5]


def test_another_runs_patience_is_not_taken_over(start, scored, tmp_path):
    scored(0.5, 0.4, 0.3, 0.2, 0.1, 0.1)
    start("a", *PATIENT, 2)
    start("b", *PATIENT, 2, "--continue_training", "--ckpt", tmp_path / "a/latest.pth")
    assert iterations(tmp_path / "b") == [4, 5, 6]
