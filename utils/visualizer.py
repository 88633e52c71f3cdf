"""The live dashboard of training: curves, tables and pictures on a visdom server, or a silent stand-in.

    python -m visdom.server -port 8097 -bind_local  # first, in a terminal of its own; see docs/dashboard.md
    python main.py --enable_vis --vis_port 8097 --vis_env main

A dashboard is a comfort: it must never hold training up, let alone end it. So no method here talks to the
server: each leaves the newest state of its window to a daemon thread, which sends what has changed. If the
server does not take it, the thread gives up for good, with one warning. (visdom alone waits for ever on a
server that hangs, and prints a traceback for every call on one that is gone.)
"""

import html
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

SEND_SECONDS = 0.5  # between two sends: what changes meanwhile goes out together
POST_SECONDS = 0.5  # for the server to answer a request; a healthy one takes milliseconds
TRIES = 3  # failures in a row, after which the server is not asked again
GRACE_SECONDS, FLUSH_SECONDS = 0.8, 5.0  # close() waits this long for a silent server, and for a slow one
MAX_POINTS = 2000  # of a line: more than a screen has columns, and little to send
IMAGE_WIDTH = 700  # pixels on the page at most; the picture itself keeps its size


class SilentVisualizer:
    """The stand-in without `--enable_vis`: every method of `Visualizer`, doing nothing."""

    def curve(self, *_: object, **__: object) -> None: ...

    table = images = close = curve


class Visualizer:
    """Draws into one visdom environment; a window is replaced as a whole whenever it changes.

    So a run that goes on in an environment draws over what was there: to keep its curves, it gives their
    points again. Pass numbers, lists, arrays or tensors on the CPU; they are copied. The server's troubles
    never raise: they cost one call of `warn`, on the caller's thread.
    """

    def __init__(self, port: int, env: str, warn: Callable[[str], None]) -> None:
        self._warn: Callable[[str], None] | None = warn  # None once it was called
        self._lines: dict[str, dict[str, list[tuple[float, float]]]] = {}  # by window, then by name
        # By window, and the newest only: pictures not sent yet give way to newer ones, so nothing piles up.
        self._pending: dict[str, Callable[[Any], object]] = {}
        self._changed = threading.Condition()  # guards the two above
        self._closing = False
        self._trouble = ""  # why the dashboard was given up
        self._answered = math.inf  # when the server last took something; infinity before it is asked
        # A daemon, or a server that hangs would keep a finished training from exiting.
        self._thread = threading.Thread(target=self._run, args=(port, env), name="dashboard", daemon=True)
        self._thread.start()

    def curve(self, window: str, x: ArrayLike, y: ArrayLike, *, name: str) -> None:
        """Appends a point (two numbers) or several (two vectors) to the line `name`; x is the iteration.

        NaN and infinity leave a gap. Of a long line evenly spaced points are shown, with its first and last.
        ValueError if x and y differ in length.
        """
        xs, ys = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (x, y))
        if xs.ndim != 1 or xs.shape != ys.shape:
            raise ValueError(f"curve {window!r}: x {xs.shape} and y {ys.shape} must be vectors of one length")
        if not len(xs):
            return
        with self._changed:
            line = self._lines.setdefault(window, {}).setdefault(name, [])
            line.extend(zip(xs.tolist(), ys.tolist(), strict=True))
        self._leave({window: partial(self._send_curves, window)})

    def table(self, window: str, rows: Iterable[Sequence[object]], *, header: Sequence[object] = ()) -> None:
        """Shows rows of cells under a header; floats get four significant digits, text is escaped."""
        lines = [("th", header)] * bool(header) + [("td", row) for row in rows]
        body = "".join(f"<tr>{''.join(_cell(tag, value) for value in row)}</tr>" for tag, row in lines)
        content = f'<table style="border-collapse: collapse; width: 100%">{body}</table>'
        # The pane fits the table, up to a height past which it scrolls.
        opts = {"title": window, "width": 360, "height": min(16 + 25 * len(lines), 620)}
        self._leave({window: lambda vis: vis.text(content, win=window, opts=opts)})

    def images(self, window: str, images: Sequence[ArrayLike], captions: Sequence[str]) -> None:
        """Shows each image under its caption, in windows named "`window` 1", "`window` 2" and so on.

        images: uint8 RGB, [N,3,H,W] or N of [3,H,W] with sizes of their own, such as strips of image, truth
        and prediction. ValueError for another type or shape, or if there are not N captions.
        """
        copies = [np.asarray(image).copy() for image in images]
        if bad := [i for i in copies if i.dtype != np.uint8 or i.ndim != 3 or i.shape[0] != 3]:
            raise ValueError(f"images {window!r}: {bad[0].dtype} {list(bad[0].shape)}, not uint8 [3,H,W]")
        if len(copies) != len(captions):
            raise ValueError(f"images {window!r}: {len(copies)} images but {len(captions)} captions")
        jobs = zip(copies, captions, strict=True)
        names = {f"{window} {number}": job for number, job in enumerate(jobs, 1)}
        self._leave({name: partial(_send_image, name, *job) for name, job in names.items()})

    def close(self) -> None:
        """Sends what is left and has the server save it to disk, in bounded time; later calls do nothing.

        Costs a second if the server does not answer, 5 s at most if it answers slowly.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        start = now = time.monotonic()
        while self._thread.is_alive() and not self._trouble:
            if now > min(start + FLUSH_SECONDS, max(start, self._answered) + GRACE_SECONDS):
                self._trouble = "the server did not take the last updates in time"
            self._thread.join(0.02)
            now = time.monotonic()
        self._report()

    def _leave(self, sends: dict[str, Callable[[Any], object]]) -> None:
        with self._changed:
            if not self._trouble and not self._closing:
                self._pending.update(sends)
                self._changed.notify()
        self._report()

    def _report(self) -> None:
        if self._trouble and self._warn:
            warn, self._warn = self._warn, None
            warn(f"the dashboard is off, training is not affected: {self._trouble}")

    def _run(self, port: int, env: str) -> None:
        try:
            vis, closing = _connect(port, env), False
            self._answered = time.monotonic()
            while not closing:
                with self._changed:
                    self._changed.wait_for(lambda: self._pending or self._closing)
                    sends, self._pending, closing = self._pending, {}, self._closing
                for send in sends.values():
                    self._try(partial(send, vis))
                self._pause()
            self._try(partial(vis.save, [env]))  # or a restart of the server would lose it all
        except Exception as error:  # whatever it is, training goes on
            with self._changed:
                self._trouble, self._pending = self._trouble or str(error) or type(error).__name__, {}

    def _try(self, send: Callable[[], object]) -> None:
        for _ in range(TRIES - 1):
            try:
                send()
                break
            except Exception:
                self._pause()
        else:
            send()
        self._answered = time.monotonic()

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, SEND_SECONDS)

    def _send_curves(self, window: str, vis: Any) -> None:
        # All lines whole, in one request: an append takes two, is slower, and misses what a restart forgot.
        with self._changed:
            lines = {name: np.array(_thin(line)) for name, line in self._lines[window].items()}
        points = np.concatenate(list(lines.values()))  # [N,2]
        points[~np.isfinite(points)] = np.nan  # an infinity is no JSON: it would stop the page
        labels = np.repeat(np.arange(len(lines)) + 1, [len(line) for line in lines.values()])  # [N]
        # With few points, such as one a validation, markers show each; a single one would not show otherwise.
        mode = "lines+markers" if len(points) <= 50 * len(lines) else "lines"
        opts = {"title": window, "legend": list(lines), "xlabel": "iteration", "mode": mode, "markersize": 5}
        # The title stays on the window's bar alone: in the plot, its buttons cover it.
        opts |= {"ylabel": window, "margintop": 30, "layoutopts": {"plotly": {"title": ""}}}
        vis.scatter(points, labels, win=window, opts=opts)


def _thin(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every 1st, 2nd, 4th ... point, so that MAX_POINTS are not exceeded, and the last."""
    stride = 1
    while len(line) > (MAX_POINTS - 1) * stride:
        stride *= 2  # doubled, so that a growing line keeps the points that it has shown
    return line[:-1:stride] + line[-1:]


def _cell(tag: str, value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    style = "border: 1px solid #ccc; padding: 2px 6px" + "; background: #eee" * (tag == "th")
    return f'<{tag} style="{style}">{html.escape(text)}</{tag}>'


def _send_image(window: str, image: np.ndarray, caption: str, vis: Any) -> None:
    height, width = image.shape[1:]
    shown = min(width, IMAGE_WIDTH)
    # The caption goes into the title, since visdom draws its own captions twice, and across the picture.
    opts = {"title": f"{window}: {caption}", "width": shown, "height": height * shown // width}
    vis.image(image, win=window, opts=opts | {"jpgquality": 90})  # PNG: 13 times the time, 6 times the bytes


def _connect(port: int, env: str) -> Any:
    """A visdom client whose every request is bounded in time and checked; nothing is sent yet."""
    try:
        import visdom  # here, since it is slow: only a run with a dashboard pays, and not on its main thread
    except ImportError as error:
        raise RuntimeError(f"visdom cannot be imported ({error}); run: pip install visdom") from error

    class Client(visdom.Visdom):
        def _handle_post(self, url: str, data: Any = None) -> str:
            self.session.trust_env = False  # or HTTP_PROXY is asked even for 127.0.0.1
            try:
                answer = self.session.post(url, data, timeout=POST_SECONDS, allow_redirects=False)
            except OSError as error:  # as all of requests' own are
                problem = f"no answer from 127.0.0.1:{port} ({type(error).__name__})"
                raise RuntimeError(f"{problem}; docs/dashboard.md tells how to start the server") from error
            if answer.status_code != 200:
                raise RuntimeError(f"{url} answered {answer.status_code}; is it visdom's server?")
            return answer.text

    logging.getLogger("visdom").setLevel(logging.CRITICAL)  # it tells of each session that it opens
    # Without `send` the constructor asks nothing of the server and starts no thread of its own.
    client = Client("http://127.0.0.1", port=port, env=env, send=False, use_incoming_socket=False)
    client.send = True
    return client


def build_visualizer(
    enabled: bool, *, port: int, env: str, warn: Callable[[str], None]
) -> Visualizer | SilentVisualizer:
    """The dashboard on the visdom server at 127.0.0.1:`port`, or the stand-in; returns at once either way.

    `warn` gets one line, at most once, when the dashboard is given up. Call `close()` when training ends.
    """
    return Visualizer(port, env, warn) if enabled else SilentVisualizer()
