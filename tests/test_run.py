"""The folder of a run: its lock and its log."""

import logging

import pytest
from filelock import FileLock

import main
from tests.conftest import TINY
from utils import run
from utils.errors import InputError
from utils.run import Run, RunLog


@pytest.fixture
def start(folder, tmp_path, capsys):
    def train(*arguments):
        data = ["--dataset", "folder", "--data_root", str(folder), "--run_dir", str(tmp_path), "--run_name", "a"]
        main.main([*data, *TINY, "--total_itrs", "1", *arguments])
        return capsys.readouterr().out

    return train


@pytest.mark.parametrize("flags", [[], ["--continue_training"]])
def test_a_second_start_of_a_run_that_is_training_is_refused(start, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr(run, "LOCK_SECONDS", 0.1)
    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a/.lock"):
        with pytest.raises(SystemExit) as stop:
            start(*flags)
        line = capsys.readouterr().err
        assert stop.value.code == 2 and f"{tmp_path / 'a'}: this run is training in another process; wait" in line
        assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]
    start(*flags)  # the lock is free, whatever file lies there
    assert not (tmp_path / "a/.lock").exists()


def test_a_file_system_without_locks_gets_one_warning(start, tmp_path, monkeypatch):
    def no_locks(self, *_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    out = start()
    assert out.count(f"warning: {tmp_path / 'a'}: no lock (FileSystem does not") == 1 and "Itrs 1/1" in out


def test_closing_removes_the_folders_that_only_the_lock_needed(tmp_path):
    for name, existed in (("x/y", False), ("z", True)):
        found = Run(tmp_path / name)
        if existed:
            found.folder.mkdir()
        found.lock()
        assert (found.folder / ".lock").is_file()
        found.close()
        assert found.folder.exists() is existed and not (found.folder / ".lock").exists()
    assert not (tmp_path / "x").exists()


def test_lines_from_before_the_file_are_in_it_and_a_full_disk_is_named(tmp_path, capsys):
    handler, log = RunLog(), logging.getLogger("deeplab")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        log.info("early")
        handler.path = tmp_path / "log.txt"
        log.warning("late")
        assert handler.path.read_text() == capsys.readouterr().out == "early\nwarning: late\n"
        handler.path = tmp_path / "gone" / "log.txt"
        with pytest.raises(InputError, match=r"gone/log\.txt: cannot be written \(No such file"):
            log.info("lost")
    finally:
        log.removeHandler(handler)


def test_a_run_leaves_neither_a_handler_nor_a_changed_root_logger(start):
    before = logging.root.handlers[:], logging.root.level
    start()
    assert not [handler for handler in logging.getLogger("deeplab").handlers if isinstance(handler, RunLog)]
    assert (logging.root.handlers, logging.root.level) == before
