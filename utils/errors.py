"""Bad input, told in one line: what it is, where it is, how to mend it."""


class InputError(ValueError):
    """What the user gave cannot be used. The message names the file or flag, the value and the fix."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker raises it anew with its whole traceback for a message: keep the line that counts.
        # And a value that holds a line break is told in one line, too.
        super().__init__(" ".join(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip().splitlines()))


class SampleError(InputError):
    """A sample of a data set cannot be used."""
