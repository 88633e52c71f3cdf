"""Defines the two exceptions for user errors: one line that names the file or flag, the problem and the fix."""


class InputError(ValueError):
    """Something that the user gave cannot be used. The message names the file or flag, the value and the fix."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker raises the error again with its whole traceback as the message: keep the line that
        # counts. Line breaks inside a value are replaced, so that the message stays one line.
        super().__init__(" ".join(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip().splitlines()))


class SampleError(InputError):
    """A sample of a data set cannot be used."""
