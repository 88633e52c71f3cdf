"""Handles stop signals: the first one asks a training to save and exit, a later one ends it at once."""

import logging
import os
import signal
import threading
import time
from types import FrameType

from utils.distributed import all_max

log = logging.getLogger("deeplab")


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGHUP (a closed terminal) instead of ending the process, until `close`.

    Another signal more than a second after the first ends the process at once. Sooner ones are ignored, because a
    launcher and the system may both pass the same signal on. `received` is the first signal's number, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._agreed = False  # whether all processes know
        self._noted: float | None = None  # when this process received its own first signal
        self._before = {}
        # No other thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
            # nohup ignores SIGHUP, and so does this process then.
            wanted = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in wanted}

    def close(self) -> None:
        """Restores the signal handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set outside Python

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._noted is None:
            self.received, self._noted = self.received or number, time.monotonic()
        elif time.monotonic() - self._noted > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def requested(self) -> bool:
        """Whether any process has received a signal. All processes must ask, and all get the same answer."""
        if not self._agreed:
            # A signal that arrives during the exchange counts next time.
            agreed = all_max(self.received)
            if agreed:
                self._agreed, self.received = True, agreed
                log.info(f"{signal.Signals(agreed).name}: saving; another signal ends the training without saving")
        return self._agreed
