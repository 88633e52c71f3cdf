"""What a training survives: a full disk, a folder that goes, weights that overflow, a kill at any moment."""

import errno
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from datasets import build_dataset
from tests.conftest import ROOT, TINY, before, write_voc_layout
from tests.test_checkpoint import Malicious, complete
from tests.test_resume import assert_same_run
from utils import loss
from utils.checkpoint import load_newest, save_checkpoint
from utils.errors import InputError, SampleError
from utils.files import copy_atomically
from utils.weights.load import load_checkpoint

KILLS = int(os.environ.get("SEG_KILLS", "3"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of data, and the runs on it: `half` of 4 iterations and `whole` of 6, validated every other one."""
    splits = {"train": ["a1", "a2", "a3", "a4"], "val": ["b1", "b2", "b3"]}
    root = tmp_path_factory.mktemp("runs")
    write_voc_layout(root / "own", splits, class_names=["sky", "road", "tree", "car"])
    torch.set_num_threads(1)
    for name, itrs in (("half", 4), ("whole", 6)):
        main.main(command_line(root, root / name, "--total_itrs", itrs))
    return root


def command_line(root, run, *arguments):
    data = ["--dataset", "folder", "--data_root", root / "own", "--run_dir", run.parent, "--run_name", run.name]
    return [*map(str, data), *TINY, *map(str, arguments)]


@pytest.fixture
def half(runs, tmp_path):
    """A copy of the run of 4 iterations."""
    return Path(shutil.copytree(runs / "half", tmp_path / "a"))


@pytest.fixture
def start(runs, tmp_path, capfd):
    def run(*arguments):
        capfd.readouterr()
        scores = main.main(command_line(runs, tmp_path / "a", *arguments))
        return scores, capfd.readouterr().out

    return run


@pytest.fixture
def refused(start, capfd):
    """Runs main.py; returns the one line that all of the process left on stderr, and the closing line on stdout."""

    def run(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            start(*arguments)
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if line.strip()]
        assert stop.value.code == 2 and len(lines) == 1, lines
        closing = [line for line in out.splitlines() if line.startswith(("Kept: ", "No checkpoint"))]
        assert closing in ([], out.splitlines()[-1:])
        return "\n".join(lines + closing)

    return run


def assert_whole(run, itr):
    """The checkpoints load, no row is cut, and nothing half-written lies about."""
    for path in run.glob("*.pth"):
        load_checkpoint(path)
    assert load_checkpoint(run / "latest.pth")["cur_itrs"] == itr
    assert not list(run.glob("*.tmp"))
    lines = (run / "history.csv").read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") and line.count(",") == lines[0].count(",") for line in lines)


# --- the checkpoint before the latest one ---


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path):
    path.write_bytes(b"something else\n" * 1000)


@pytest.mark.parametrize("damage", [cut, overwrite, Path.unlink])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(runs, half, start, damage):
    latest, previous = half / "latest.pth", half / "latest.prev.pth"
    assert (load_checkpoint(latest)["cur_itrs"], load_checkpoint(previous)["cur_itrs"]) == (4, 2)
    damage(latest)
    there = latest.exists() and latest.read_bytes()
    _, out = start("--total_itrs", 6, "--continue_training")
    (warning,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert f"{latest}: " in warning and f"resuming from {previous}" in warning
    assert any(word in warning for word in ("may be incomplete", "not a checkpoint", "no such file"))
    assert warning in (half / "log.txt").read_text() and "Itrs 3/6" in out
    assert load_checkpoint(previous)["cur_itrs"] == 4
    assert_same_run(half, runs / "whole")
    if there:  # put aside: it could have been the reading that failed
        assert (half / "latest.damaged.pth").read_bytes() == there


def test_a_run_without_a_checkpoint_that_loads_is_refused(half, refused):
    latest, previous = half / "latest.pth", half / "latest.prev.pth"
    cut(latest)
    flags = ("--total_itrs", 6, "--continue_training")
    line = refused(*flags, "--ckpt", latest)  # asked for by name
    assert f"--ckpt {latest}: cannot be read" in line
    overwrite(previous)
    listing = sorted(half.iterdir())
    line = refused(*flags)
    assert f"{latest}: cannot be read" in line and f"{previous} does not load either" in line
    assert sorted(half.iterdir()) == listing


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_checkpoint_before_is_kept_with_and_without_hard_links(tmp_path, monkeypatch, hard_links):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "a.prev.pth.tmp").write_bytes(b"a kill left it")
    for itr in range(3):
        save_checkpoint(tmp_path / "a.pth", complete(cur_itrs=itr), keep_previous=True)
    assert load_checkpoint(tmp_path / "a.pth")["cur_itrs"] == 2
    assert load_checkpoint(tmp_path / "a.prev.pth")["cur_itrs"] == 1
    copy_atomically(tmp_path / "a.pth", tmp_path / "a.prev.pth")
    copy_atomically(tmp_path / "a.pth", tmp_path / "a.prev.pth")  # with links, one file is renamed to itself
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.prev.pth", "a.pth"]


# --- the disk ---


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("name", ["latest.pth", "best.pth", "history.csv", "class_iou.csv", "curves.png", "log.txt"])
def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_later(runs, half, start, refused, monkeypatch, name):
    path, own = half / name, (half / "latest.pth").read_bytes()
    torch.save(load_checkpoint(half / "latest.pth") | {"best_score": -1.0}, half / "latest.pth")  # the next is better

    def fill(*_):
        link = path if name == "log.txt" else path.with_name(f"{name}.tmp")
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        before(patch, "evaluate", 1, fill)
        line = refused("--total_itrs", 6, "--continue_training")
    assert f"{path}: cannot be written (No space left on device)" in line
    assert f"\nKept: {half / 'latest.pth'} of iteration 4. Add --continue_training to resume." in line
    if name == "log.txt":
        path.unlink()
    assert_whole(half, 4)
    (half / "latest.pth").write_bytes(own)
    start("--total_itrs", 6, "--continue_training")
    assert_same_run(half, runs / "whole")


def test_a_limit_on_file_sizes_is_met_in_one_line(half, refused, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # noqa: E731
    before(monkeypatch, "evaluate", 1, limit)
    try:
        line = refused("--total_itrs", 6, "--continue_training")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "(File too large)" in line and "a/latest.pth of iteration 4. Add" in line
    assert_whole(half, 4)


def test_a_disk_that_is_full_at_the_first_latest_points_to_the_best(refused, start, tmp_path, monkeypatch):
    before(monkeypatch, "evaluate", 1, lambda *_: (tmp_path / "a/latest.pth.tmp").symlink_to("/dev/full"))
    line = refused("--total_itrs", 4)
    best = tmp_path / "a/best.pth"
    assert f"Kept: {best} of iteration 2. Add --continue_training to resume." in line
    _, out = start("--total_itrs", 4, "--continue_training")
    assert f"Training state restored from {best}" in out and "Itrs 3/4" in out and "Itrs 2/4" not in out


def test_a_signal_on_a_full_disk_ends_in_one_line(refused, tmp_path, monkeypatch):
    def stop(*_):
        (tmp_path / "a/latest.pth.tmp").symlink_to("/dev/full")
        os.kill(os.getpid(), signal.SIGTERM)

    before(monkeypatch, "torch.utils.data.DataLoader.__iter__", 1, stop)
    line = refused("--total_itrs", 2)
    assert "latest.pth: cannot be written (No space left" in line
    assert "No checkpoint was saved. Add --continue_training to start from the beginning" in line


def test_a_folder_that_became_read_only_ends_the_run_in_one_line(half, refused, monkeypatch):
    inner = Path.open

    def read_only(self, mode="r", *arguments, **keywords):
        if mode[0] in "wa" and self.is_relative_to(half):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return inner(self, mode, *arguments, **keywords)

    with monkeypatch.context() as patch:
        before(patch, "evaluate", 1, lambda *_: patch.setattr(Path, "open", read_only))
        line = refused("--total_itrs", 6, "--continue_training")
    assert "a/log.txt: cannot be written (Read-only file system)" in line and "latest.pth of iteration 4." in line
    assert_whole(half, 4)


@pytest.mark.parametrize("name", ["evaluate", "torch.save"])
def test_a_folder_that_vanishes_ends_the_run_in_one_line(half, refused, monkeypatch, name):
    before(monkeypatch, name, 1, lambda *_: shutil.rmtree(half))
    line = refused("--total_itrs", 6, "--continue_training")
    assert f"{half}/" in line and "(No such file or directory); free" in line and "No checkpoint was saved" in line
    assert not half.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "a bug"), FileNotFoundError(2, "a bug", "/elsewhere/a")])
def test_errors_of_other_files_stay_what_they_are(start, monkeypatch, error):
    def fail(*_):
        raise error

    before(monkeypatch, "forward_backward", 1, fail)
    with pytest.raises(OSError, match="a bug"):
        start("--total_itrs", 2)


# --- weights that are not finite ---


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_never_saved(runs, half, refused, start, monkeypatch, value):
    def overflow(model, *_):
        norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
        norm.running_var[0] = value  # takes no part in the loss

    with monkeypatch.context() as patch:
        before(patch, "forward_backward", 2, overflow)
        line = refused("--total_itrs", 6, "--continue_training")
    assert ".pth: not saved, because the weights are not finite after iteration 6" in line
    assert "--lr" in line and "--amp off" in line
    assert_whole(half, 4)
    start("--total_itrs", 6, "--continue_training")
    assert_same_run(half, runs / "whole")


# --- samples that cannot be used ---


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path):
    """40,000 by 40,000 pixels in 200 bytes: a header that promises them."""
    data = bytearray((path.parent.parent / "SegmentationClass/a1.png").read_bytes())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def enlarge(path):
    Image.open(path).resize((90, 90)).save(path)


def stray(path):
    mask = Image.open(path)
    mask.putpixel((0, 0), 77)
    mask.save(path)


def swap(path, damage):
    """At once, lest a worker reads half of it."""
    other = Path(shutil.copy(path, path.with_name(f"other_{path.name}")))
    damage(other)
    other.replace(path)


BAD = [
    ("JPEGImages/a2.jpg", halve, "cannot be read as an image"),
    ("JPEGImages/a2.jpg", lambda path: path.write_bytes(b""), "it is empty"),
    ("JPEGImages/a2.jpg", bomb, "cannot be read as an image"),
    ("JPEGImages/a2.jpg", lambda path: path.write_text("no picture"), "cannot be read as an image"),
    ("SegmentationClass/a2.png", halve, "cannot be read as a mask"),
    ("SegmentationClass/a2.png", enlarge, "must have the same size"),
    ("SegmentationClass/a2.png", stray, "value 77 is neither a class"),
]


@pytest.fixture
def data(runs, tmp_path):
    """The data again, to be damaged, with two more training samples."""
    splits = {"train": [f"a{number}" for number in range(1, 7)], "val": ["b1", "b2", "b3"]}
    return write_voc_layout(tmp_path / "data", splits, class_names=["sky", "road", "tree", "car"])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("name", "damage", "words"), BAD[:1] + BAD[-1:])
def test_a_sample_that_goes_bad_is_named_and_what_was_trained_is_saved(
    data, start, refused, tmp_path, monkeypatch, workers, name, damage, words
):
    flags = ("--data_root", data, "--num_workers", workers, "--val_interval", 9, "--total_itrs", 9)
    with monkeypatch.context() as patch:  # three iterations are an epoch: in the second one it is met for sure
        before(patch, "forward_backward", 3, lambda *_: swap(data / name, damage))
        line = refused(*flags)
    assert str(data / name) in line and words in line and "--skip_bad" in line
    itr = load_checkpoint(tmp_path / "a/latest.pth")["cur_itrs"]
    assert (
        3 <= itr <= 8
        and f"Kept: {tmp_path / 'a/latest.pth'} of iteration {itr}. Add --continue_training to resume." in line
    )
    _, out = start(*flags, "--continue_training", "--skip_bad")
    assert f"left out: {data / name}: " in out and words in out
    assert "train: 1 of 6 samples left out" in out and "val: 0 of 3 samples left out" in out
    assert f"Itrs {itr + 1}/9" in out and "Itrs 9/9" in out
    assert "left out: " in (tmp_path / "a/log.txt").read_text()


@pytest.mark.parametrize(("name", "damage", "words"), BAD)
def test_bad_samples_are_refused_by_name_or_left_out_and_counted(data, name, damage, words):
    damage(data / name)
    dataset = build_dataset("folder", data, "train")
    with pytest.raises(SampleError, match=words) as caught:
        dataset[1]
    bad = dataset.bad_samples()
    assert bad == {1: str(caught.value)} and str(data / name) in bad[1]
    dataset.leave_out(bad)
    assert dataset.ids == ["a1", "a3", "a4", "a5", "a6"] and len(dataset) == 5
    assert [path.stem for path in (*dataset.images, *dataset.masks)] == dataset.ids * 2
    assert len([dataset[index] for index in range(len(dataset))]) == 5
    with pytest.raises(InputError, match="none of the 5 samples of this split can be used"):
        dataset.leave_out(range(5))


def test_validation_leaves_bad_samples_out(data, start, tmp_path):
    flags = ("--data_root", data, "--test_only", "--ckpt", tmp_path / "a/latest.pth")
    start("--data_root", data, "--total_itrs", 1)
    halve(data / "JPEGImages/b2.jpg")
    _, out = start(*flags, "--skip_bad")
    assert "val: 1 of 3 samples left out" in out
    rows = (tmp_path / "a/test_val/images.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["image", "b1", "b3"]


# --- memory ---


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_says_what_to_lower_and_keeps_the_last_checkpoint(
    runs, half, start, refused, monkeypatch, error
):
    """In the loss, when the forward pass has moved the statistics of batch norms already."""
    inner, calls = loss.cross_entropy, []

    def exhaust(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return inner(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(loss, "cross_entropy", exhaust)
        line = refused("--total_itrs", 6, "--continue_training")
    assert "iteration 6: the device's memory is too small for 2 crops of 33 pixels at a time" in line
    assert "lower --batch_size" in line and "latest.pth of iteration 4. Add --continue_training" in line
    assert_whole(half, 4)
    start("--total_itrs", 6, "--continue_training")
    assert_same_run(half, runs / "whole")


def test_too_little_memory_at_the_first_step_leaves_the_name_free(refused, start, tmp_path, monkeypatch):
    def exhaust(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before(monkeypatch, "forward_backward", 1, exhaust)
    line = refused("--total_itrs", 6, "--batch_size", 4)
    assert "for 4 crops of 33 pixels at a time; give --grad_accum 2, lower --crop_size, or give --amp auto" in line
    assert not list((tmp_path / "a").glob("*.pth")) and "No checkpoint was saved" in line
    monkeypatch.undo()
    start("--total_itrs", 1)  # the name is free


# --- a kill ---


@pytest.mark.parametrize("at", ["fsync", "link", "replace 1", "replace 2"])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_step_of_a_save_leaves_checkpoints_that_load(tmp_path, at, after):
    path = tmp_path / "latest.pth"
    for itr in (1, 2):
        save_checkpoint(path, complete(cur_itrs=itr), keep_previous=True)
    name, number = (*at.split(), 1)[:2]
    owner = Path if name == "replace" else os
    inner, calls = getattr(owner, name), []

    def killing(*arguments):
        calls.append(name)
        if len(calls) < int(number):
            return inner(*arguments)
        if after:
            inner(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        setattr(owner, name, killing)
        save_checkpoint(path, complete(cur_itrs=3), keep_previous=True)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    newest = 3 if (at, after) == ("replace 2", True) else 2
    assert load_checkpoint(path)["cur_itrs"] == newest
    assert load_newest(tmp_path / "latest.prev.pth")[1]["cur_itrs"] in (1, 2)
    save_checkpoint(path, complete(cur_itrs=4), keep_previous=True)
    assert load_checkpoint(path)["cur_itrs"] == 4
    assert load_checkpoint(tmp_path / "latest.prev.pth")["cur_itrs"] == newest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.prev.pth", "latest.pth"]


def test_runs_that_are_killed_over_and_over_end_as_if_they_had_not_been(runs, tmp_path, monkeypatch):
    """SEG_KILLS: how many kills, at random moments. A run that comes to its end is compared, and another begun."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")  # imports torch once, and is single-threaded when it forks
    context.set_forkserver_preload(["main"])
    rng = random.Random(0)

    def process(name):
        flags = ("--total_itrs", 5, "--val_interval", 1, "--continue_training")
        return context.Process(target=main.main, args=(command_line(runs, tmp_path / name, *flags),))

    def finish(name):
        began = time.monotonic()
        child = process(name)
        child.start()
        child.join(120)
        assert child.exitcode == 0
        return time.monotonic() - began

    context.Process(target=time.sleep, args=(0,)).start()
    seconds = finish("whole")
    run, number, kills, in_saves, in_writes = tmp_path / "0", 0, 0, 0, 0
    while kills < KILLS:
        child = process(run.name)
        child.start()
        child.join(rng.uniform(0.1, 0.7) * seconds)
        child.kill()
        child.join()
        for path in run.glob("*.pth"):
            load_checkpoint(path)
        if child.exitcode == 0:
            assert_same_run(run, tmp_path / "whole")
            number += 1
            run = tmp_path / str(number)
            continue
        kills += 1
        left = {path.name for path in run.glob("*.tmp")}
        in_saves += any(".pth" in name for name in left)
        in_writes += bool(left)
    finish(run.name)
    assert_same_run(run, tmp_path / "whole")
    assert not list(run.glob("*.tmp"))
    print(f"{kills} kills over {number + 1} runs of {seconds:.1f} s: {in_saves} in saves, {in_writes} in any write")


# --- checkpoints that are not ours ---


@pytest.mark.parametrize("flags", [["--test_only"], ["--continue_training"], []])
@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_checkpoint_with_code_in_it_is_refused_by_name_and_nothing_runs(refused, tmp_path, flags, writer):
    writer(complete(options=Malicious(tmp_path / "ran")), tmp_path / "evil.pth")
    line = refused("--ckpt", tmp_path / "evil.pth", *flags)
    assert f"--ckpt {tmp_path / 'evil.pth'}: holds more than tensors and builtins" in line
    assert not (tmp_path / "ran").exists() and not (tmp_path / "a").exists()


def test_a_checkpoint_whose_weights_are_another_models_is_refused_by_name(runs, refused, tmp_path):
    content = load_checkpoint(runs / "half/latest.pth")
    content["options"]["model"] = "deeplabv3_mobilenet_v3_large"
    torch.save(content, tmp_path / "other.pth")
    flags = ("--ckpt", tmp_path / "other.pth", "--model", "deeplabv3_mobilenet_v3_large")
    for more in (["--test_only"], ["--continue_training"]):
        assert f"--ckpt {tmp_path / 'other.pth'}: the weights do not fit" in refused(*flags, *more)
