import errno
import multiprocessing
import os
import signal

import pytest
import torch

import main
from tests.conftest import TINY
from utils.cli import error_line


def chained(top, cause=None, context=None, *, kind=RuntimeError):
    """An error with this text, raised from or while handling others."""
    error = kind(top)
    error.__context__ = context
    if cause:
        error.__cause__ = cause
    return error


def lost(reason):
    """A worker's end as the DataLoader reports it when it waits for data."""
    cause = RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {reason}. ")
    return chained("DataLoader worker (pid(s) 7) exited unexpectedly", cause)


FULL = (
    "It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit."
)
FILE = "</torch_4233_734083247_0>"
IN_WORKER = (
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
)
IN_SHARED_MEMORY = [
    lost(f"Bus error. {FULL}"),
    RuntimeError(f"DataLoader worker (pid 7) is killed by signal: Bus error. {FULL}"),
    RuntimeError(
        f"{IN_WORKER}RuntimeError: unable to allocate shared memory(shm) for file {FILE}: {os.strerror(28)} (28)"
    ),
    RuntimeError(f"unable to write to file {FILE}: No space left on device (28)"),
    RuntimeError(f"unable to mmap 800 bytes from file {FILE}: Cannot allocate memory (12)"),
    RuntimeError(f"unable to open shared memory object {FILE} in read-write mode: No space left on device (28)"),
    chained("later", context=lost(f"Bus error. {FULL}")),
]
KILLED = [lost("Killed"), lost("Killed: 9"), RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")]
KILLED += [RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")]
TOO_MANY_FILES = [
    RuntimeError("Too many open files. Communication with the workers is no longer possible."),
    RuntimeError(f"unable to open shared memory object {FILE} in read-write mode: Too many open files (24)"),
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    RuntimeError("received 0 items of ancdata"),
]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        *((error, ["shared memory", "--num_workers", "--batch_size", "--shm-size"]) for error in IN_SHARED_MEMORY),
        *((error, ["killed", "--num_workers", "--batch_size", "memory"]) for error in KILLED),
        *((error, ["too many open files", "ulimit -n", "--num_workers"]) for error in TOO_MANY_FILES),
    ],
)
def test_what_stops_the_loading_of_data_is_one_line_that_says_what_to_change(error, words):
    line, code = error_line(error)
    assert code == 2 and "\n" not in line and ": error: --num_workers: " in line
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    "error",
    [
        lost("Segmentation fault"),
        RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are lost"),
        RuntimeError(f"{IN_WORKER}ValueError: not enough values to unpack"),
        RuntimeError("out of resource: shared memory, Required: 200000, Hardware limit: 100000."),
        chained("a bug", lost("Killed"), kind=TypeError),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("Too many open files"),
    ],
)
def test_bugs_keep_their_traceback(error):
    assert error_line(error) is None


def test_out_of_memory_keeps_its_line():
    error = chained("CUDA out of memory", context=lost("Killed"), kind=torch.OutOfMemoryError)
    assert "the device ran out of memory" in error_line(error)[0]


def test_a_semaphore_that_does_not_fit_is_a_matter_of_shared_memory(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", full)
    with pytest.raises(OSError) as caught:
        multiprocessing.Event()
    assert "--shm-size" in error_line(caught.value)[0]


def test_worker_that_is_killed_ends_the_training_with_one_line_and_exit_code_2(folder, tmp_path, capfd, monkeypatch):
    parent = os.getpid()

    def kill(*_, **__):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("datasets.loader.train_transform", lambda *_, **__: kill)
    flags = [*TINY, "--num_workers", "1", "--total_itrs", "2"]
    with pytest.raises(SystemExit) as stop:
        main.main(["--dataset", "folder", "--data_root", str(folder), "--run_dir", str(tmp_path / "runs"), *flags])
    assert stop.value.code == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.strip() and "training:" not in line)
    assert "the system killed a process that loads data" in line and "--num_workers" in line
