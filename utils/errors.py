"""Bad input, told in one line: what it is, where it is, how to mend it."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot be used. The message names the file or flag, the value and the fix."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker raises it anew with its whole traceback for a message: keep the line that counts.
        super().__init__(message.rsplit("InputError: ", 1)[-1].strip())


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
