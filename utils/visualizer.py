"""Shows a training run live: curves, tables and images, on a visdom server or in TensorBoard.

    python -m visdom.server -port 8097 -bind_local  # first, in another terminal; see docs/dashboard.md
    python main.py --enable_vis --vis_port 8097 --vis_env main

    python main.py --tensorboard
    tensorboard --logdir runs

A dashboard must never delay training, let alone end it. So no method of `Visualizer` talks to the server: each one
hands the newest state of its window to a daemon thread, which sends what has changed. If the server does not accept
it, the thread gives up for good, with one warning. (visdom by itself waits forever for a server that hangs, and
prints a traceback for every call to a server that is gone.) TensorBoard needs no server: it reads files.
"""

import html
import logging
import math
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from utils.files import cannot_write

SEND_SECONDS = 0.5  # pause between two sends; changes in the meantime go out together
POST_SECONDS = 0.5  # time limit for one request; a healthy server takes milliseconds
TRIES = 3  # failures in a row before the server is given up
GRACE_SECONDS, FLUSH_SECONDS = 0.8, 5.0  # how long close() waits for a silent server, and for a slow one
MAX_POINTS = 2000  # per line: more than a screen has columns, and little to send
IMAGE_WIDTH = 700  # pixels, at most, on the page; the image itself keeps its size
log = logging.getLogger("deeplab")


class Dashboard:
    """Turns a run into curves, tables and images; the classes below say where these go."""

    def start(self, options: dict[str, object], rows: Sequence[dict[str, float]]) -> None:
        """Shows the options of a run and, if it resumes, the rows of its history."""
        self.table("options", [(name, str(value)) for name, value in options.items()], header=("option", "value"))
        self._rows(rows)

    def step(self, itr: int, loss: float, lr: float) -> None:
        """Adds the training loss and the head's learning rate at an iteration."""
        self.curve("loss", itr, loss, name="training")
        self.curve("learning rate", itr, lr, name="head")

    def validation(
        self,
        row: dict[str, float],
        class_names: Sequence[str],
        class_iou: Sequence[float],
        strips: dict[str, ArrayLike],
    ) -> None:
        """Adds a row of the history, the IoU of each class, and strips of image | ground truth | prediction by id."""
        self._rows([row])
        self.table("class IoU", zip(class_names, class_iou, strict=True), header=("class", "IoU"))
        self.images("sample", list(strips.values()), list(strips))

    def _rows(self, rows: Sequence[dict[str, float]]) -> None:
        from utils.metrics import SCORE_COLUMNS  # imported late: a dashboard by itself does not need torch

        itrs = [row["itr"] for row in rows]
        for column, name in SCORE_COLUMNS.items():
            self.curve("validation", itrs, [row[column] for row in rows], name=name)
        self.curve("loss", itrs, [row["loss"] for row in rows], name="mean since the last validation")
        self.curve("loss", itrs, [row["val_loss"] for row in rows], name="validation cross-entropy")


class Visualizer(Dashboard):
    """Draws into one visdom environment; a window is replaced as a whole whenever it changes.

    A resumed run in the same environment therefore draws over its old windows. To keep its curves, it passes their
    points again. Pass numbers, lists, arrays or CPU tensors; they are copied. Trouble with the server never raises:
    it logs one warning, on the caller's thread.
    """

    def __init__(self, port: int, env: str) -> None:
        self._warned = False
        self._lines: dict[str, dict[str, list[tuple[float, float]]]] = {}  # by window, then by name
        # By window, and only the newest: unsent images give way to newer ones, so nothing piles up.
        self._pending: dict[str, Callable[[Any], object]] = {}
        self._changed = threading.Condition()  # guards the two above
        self._closing = False
        self._trouble = ""  # why the dashboard was given up
        self._answered = math.inf  # when the server last accepted something; infinity before the first request
        # A daemon thread, so that a server that hangs cannot keep a finished training run from exiting.
        self._thread = threading.Thread(target=self._run, args=(port, env), name="dashboard", daemon=True)
        self._thread.start()

    def curve(self, window: str, x: ArrayLike, y: ArrayLike, *, name: str) -> None:
        """Appends a point (two numbers) or several (two vectors) to the line `name`; x is the iteration.

        NaN and infinity leave a gap. A long line is thinned to evenly spaced points; its first and last stay.
        Raises ValueError if x and y differ in length.
        """
        xs, ys = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (x, y))
        if xs.ndim != 1 or xs.shape != ys.shape:
            raise ValueError(f"curve {window!r}: x {xs.shape} and y {ys.shape} must be vectors of equal length")
        if not len(xs):
            return
        with self._changed:
            line = self._lines.setdefault(window, {}).setdefault(name, [])
            line.extend(zip(xs.tolist(), ys.tolist(), strict=True))
        self._leave({window: partial(self._send_curves, window)})

    def table(self, window: str, rows: Iterable[Sequence[object]], *, header: Sequence[object] = ()) -> None:
        """Shows rows of cells below a header; floats get four significant digits, text is escaped."""
        lines = [("th", header)] * bool(header) + [("td", row) for row in rows]
        body = "".join(f"<tr>{''.join(_cell(tag, value) for value in row)}</tr>" for tag, row in lines)
        content = f'<table style="border-collapse: collapse; width: 100%">{body}</table>'
        # The pane fits the table up to a maximum height, and scrolls beyond it.
        opts = {"title": window, "width": 360, "height": min(16 + 25 * len(lines), 620)}
        self._leave({window: lambda vis: vis.text(content, win=window, opts=opts)})

    def images(self, window: str, images: Sequence[ArrayLike], captions: Sequence[str]) -> None:
        """Shows each image below its caption, in windows named "`window` 1", "`window` 2" and so on.

        images: RGB uint8, `[N, 3, H, W]` or N times `[3, H, W]` of any sizes, such as strips of image, ground truth
        and prediction. Raises ValueError for another type or shape, or if there are not N captions.
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
        """Sends what is left and makes the server save it to disk, in bounded time; later calls do nothing.

        This takes a second if the server does not answer, and at most 5 s if it answers slowly.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        start = now = time.monotonic()
        while self._thread.is_alive() and not self._trouble:
            if now > min(start + FLUSH_SECONDS, max(start, self._answered) + GRACE_SECONDS):
                self._trouble = "the server did not accept the last updates in time"
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
        if self._trouble and not self._warned:
            self._warned = True
            log.warning(f"the dashboard is off, training is not affected: {self._trouble}")

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
            # Otherwise a restart of the server loses everything.
            self._try(partial(vis.save, [env]))
        except Exception as error:  # whatever happened, training goes on
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
        # One request with all lines in full: an append takes two, is slower, and lacks what a restart has lost.
        with self._changed:
            lines = {name: np.array(_thin(line)) for name, line in self._lines[window].items()}
        points = np.concatenate(list(lines.values()))  # [N,2]
        # Infinity is not JSON and would break the page.
        points[~np.isfinite(points)] = np.nan
        labels = np.repeat(np.arange(len(lines)) + 1, [len(line) for line in lines.values()])  # [N]
        # Markers show each of a few points, such as one per validation; a single point would be invisible without.
        mode = "lines+markers" if len(points) <= 50 * len(lines) else "lines"
        opts = {"title": window, "legend": list(lines), "xlabel": "iteration", "mode": mode, "markersize": 5}
        # The title is shown only on the window's bar: in the plot, buttons would cover it.
        opts |= {"ylabel": window, "margintop": 30, "layoutopts": {"plotly": {"title": ""}}}
        vis.scatter(points, labels, win=window, opts=opts)


def _thin(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keeps every 1st, 2nd, 4th ... point and the last one, at most MAX_POINTS in total."""
    stride = 1
    while len(line) > (MAX_POINTS - 1) * stride:
        # Doubled, so that a growing line keeps points that were shown before.
        stride *= 2
    return line[:-1:stride] + line[-1:]


def _cell(tag: str, value: object) -> str:
    style = "border: 1px solid #ccc; padding: 2px 6px" + "; background: #eee" * (tag == "th")
    return f'<{tag} style="{style}">{_text(value)}</{tag}>'


def _text(value: object) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _send_image(window: str, image: np.ndarray, caption: str, vis: Any) -> None:
    height, width = image.shape[1:]
    shown = min(width, IMAGE_WIDTH)
    # The caption goes into the title because visdom draws its own captions twice, and across the image.
    opts = {"title": f"{window}: {caption}", "width": shown, "height": height * shown // width}
    # JPEG, because PNG takes 13 times as long and 6 times the bytes.
    vis.image(image, win=window, opts=opts | {"jpgquality": 90})


def _connect(port: int, env: str) -> Any:
    """Creates a visdom client that limits and checks every request; nothing is sent yet."""
    try:
        import visdom  # here, because it is slow: only runs with a dashboard wait, and not on their main thread
    except ImportError as error:
        raise RuntimeError(f"visdom cannot be imported ({error}); pip install visdom") from error

    class Client(visdom.Visdom):
        def _handle_post(self, url: str, data: Any = None) -> str:
            # Otherwise HTTP_PROXY is used even for 127.0.0.1.
            self.session.trust_env = False
            try:
                answer = self.session.post(url, data, timeout=POST_SECONDS, allow_redirects=False)
            except OSError as error:  # the base of all errors of requests
                problem = f"no answer from 127.0.0.1:{port} ({type(error).__name__})"
                raise RuntimeError(f"{problem}; see docs/dashboard.md for starting the server") from error
            if answer.status_code != 200:
                raise RuntimeError(f"{url} answered {answer.status_code}; is it visdom's server?")
            return answer.text

    # It logs every session that it opens.
    logging.getLogger("visdom").setLevel(logging.CRITICAL)
    # Without `send` the constructor contacts no server and starts no thread.
    client = Client("http://127.0.0.1", port=port, env=env, send=False, use_incoming_socket=False)
    client.send = True
    return client


class TensorBoard(Dashboard):
    """Writes event files to a folder, for `tensorboard --logdir`. If that fails, it gives up with one warning.

    resumed_at: the iteration of the checkpoint that the run resumes from. Later events in older files are hidden.
    """

    def __init__(self, folder: Path, *, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, because only runs with --tensorboard need it

        self._folder, self._itr, self._failed = folder, resumed_at, False
        self._writer = SummaryWriter(folder, purge_step=resumed_at + 1)

    def start(self, options: dict[str, object], rows: Sequence[dict[str, float]]) -> None:
        """Writes the options of a run; the rows of its history are in the earlier files."""
        super().start(options, [])

    def validation(self, *arguments: Any) -> None:
        """Does the same as `Dashboard.validation`, and writes everything to the disk."""
        super().validation(*arguments)
        self._try(self._writer.flush)

    def curve(self, window: str, x: ArrayLike, y: ArrayLike, *, name: str) -> None:
        """Appends points to the curve "`window`/`name`"; x is the iteration."""
        for itr, value in zip(np.atleast_1d(x), np.atleast_1d(y), strict=True):
            self._itr = int(itr)
            self._try(self._writer.add_scalar, f"{window}/{name}".replace(" ", "_"), value, self._itr)

    def table(self, window: str, rows: Iterable[Sequence[object]], *, header: Sequence[object] = ()) -> None:
        """Writes a table in Markdown, for the iteration of the last point."""
        lines = [[_text(cell).replace("|", "&#124;") for cell in row] for row in [header, *rows]]
        lines.insert(1, ["---"] * len(header))
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self._try(self._writer.add_text, window, text, self._itr)

    def images(self, window: str, images: Sequence[ArrayLike], captions: Sequence[str]) -> None:
        """Writes images, RGB uint8 `[3, H, W]`, for the iteration of the last point."""
        for image, caption in zip(images, captions, strict=True):
            self._try(self._writer.add_image, f"{window}/{caption}", np.asarray(image), self._itr)

    def close(self) -> None:
        """Writes what is left to the disk."""
        self._try(self._writer.close)

    def _try(self, write: Callable[..., object], *arguments: object) -> None:
        try:
            if not self._failed:
                write(*arguments)
        except OSError as error:
            self._failed = True
            log.warning(f"the dashboard is off, training is not affected: {cannot_write(self._folder, error)}")


class Dashboards:
    """Passes a run on to any number of dashboards; without one, every method does nothing."""

    def __init__(self, *dashboards: Dashboard) -> None:
        self._all = dashboards

    def start(self, options: dict[str, object], rows: Sequence[dict[str, float]]) -> None:
        for dashboard in self._all:
            dashboard.start(options, rows)

    def step(self, itr: int, loss: float, lr: float) -> None:
        for dashboard in self._all:
            dashboard.step(itr, loss, lr)

    def validation(self, *arguments: Any) -> None:
        for dashboard in self._all:
            dashboard.validation(*arguments)

    def close(self) -> None:
        for dashboard in self._all:
            dashboard.close()


def open_dashboards(opts: Namespace, folder: Path, *, resumed_at: int) -> Dashboards:
    """Opens the dashboards that the flags name, without delay; call `close()` when training ends.

    folder, resumed_at: as for `TensorBoard`.
    """
    dashboards: list[Dashboard] = [Visualizer(opts.vis_port, opts.vis_env)] if opts.enable_vis else []
    if opts.tensorboard:
        dashboards.append(TensorBoard(folder, resumed_at=resumed_at))
    return Dashboards(*dashboards)
