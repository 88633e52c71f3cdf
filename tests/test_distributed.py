"""Jobs of two processes, started by torchrun as a user starts them, against one process."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import main
from datasets.loader import SameSizeBatches, TrainBatches
from tests.conftest import ROOT, TINY, before, write_voc_layout
from utils import distributed, engine
from utils.distributed import all_gather, all_max, all_sum, from_main, is_main, parallel, rank, session, world_size
from utils.engine import choose_device
from utils.environment import environment
from utils.errors import InputError
from utils.options import check_options, get_parser
from utils.weights.load import load_checkpoint

NAMES = ["sky", "road", "tree", "car"]
ITRS = 6
TRAINING = "--batch_size 4 --val_batch_size 1 --val_interval 2 --freeze_bn".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data of which void is unevenly shared, and the run `one` of a single process on it."""
    root = tmp_path_factory.mktemp("distributed")
    splits = {"train": [f"a{number}" for number in range(9)], "val": [f"b{number}" for number in range(5)]}
    own = write_voc_layout(root / "own", splits, class_names=NAMES)
    for number in range(0, 9, 2):
        path = own / "SegmentationClass" / f"a{number}.png"
        mask = Image.open(path)
        mask.paste(255, (0, 0, mask.width, mask.height * (number + 1) // 9))
        mask.save(path)
    torch.set_num_threads(1)
    (root / "plain.py").write_text(WITHOUT_DROPOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
        main.main(flags(root, "one", "--total_itrs", ITRS))
        yield root


# Dropout masks depend on the number of processes: runs that are compared go without.
WITHOUT_DROPOUT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import main, torch
torch.nn.Dropout.forward = lambda self, x: x
if __name__ == "__main__":
    main.main()
"""
SLOW_SAVE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import main, torch
torch.nn.Dropout.forward = lambda self, x: x
inner = torch.save
def save(content, *arguments, **keywords):
    if isinstance(content, dict):  # a checkpoint: pickling a tensor calls it too
        time.sleep(2)  # torchrun ends a process that others have left
    inner(content, *arguments, **keywords)
torch.save = save
if __name__ == "__main__":
    main.main()
"""


def flags(root, name, *more):
    data = ["--dataset", "folder", "--data_root", root / "own", "--run_dir", root, "--run_name", name]
    return [*map(str, data), *TINY, *TRAINING, *map(str, more)]


def torchrun(*arguments, restarts=0, script=ROOT / "main.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", str(restarts), str(script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(job):
    try:
        out, err = job.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def wait_for(path, text):
    """Until a line of the log has the text."""
    for _ in range(1200):
        with contextlib.suppress(FileNotFoundError):
            if text in path.read_text():
                return
        time.sleep(0.05)
    raise AssertionError(f"{text!r} never came")


def worker(job, rank):
    """The process of that rank."""
    for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                return int(pid)
    raise AssertionError(f"no process of rank {rank}")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_close_runs(first, second):
    """The same rows, and weights within what the order of float32 sums makes of them."""
    one, two = rows(first / "history.csv"), rows(second / "history.csv")
    assert [(row["epoch"], row["itr"], row["lr"]) for row in one] == [(r["epoch"], r["itr"], r["lr"]) for r in two]
    for mine, other in zip(one, two, strict=True):
        assert float(mine["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
        assert float(mine["val_loss"]) == pytest.approx(float(other["val_loss"]), rel=1e-4)
    one, two = (load_checkpoint(path / "latest.pth") for path in (first, second))
    for name, weights in one["model_state"].items():
        torch.testing.assert_close(two["model_state"][name], weights, rtol=1e-3, atol=1e-4)
    assert one["cur_itrs"] == two["cur_itrs"] == ITRS


def test_two_processes_score_each_image_once_and_exactly_as_one_does(root):
    given = flags(root, "one", "--test_only", "--ckpt", root / "one/latest.pth", "--save_val_results")
    main.main(given)
    test = root / "one/test_val"
    alone = {path.relative_to(test): path.read_bytes() for path in test.rglob("*") if path.is_file()}
    for path in alone:
        (test / path).unlink()
    result = finish(torchrun(*given))
    assert result.returncode == 0, result.stderr
    both = {path.relative_to(test): path.read_bytes() for path in test.rglob("*") if path.is_file()}
    assert both.keys() == alone.keys() and len(both) > 10
    for path in both.keys() - {Path("options.json"), Path("log.txt"), Path("card.json")}:
        assert both[path] == alone[path], path
    one, two = (json.loads(files[Path("card.json")]) for files in (alone, both))
    assert json.loads(both[Path("options.json")])["device_name"].endswith(", 2 processes")
    for measured in ("images_per_second", "peak_memory_mb"):
        one.pop(measured), two.pop(measured)
    assert one == two
    assert result.stdout.count("Mean IoU:") == 1 and ", 2 processes, float32" in result.stdout
    assert "Warning" not in result.stderr


def test_scores_of_two_processes_are_those_of_the_model_that_they_save(root):
    """Each process has batch-norm statistics of its own; the main one's are evaluated and saved."""
    trained = [flag for flag in flags(root, "seven", "--total_itrs", 2) if flag != "--freeze_bn"]
    result = finish(torchrun(*trained))
    assert result.returncode == 0, result.stderr
    (row,) = rows(root / "seven/history.csv")
    scores = main.main([*trained, "--test_only", "--ckpt", str(root / "seven/latest.pth")])
    assert float(row["mean_iou"]) == pytest.approx(scores["Mean IoU"], rel=1e-9)
    matrices = [root / "seven" / name / "confusion_matrix.csv" for name in ("", "test_val")]
    assert matrices[0].read_bytes() == matrices[1].read_bytes()


def test_two_processes_run_out_of_patience_together(root):
    given = flags(root, "patient", "--total_itrs", 20, "--lr", 0, "--patience", 2)  # without a step nothing improves
    result = finish(torchrun(*given))
    assert result.returncode == 0, result.stderr
    assert "ended after 2 validations without a better mIoU" in result.stdout
    assert [row["itr"] for row in rows(root / "patient/history.csv")] == ["2", "4", "6"]


def test_a_killed_process_ends_the_job_with_a_message_and_one_process_goes_on(root):
    """Two processes and parts of one image give the losses of one process and whole batches."""
    job = torchrun(*flags(root, "two", "--total_itrs", ITRS, "--grad_accum", 2), script=root / "plain.py")
    wait_for(root / "two/log.txt", "Itrs 3/6")
    os.kill(worker(job, 1), signal.SIGKILL)
    result = finish(job)
    assert result.returncode == 1
    assert "process 0 of 2 ends because another process is gone or cannot be reached (" in result.stderr
    assert "Signal 9 (SIGKILL)" in result.stderr  # torchrun's own
    itr = load_checkpoint(root / "two/latest.pth")["cur_itrs"]
    assert 2 <= itr < ITRS
    assert not list((root / "two").glob("*.tmp"))
    main.main(flags(root, "two", "--total_itrs", ITRS, "--continue_training"))
    assert_close_runs(root / "one", root / "two")


def test_a_signal_to_one_process_has_all_save_and_one_goes_on(root):
    """One process, then two until a signal, then one."""
    run = root / "three"
    main.main(flags(root, "three", "--total_itrs", 2))
    given = flags(root, "three", "--total_itrs", ITRS, "--continue_training")
    (root / "slow.py").write_text(SLOW_SAVE)
    job = torchrun(*given, script=root / "slow.py")
    wait_for(run / "log.txt", "Itrs 3/6")
    other = worker(job, 1)
    os.kill(other, signal.SIGTERM)
    while is_running(other):
        time.sleep(0.02)
    left_at = load_checkpoint(run / "latest.pth")["cur_itrs"]  # nobody leaves before it is written
    result = finish(job)
    assert result.returncode == 1 and "exitcode  : 143" in result.stderr  # torchrun's, and the processes'
    assert 'main.py", line' not in result.stderr
    (saved,) = re.findall(r"interrupted at iteration (\d)", result.stdout)
    assert load_checkpoint(run / "latest.pth")["cur_itrs"] == int(saved) == left_at >= 3
    main.main(given)
    assert_close_runs(root / "one", run)


def test_a_job_that_torchrun_starts_anew_goes_on_from_its_latest(root):
    job = torchrun(*flags(root, "four", "--total_itrs", ITRS), restarts=1, script=root / "plain.py")
    wait_for(root / "four/log.txt", "Itrs 3/6")
    os.kill(worker(job, 1), signal.SIGKILL)
    result = finish(job)
    assert result.returncode == 0, result.stderr
    assert "Training state restored from" in result.stdout and "Itrs 6/6" in result.stdout
    assert_close_runs(root / "one", root / "four")


def test_a_refused_run_stays_refused_when_torchrun_starts_it_anew(root):
    kept = {path: path.read_bytes() for path in (root / "one").rglob("*") if path.is_file()}
    result = finish(torchrun(*flags(root, "one", "--total_itrs", ITRS + 2, "--lr", 0.5), restarts=1))
    assert result.returncode == 1 and result.stderr.count("this run exists") == 2
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_restart_goes_on_from_the_runs_own_checkpoint_or_starts_as_the_first_time(
    root, tmp_path, monkeypatch, capsys, has_checkpoint
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    environment.cache_clear()
    given = flags(root, "a", "--run_dir", tmp_path, "--ckpt", root / "one/latest.pth", "--total_itrs", 4)
    with monkeypatch.context() as patch:
        before(patch, "forward_backward", 1, fail)
        with pytest.raises(ZeroDivisionError):
            main.main(given)
    if has_checkpoint:
        shutil.copy(root / "one/latest.pth", tmp_path / "a/latest.pth")
        with pytest.raises(SystemExit):
            main.main(given)
        assert "this run exists" in capsys.readouterr().err  # because it is no restart
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    main.main(given)
    out = capsys.readouterr().out
    assert ("Itrs 1/4" in out) != has_checkpoint and ("finished: 6 iterations" in out) == has_checkpoint
    environment.cache_clear()


def fail(*_):
    raise ZeroDivisionError


OTHER_DATA = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import main
from datasets import loader
inner = loader.build_dataset
def build_dataset(name, root, *arguments, **keywords):
    other = root + "_of_another_machine" if os.environ["RANK"] == "1" else root
    return inner(name, other, *arguments, **keywords)
loader.build_dataset = build_dataset
if __name__ == "__main__":
    main.main()
"""


def test_processes_with_other_samples_are_refused_in_one_line(root):
    other = Path(shutil.copytree(root / "own", root / "own_of_another_machine"))
    (other / "ImageSets/Segmentation/train.txt").write_text("a0\na1\na2\na3\n")
    (root / "other.py").write_text(OTHER_DATA)
    result = finish(torchrun(*flags(root, "six", "--total_itrs", 1), script=root / "other.py"))
    (line,) = [line for line in result.stderr.splitlines() if "other.py: error: " in line]
    assert f"{other}: 4 samples here, 9 in the main process" in line
    assert result.returncode == 1 and "exitcode  : 2" in result.stderr and not (root / "six").exists()
    assert f'{ROOT}/main.py", line' not in result.stderr


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    opts = get_parser().parse_args(["--batch_size", "5"])
    fault = "--batch_size 5 --grad_accum 1: cannot be shared equally by 2 processes; give a multiple of 2"
    with pytest.raises(InputError, match=fault):
        check_options(opts, processes=2)


def test_one_image_a_process_needs_frozen_batch_norms():
    opts = get_parser().parse_args(["--batch_size", "4", "--grad_accum", "2"])
    with pytest.raises(InputError, match="over 2 processes: leaves one image at a time"):
        check_options(opts, processes=2)
    check_options(opts)
    opts.freeze_bn = True
    check_options(opts, processes=2)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_processes_share_out_the_batches_of_one(processes):
    arguments = {"batch_size": 8, "seed": 3, "total_itrs": 5, "start_itr": 1}
    whole = list(TrainBatches(20, **arguments))
    parts = [list(TrainBatches(20, rank=rank, processes=processes, **arguments)) for rank in range(processes)]
    assert [[item for part in parts for item in part[itr]] for itr in range(4)] == whole


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_the_processes_share_out_each_validation_image_once(processes):
    sizes = [(4, 5), (5, 4), (4, 5), (4, 5), (6, 6)]
    parts = [SameSizeBatches(sizes, 2, rank=rank, processes=processes) for rank in range(processes)]
    assert sorted(index for part in parts for batch in part for index in batch) == list(range(5))
    assert sum(map(len, parts)) == len(SameSizeBatches(sizes, 2))


def test_with_a_single_process_every_function_is_a_no_op(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with session():
        assert (rank(), world_size(), is_main()) == (0, 1, True)
        value, model = torch.ones(2), torch.nn.Linear(1, 1)
        assert all_sum(value) is value and parallel(model) is model
        assert (all_max(15), all_gather("a"), from_main("b")) == (15, ["a"], "b")
    with pytest.raises(InputError, match="bad"), session():
        raise InputError("bad")


def test_an_attempt_does_not_read_what_an_earlier_one_left():
    """However late the processes come: the first one finds stale names, then the other one a stale roll."""
    store = dist.HashStore()
    for late in (0, 1, 0, 1):
        with ThreadPoolExecutor(2) as pool:
            jobs = []
            for rank in (1 - late, late):
                jobs.append(pool.submit(distributed.store_of_attempt, store, rank, 2))
                time.sleep(0.1)
            stores = [job.result(timeout=10) for job in jobs]
        assert not stores[1].check(["address"])
        stores[0].set("address", "here")
        assert stores[1].get("address") == b"here"


def test_an_environment_that_is_not_torchruns_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE: is 2, but RANK, .* is not set; start with torchrun"), session():
        pass
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(InputError, match="not numbers"), session():
        pass
    monkeypatch.setenv("WORLD_SIZE", "")
    with session():
        assert world_size() == 1


def test_each_process_has_a_gpu_of_its_own_or_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    monkeypatch.setattr(engine, "local_rank", lambda: 1)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda:0: under torchrun each process chooses its GPU"):
        choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--nproc_per_node: at least 2 processes for 1 GPUs"):
        choose_device("cuda")
