"""Writes files as a whole or not at all."""

import contextlib
import csv
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from utils.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which is renamed to `path` at the end and removed after an error.

    Raises InputError, naming `path`, if it cannot be written. An OSError of any other file passes through.
    """
    temporary = temporary_of(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename is not None and str(error.filename) not in (str(path), str(temporary)):
            raise
        raise cannot_write(path, error) from None
    finally:
        # Even after success: renaming a hard link to another name of the same file does nothing.
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporary_of(path: Path) -> Path:
    """Returns the path that `replacing(path)` writes to."""
    return path.with_name(path.name + ".tmp")


def cannot_write(path: Path, error: OSError) -> InputError:
    """Returns the user error for a file or folder that cannot be written."""
    return InputError(f"{path}: cannot be written ({error.strerror or error}); free space or choose another path")


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents. Raises InputError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


def copy_atomically(path: Path, copy: Path) -> None:
    """Gives the content of `path` the second name `copy`; at no moment is either file missing or incomplete."""
    with replacing(copy) as temporary:
        # A killed process may have left it.
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # not every file system has hard links
            with path.open("rb") as source, temporary.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
                file.flush()
                os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replaces a text file as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    """Replaces a CSV file as a whole."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
