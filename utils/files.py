"""Files that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an OSError from inside name `path` where it names nothing, as a full disk's does, or the temporary file."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary_of(path)):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; it takes the name at the end, or is removed by an error."""
    temporary = temporary_of(path)
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    finally:  # even where all went well: two names of one file are not renamed to each other
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporary_of(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def keep_as(path: Path, kept: Path) -> None:
    """Gives the content of `path` the name `kept` too, without a moment in which either is missing or half there."""
    with replacing(kept) as temporary:
        temporary.unlink(missing_ok=True)  # a kill left it
        try:
            os.link(path, temporary)
        except OSError:  # not every file system has hard links
            with path.open("rb") as source, temporary.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
                file.flush()
                os.fsync(file.fileno())
