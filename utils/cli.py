"""Gives every command line its flags with bounds, its errors in one line and its exit codes."""

import argparse
import functools
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from utils.errors import InputError

SHARED_MEMORY = r"(shared memory|</?torch_).*(No space left|Cannot allocate)|workers are out of shared memory"


class _ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """An argparse parser that shows defaults, accepts no abbreviations and raises InputError."""

    def __init__(self, **arguments) -> None:
        super().__init__(formatter_class=_ShowDefaults, allow_abbrev=False, **arguments)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see --help)")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        for word in sys.argv[1:] if args is None else args:
            # argparse in Python 3.11 makes a list of it.
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word.removesuffix('=--')}: invalid value: '--'")
        return super().parse_known_args(args, namespace)


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """Returns an argparse type: an int or a float from `low` to `high`, both included, never infinite or NaN."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            limits = f"{low} or more" if high == float("inf") else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {limits}")
        return value

    # argparse shows the name in "invalid int value".
    parse.__name__ = kind.__name__
    return parse


def any_path(text: str) -> str:
    """Parses a path that the system accepts, whether or not it exists: an argparse type."""
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path cannot contain a null character")
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]}...: {error.strerror}") from None
    return text


def inner_path(text: str) -> str:
    """Parses a name, or a path that stays inside the folder that it is joined to: an argparse type."""
    if Path(text).is_absolute() or ".." in Path(text).parts or not Path(text).parts:
        raise argparse.ArgumentTypeError(f"{text!r} leads out of its folder; give a name")
    return any_path(text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the CPU, had no memory left."""
    # By name, because importing torch takes seconds.
    names = {kind.__name__ for kind in type(error).__mro__}
    return "OutOfMemoryError" in names or "can't allocate memory" in str(error)


def loading_problem(error: BaseException) -> str | None:
    """Returns a line for an error by which the system stopped the processes that load data; None for others.

    The system gives them too little shared memory (in Docker 64 MB), kills them for their memory, or lets them open
    too few files. torch says which in the error or in its causes.
    """
    text = "\n".join(map(str, _causes(error)))
    fix = "lower --num_workers or --batch_size"
    if "Too many open files" in text or "items of ancdata" in text:
        return f"--num_workers: too many open files; raise the limit with ulimit -n 65536, or {fix}"
    # Semaphores lie in shared memory too, but only the place of their error says so.
    places = {Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)}
    if re.search(SHARED_MEMORY, text) or ("No space left" in text and "synchronize.py" in places):
        fix = f"{fix}, or enlarge /dev/shm (in Docker with --shm-size 8g)"
        return f"--num_workers: the processes that load data have too little shared memory; {fix}"
    if "DataLoader worker (pid" in text and not re.search("signal: (?!Killed|Bus error)|with exit code", text):
        fix = f"{fix}, or allow the job more memory"
        return f"--num_workers: the system killed a process that loads data, probably because memory ran out; {fix}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, its cause, the cause of that, and so on, as a traceback shows them."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def error_line(error: BaseException) -> tuple[str, int] | None:
    """Returns the message and the exit code for an error that the user can act on; None for a bug."""
    script = Path(sys.argv[0]).name
    if isinstance(error, InputError):
        return f"{script}: error: {error}", 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        advice = "use smaller images or batches, --amp bf16 or --device cpu"
        return f"{script}: error: the device ran out of memory; {advice}", 2
    if isinstance(error, (RuntimeError, OSError)) and (problem := loading_problem(error)):
        return f"{script}: error: {problem}", 2
    return None


def friendly_errors(main: Callable) -> Callable:
    """Decorates a script's `main(argv=None)`: a user error is one line and exit code 2, Ctrl-C exits with 130."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> object:
        try:
            return main(argv)
        except (Exception, KeyboardInterrupt) as error:
            if (found := error_line(error)) is None:
                raise
            line, code = found
            print(line, file=sys.stderr)
            raise SystemExit(code) from None

    return wrapper
