"""Command lines alike for every script: flags with bounds, errors of one line, exit codes."""

import argparse
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from utils.distributed import ALONE, World
from utils.errors import InputError


class _ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, takes no abbreviations, and whose errors are InputError."""

    def __init__(self, **arguments) -> None:
        super().__init__(formatter_class=_ShowDefaults, allow_abbrev=False, **arguments)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see --help)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):  # of which argparse of Python 3.11 makes a list
                self.error(f"argument {word.removesuffix('=--')}: invalid value: '--'")
        return super().parse_known_args(args, namespace)


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` to `high`, both included; never infinite or NaN."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}".replace("..inf", " and above"))
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def any_path(text: str) -> str:
    """An argparse type: a path, there or not, that the system can take."""
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]}...: {error.strerror}") from None
    return text


def inner_path(text: str) -> str:
    """An argparse type: a name, or a path, that does not lead out of the folder that it is put into."""
    if Path(text).is_absolute() or ".." in Path(text).parts or not Path(text).parts:
        raise argparse.ArgumentTypeError(f"{text!r} leads elsewhere; give a name")
    return any_path(text)


def exit_codes(main: Callable) -> Callable:
    """Decorator for a script's `main(argv=None)`: bad input exits with 2 and one line, Ctrl-C with 130."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None):
        try:
            return main(argv)
        except InputError as error:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapper


class Interrupted(Exception):
    """A signal asks to stop, and this is a place to do so."""


class Interruption:
    """Inside, the first SIGTERM, SIGINT or SIGHUP (of a terminal that is closed) is noted, for the work to be left in
    order; another one ends the process at once, unless it follows within a second: a launcher and the system may both
    pass the same one on.

    `signal` is its number, 0 before.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.signal = 0
        self._noted: float | None = None  # when this process had a signal of its own
        self._warn = warn

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
            wanted = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as nohup ignores
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set outside Python

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._noted is None:
            self.signal, self._noted = self.signal or number, time.monotonic()
        elif time.monotonic() - self._noted > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def check(self, world: World = ALONE) -> None:
        """Raises Interrupted after a signal: in all processes of the job, whichever of them had it."""
        agreed = world.highest(self.signal)  # while it waits a signal may come, which is for the next time
        if agreed:
            self.signal = agreed
            name = signal.Signals(self.signal).name
            self._warn(f"{name}: saving; once more ends at once, without")
            raise Interrupted
