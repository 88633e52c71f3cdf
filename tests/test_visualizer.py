"""Tests the dashboard against a real visdom server, and against every way in which a server can fail."""

import base64
import csv
import errno
import http.server
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, TENSORS, EventAccumulator

import main
from tests.conftest import TINY
from utils import visualizer
from utils.visualizer import TensorBoard, Visualizer

ROOT = Path(__file__).parents[1]
# visdom imports torch if it finds it; without torch a process starts in a fraction of the time.
NO_TORCH = """
import sys
class NoTorch:
    def find_spec(name, *_):
        if name == "torch":
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch)
"""
SERVER = f"""{NO_TORCH}
from visdom.server.run_server import start_server
place = {{"port": int(sys.argv[1]), "hostname": "127.0.0.1", "base_url": "", "bind_local": True}}
start_server(**place, env_path=sys.argv[2])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], object], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.02)


def accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def visdom_server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", SERVER, str(port), str(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as process:
        try:
            wait_until(lambda: accepts(port))
            yield process
        finally:
            process.kill()  # ends a stopped process too


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with visdom_server(tmp_path_factory.mktemp("visdom"), port):
        yield port


@pytest.fixture(autouse=True)
def warnings() -> Iterator[list[str]]:
    """The warnings that are logged, whatever other tests have done to the logger."""
    messages, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("deeplab")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the thread's pauses between sends and tries, to save time."""
    monkeypatch.setattr(visualizer, "SEND_SECONDS", 0.1)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keeps the thread from sending anything until this event is set."""
    connect, event = visualizer._connect, threading.Event()
    monkeypatch.setattr(visualizer, "_connect", lambda *address: event.wait() and connect(*address))
    return event


@pytest.fixture
def build(port: int, request: pytest.FixtureRequest) -> Callable[[], Visualizer]:
    """Builds a dashboard on the healthy server, in an environment named after the test."""
    return lambda: Visualizer(port, request.node.name)


@pytest.fixture
def windows(port: int, request: pytest.FixtureRequest) -> Callable[[], dict]:
    """Reads the windows in the test's environment on the server, by name."""
    return lambda: read_windows(port, request.node.name)


def read_windows(port: int, env: str) -> dict:
    body = json.dumps({"win": None, "eid": env}).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/win_data", body, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError:  # nothing has been sent to this environment yet
        return {}


def traces(window: dict) -> dict[str, tuple[list, list]]:
    return {trace["name"]: (trace["x"], trace["y"]) for trace in window["content"]["data"]}


def pixels(window: dict) -> np.ndarray:
    encoded = window["content"]["src"].split("base64,")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).astype(int)  # [H,W,3]


def test_curves_arrive_by_name_with_gaps_for_values_that_are_not_finite(build, windows, warnings):
    board = build()
    board.curve("loss", 10, 0.75, name="loss")
    board.curve("loss", [20, 30], [0.5, float("nan")], name="loss")
    board.curve("loss", np.array([40, 50]), torch.tensor([float("inf"), 0.25]), name="loss")
    board.curve("accuracy", 100, torch.tensor(0.5), name="overall")
    board.curve("accuracy", 100, 0.25, name="mean")
    board.curve("accuracy", 200, 0.625, name="overall")
    board.curve("accuracy", [], [], name="nothing")
    board.close()
    assert traces(windows()["loss"]) == {"loss": ([10, 20, 30, 40, 50], [0.75, 0.5, None, None, 0.25])}
    assert traces(windows()["accuracy"]) == {"overall": ([100, 200], [0.5, 0.625]), "mean": ([100], [0.25])}
    assert windows()["loss"]["title"] == "loss"
    layout = windows()["loss"]["content"]["layout"]
    assert (layout["xaxis"]["title"], layout["yaxis"]["title"]) == ("iteration", "loss")
    assert warnings == []


def test_points_reach_the_server_during_training(build, windows):
    board = build()
    board.curve("loss", 1, 0.5, name="loss")
    wait_until(lambda: "loss" in windows())
    board.curve("loss", 2, 0.25, name="loss")
    wait_until(lambda: traces(windows()["loss"]) == {"loss": ([1, 2], [0.5, 0.25])})
    board.close()


def test_a_later_run_replaces_the_windows(build, windows):
    for start in (1, 5):
        board = build()
        board.curve("loss", [start, start + 1], [0.5, 0.25], name=f"from {start}")
        board.close()
    assert traces(windows()["loss"]) == {"from 5": ([5, 6], [0.5, 0.25])}


def test_a_long_curve_is_thinned_evenly_and_keeps_its_first_and_last_point(build, windows):
    board, count = build(), 10 * visualizer.MAX_POINTS + 3
    for start in range(0, count, 1000):
        x = np.arange(start, min(start + 1000, count))
        board.curve("loss", x, 2.0 * x, name="loss")
    board.close()
    x, y = traces(windows()["loss"])["loss"]
    assert visualizer.MAX_POINTS / 2 <= len(x) <= visualizer.MAX_POINTS
    assert (x[0], x[-1]) == (0, count - 1)
    assert set(np.diff(x[:-1])) == {16} and 0 < x[-1] - x[-2] <= 16
    assert y == [2 * value for value in x]


def test_a_curve_that_still_fits_is_not_thinned():
    line = [(float(i), 0.0) for i in range(visualizer.MAX_POINTS - 1)]
    assert visualizer._thin(line) == line


def test_a_growing_curve_keeps_the_points_that_it_has_shown():
    line = [(float(i), 0.0) for i in range(9 * visualizer.MAX_POINTS)]
    shorter, longer = visualizer._thin(line[:-1000]), visualizer._thin(line)
    assert shorter[:-1] == longer[: len(shorter) - 1]


def test_a_table_shows_its_cells_and_escapes_them(build, windows):
    board = build()
    board.table("IoU", [("background", 0.93125), ("<b>cat</b> & dog", float("nan"))], header=("class", "IoU"))
    board.table("options", [("lr", 5e-05), ("model", "deeplabv3plus_resnet50")])
    board.close()
    content = windows()["IoU"]["content"]
    cells = [cell.split(">", 1)[1] for cell in content.replace("</td>", "</th>").split("</th>")[:-1]]
    assert [cell.rsplit(">", 1)[-1] for cell in cells] == [
        *("class", "IoU", "background", "0.9313", "&lt;b&gt;cat&lt;/b&gt; &amp; dog", "nan")
    ]
    assert content.count("<tr>") == 3 and content.count("<th ") == 2 and "<b>" not in content
    assert windows()["IoU"]["type"] == "text"
    options = windows()["options"]["content"]
    assert ">5e-05<" in options and options.count("<tr>") == 2 and "<th" not in options


def test_images_of_different_sizes_arrive_in_their_colours_under_their_captions(build, windows, held):
    board = build()
    red, wide = torch.zeros(3, 40, 60, dtype=torch.uint8), np.full((3, 20, 1600), 90, np.uint8)
    red[0] = 200
    board.images("sample", [red, wide], ["first <id>", "second"])
    red[:] = 0  # the caller may reuse its buffer
    held.set()
    board.close()
    first, second = windows()["sample 1"], windows()["sample 2"]
    assert [first["title"], second["title"]] == ["sample 1: first <id>", "sample 2: second"]
    assert pixels(first).shape == (40, 60, 3) and pixels(second).shape == (20, 1600, 3)
    assert np.abs(pixels(first) - [200, 0, 0]).max() <= 5 and np.abs(pixels(second) - 90).max() <= 5
    assert (second["width"], second["height"]) == (700, 8)  # on the page


def test_a_batch_of_images_is_accepted_too(build, windows):
    board, batch = build(), torch.full((2, 3, 8, 8), 10, dtype=torch.uint8)
    batch[1] = 250
    board.images("sample", batch, ["dark", "light"])
    board.close()
    assert np.abs(pixels(windows()["sample 1"]) - 10).max() <= 3
    assert np.abs(pixels(windows()["sample 2"]) - 250).max() <= 3


def test_close_saves_for_a_restart_of_the_server_and_ends_the_thread(tmp_path, warnings):
    port = free_port()
    with visdom_server(tmp_path, port):
        board = Visualizer(port, "kept")
        board.curve("loss", [1, 2], [0.5, 0.25], name="loss")
        board.close()
        board.curve("loss", 3, 0.125, name="loss")
        board.close()
        assert not board._thread.is_alive()
    with visdom_server(tmp_path, port):
        assert traces(read_windows(port, "kept")["loss"]) == {"loss": ([1, 2], [0.5, 0.25])}
    assert warnings == []


def test_a_proxy_in_the_environment_is_not_asked(build, windows, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    board = build()
    board.curve("loss", 1, 0.5, name="loss")
    board.close()
    assert traces(windows()["loss"]) == {"loss": ([1], [0.5])}


@contextmanager
def answering(statuses: Iterator[int]) -> Iterator[tuple[int, list[bytes]]]:
    """Runs an HTTP server that answers with one status after the other. Yields its port and the posted bodies."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(next(statuses))
            self.send_header("Location", "/login")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.server_port, bodies
    finally:
        server.shutdown()
        server.server_close()


def always(status: int) -> Iterator[int]:
    return iter(lambda: status, None)


@contextmanager
def failing_server(kind: str, folder: Path) -> Iterator[int]:
    if kind == "missing":
        yield free_port()
    elif kind.isdigit():
        with answering(always(int(kind))) as (port, _):
            yield port
    elif kind == "stopped":
        port = free_port()
        with visdom_server(folder, port) as process:
            process.send_signal(signal.SIGSTOP)
            yield port
    else:  # a socket that nobody serves: the kernel accepts connections until its backlog is full
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(0 if kind == "full" else 8)
            waiting = [socket.socket() for _ in range(4)] if kind == "full" else []
            for client in waiting:
                client.setblocking(False)
                client.connect_ex(server.getsockname())
            if kind == "dripping":
                threading.Thread(target=drip, args=(server,), daemon=True).start()
            yield server.getsockname()[1]
            for client in waiting:
                client.close()


def drip(server: socket.socket) -> None:
    """Answers the first connection with a byte now and then, for longer than anyone should wait."""
    client, _ = server.accept()
    with client:
        for _ in range(100):
            client.send(b"x")
            time.sleep(0.1)


KINDS = ["missing", "hanging", "dripping", "stopped", "full", "500", "403", "404", "302"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_fails_costs_a_second_and_one_warning(kind, tmp_path, warnings, capfd):
    with failing_server(kind, tmp_path) as port:
        start = time.monotonic()
        board = Visualizer(port, "main")
        for itr in range(1000):
            board.curve("loss", itr, 0.5, name="loss")
        board.table("IoU", [("cat", 0.5)])
        board.images("sample", np.zeros((2, 3, 64, 64), np.uint8), ["a", "b"])
        called = time.monotonic() - start
        board.close()
        board.close()
        total = time.monotonic() - start
        assert called < 0.5 and total < 1.5  # with some slack for a busy machine
    assert len(warnings) == 1 and warnings[0].startswith("the dashboard is off, training is not affected: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no answer from 127.0.0.1:{port} (ConnectionError); see docs/dashboard.md"),
        ("hanging", "no answer from 127.0.0.1:{port} (ReadTimeout); see docs/dashboard.md"),
        ("500", "http://127.0.0.1:{port}/events answered 500; is it visdom's server?"),
    ],
)
def test_the_warning_comes_during_training_and_says_why(kind, reason, tmp_path, warnings, hurried):
    with failing_server(kind, tmp_path) as port:
        board = Visualizer(port, "main")

        def warned() -> bool:
            board.curve("loss", 1, 0.5, name="loss")
            return bool(warnings)

        wait_until(warned)
        start = time.monotonic()
        board.close()
        assert time.monotonic() - start < 0.5  # there is nothing left to wait for
    assert board._pending == {}
    assert len(warnings) == 1 and reason.format(port=port) in warnings[0]


def test_a_server_killed_during_training_costs_one_warning(tmp_path, warnings, capfd, hurried):
    port, waited = free_port(), 0.0
    with visdom_server(tmp_path, port) as process:
        board = Visualizer(port, "main")
        board.curve("loss", 0, 0.5, name="loss")
        wait_until(lambda: "loss" in read_windows(port, "main"))
        process.kill()
        process.wait()
        for itr in range(1000):
            start = time.monotonic()
            board.curve("loss", itr, 0.5, name="loss")
            waited += time.monotonic() - start
            time.sleep(0.001)
        start = time.monotonic()
        board.close()
        waited += time.monotonic() - start
    assert waited < 1.6
    assert len(warnings) == 1 and "no answer" in warnings[0]
    assert capfd.readouterr() == ("", "")


def test_a_server_that_fails_twice_is_tried_again_and_nothing_is_lost(warnings, hurried):
    with answering(iter([500, 500, *[200] * 9])) as (port, bodies):
        board = Visualizer(port, "main")
        board.curve("loss", [1, 2], [0.5, 0.25], name="loss")
        wait_until(lambda: len(bodies) == 3)
        board.close()
    (trace,) = json.loads(bodies[2])["data"]
    assert (trace["x"], trace["y"]) == ([1, 2], [0.5, 0.25])
    assert json.loads(bodies[-1])["data"] == ["main"]  # the environment to save
    assert warnings == []


def test_unsent_images_give_way_to_newer_ones(held, warnings):
    with answering(always(200)) as (port, bodies):
        board = Visualizer(port, "main")
        for step in range(5):
            board.images("sample", np.zeros((1, 3, 8, 8), np.uint8), [f"step {step}"])
        held.set()
        board.close()
    assert [json.loads(body)["opts"]["title"] for body in bodies[:-1]] == ["sample 1: step 4"]
    assert warnings == []


def slowly() -> Iterator[int]:
    while True:
        time.sleep(0.1)
        yield 200


def test_close_waits_for_a_server_that_answers_slowly(warnings, monkeypatch):
    monkeypatch.setattr(visualizer, "GRACE_SECONDS", 0.3)
    with answering(slowly()) as (port, bodies):
        board = Visualizer(port, "main")
        for number in range(6):
            board.curve(f"loss {number}", 1, 0.5, name="loss")
        board.close()
    assert len(bodies) == 7 and warnings == []  # with the save


def test_close_does_not_wait_forever_for_a_server_that_answers_slowly(warnings, monkeypatch):
    monkeypatch.setattr(visualizer, "FLUSH_SECONDS", 0.5)
    with answering(slowly()) as (port, _):
        board = Visualizer(port, "main")
        for number in range(20):
            board.curve(f"loss {number}", 1, 0.5, name="loss")
        start = time.monotonic()
        board.close()
        assert time.monotonic() - start < 1.5
    assert len(warnings) == 1 and warnings[0].endswith("the server did not accept the last updates in time")


def test_a_slow_import_of_visdom_is_not_mistaken_for_a_silent_server(build, windows, warnings, monkeypatch):
    connect = visualizer._connect
    monkeypatch.setattr(visualizer, "_connect", lambda *address: time.sleep(0.5) or connect(*address))
    monkeypatch.setattr(visualizer, "GRACE_SECONDS", 0.2)
    board = build()
    board.curve("loss", 1, 0.5, name="loss")
    board.close()
    assert traces(windows()["loss"]) == {"loss": ([1], [0.5])} and warnings == []


@pytest.mark.parametrize(
    ("kind", "closing", "expected"), [("hanging", "", 0), ("hanging", "board.close()", 1), ("200", "", 0)]
)
def test_a_process_ends_whatever_its_server_does(kind, closing, expected, tmp_path):
    code = f"""{NO_TORCH}
import logging, time
from utils.visualizer import Visualizer
logging.basicConfig(stream=sys.stdout, format="%(message)s")
board = Visualizer(int(sys.argv[1]), "main")
board.curve("loss", 1, 0.5, name="loss")
time.sleep(0.7)  # into the middle of a request
{closing}
print("trained")
"""
    with failing_server(kind, tmp_path) as port:
        process = subprocess.run(
            [sys.executable, "-c", code, str(port)], cwd=ROOT, capture_output=True, text=True, timeout=15
        )
    assert (process.returncode, process.stderr) == (0, "")
    *warnings, last = process.stdout.splitlines()
    assert len(warnings) == expected and last == "trained"


def test_without_visdom_there_is_one_warning(monkeypatch, warnings):
    monkeypatch.setitem(sys.modules, "visdom", None)
    board = Visualizer(free_port(), "main")
    board.curve("loss", 1, 0.5, name="loss")
    board.close()
    assert len(warnings) == 1 and "pip install visdom" in warnings[0]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda board: board.curve("loss", [1, 2], [0.5], name="loss"), r"x \(2,\) and y \(1,\)"),
        (lambda board: board.curve("loss", [[1]], [[0.5]], name="loss"), r"x \(1, 1\)"),
        (lambda board: board.images("s", np.zeros((1, 3, 4, 4)), ["a"]), r"float64 \[3, 4, 4\]"),
        (lambda board: board.images("s", np.zeros((1, 4, 4, 3), np.uint8), ["a"]), r"uint8 \[4, 4, 3\]"),
        (lambda board: board.images("s", np.zeros((2, 3, 4, 4), np.uint8), ["a"]), "2 images but 1 captions"),
    ],
)
def test_unusable_values_are_refused_at_once(draw, message, build):
    board = build()
    with pytest.raises(ValueError, match=message):
        draw(board)
    board.close()


def test_without_a_flag_there_is_no_dashboard_and_nothing_is_imported():
    code = """
import sys, threading
from argparse import Namespace
from pathlib import Path
from utils.visualizer import open_dashboards
board = open_dashboards(Namespace(enable_vis=False, tensorboard=False), Path("tb"), resumed_at=0)
board.start({}, [])
board.step(1, 0.5, 0.1)
board.validation({}, [], [], {})
board.close()
print({"visdom", "requests", "torch", "tensorboard"} & sys.modules.keys(), threading.active_count())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("set() 1\n", "")


def test_a_resumed_run_shows_everything_from_the_start(folder: Path, tmp_path: Path, port: int) -> None:
    data = ["--dataset", "folder", "--data_root", str(folder), "--run_dir", str(tmp_path), "--run_name", "a"]
    vis = ["--enable_vis", "--vis_port", str(port), "--vis_env", "run", "--vis_num_samples", "2"]
    main.main([*data, *TINY, *vis, "--total_itrs", "2"])
    main.main([*data, *TINY, *vis, "--total_itrs", "4", "--continue_training"])
    shown = read_windows(port, "run")
    lines = {line["name"]: line for line in shown["validation"]["content"]["data"]}
    assert set(lines) == {"Mean IoU", "Overall Acc", "Mean Acc", "FreqW Acc"}
    assert lines["Mean IoU"]["x"] == [2, 4]
    losses = {line["name"]: line["x"] for line in shown["loss"]["content"]["data"]}
    means = {"mean since the last validation": [2, 4], "validation cross-entropy": [2, 4]}
    assert losses == {"training": [3, 4]} | means
    assert "car" in shown["class IoU"]["content"] and "total_itrs" in shown["options"]["content"]
    assert {"sample 1", "sample 2", "learning rate"} <= shown.keys() and "sample 3" not in shown


def test_training_without_a_server_warns_once_and_gives_the_same_scores(folder: Path, tmp_path: Path, capsys) -> None:
    data = ["--dataset", "folder", "--data_root", str(folder), "--run_dir", str(tmp_path), *TINY, "--total_itrs", "4"]
    plain = main.main([*data, "--run_name", "plain"])
    capsys.readouterr()
    scores = main.main([*data, "--run_name", "vis", "--enable_vis", "--vis_port", str(free_port())])
    out = capsys.readouterr().out
    assert scores == plain
    assert out.count("the dashboard is off") == 1


# --- TensorBoard ---


@pytest.fixture
def tb(folder: Path, tmp_path: Path) -> Callable[..., EventAccumulator]:
    """Trains the run `a` with --tensorboard; returns what TensorBoard shows of it."""

    def train(*arguments: object) -> EventAccumulator:
        data = ["--dataset", "folder", "--data_root", str(folder), "--run_dir", str(tmp_path), "--run_name", "a"]
        main.main([*data, *TINY, "--tensorboard", "--vis_num_samples", "2", *map(str, arguments)])
        events = EventAccumulator(str(tmp_path / "a/tb"), size_guidance={TENSORS: 0, SCALARS: 0, IMAGES: 0})
        return events.Reload()

    return train


def text(events: EventAccumulator, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]


def test_tensorboard_shows_curves_tables_and_strips(tb, tmp_path):
    events = tb("--total_itrs", 4)
    validations = {"loss/mean_since_the_last_validation", "loss/validation_cross-entropy"}
    validations |= {f"validation/{name}" for name in ("Overall_Acc", "Mean_Acc", "FreqW_Acc", "Mean_IoU")}
    steps = {"loss/training", "learning_rate/head"}
    assert set(events.Tags()["scalars"]) == validations | steps
    for tags, expected in ((steps, [1, 2, 3, 4]), (validations, [2, 4])):
        assert all([event.step for event in events.Scalars(tag)] == expected for tag in tags)
    with (tmp_path / "a/history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for tag, column in (("validation/Mean_IoU", "mean_iou"), ("loss/validation_cross-entropy", "val_loss")):
        shown = [event.value for event in events.Scalars(tag)]
        assert shown == pytest.approx([float(row[column]) for row in rows], rel=1e-6)
    (options,), tables = text(events, "options"), text(events, "class IoU")
    assert options.startswith("| option | value |\n| --- | --- |\n") and "| total_itrs | 4 |" in options
    assert len(tables) == 2 and all(f"\n| {name} | " in tables[-1] for name in ("sky", "road", "tree", "car"))
    assert set(events.Tags()["images"]) == {"sample/b1", "sample/b2"}
    image = events.Images("sample/b2")[-1]
    strip = Image.open(io.BytesIO(image.encoded_image_string))
    assert (image.step, strip.size, strip.mode) == (4, (3 * 40, 52), "RGB")


def test_tensorboard_hides_what_a_resumed_run_does_again(tb, tmp_path, monkeypatch):
    tb("--total_itrs", 2)
    latest = (tmp_path / "a/latest.pth").read_bytes()
    tb("--total_itrs", 6, "--continue_training")
    (tmp_path / "a/latest.pth").write_bytes(latest)
    events = tb("--total_itrs", 4, "--continue_training", "--lr", 0.01)
    assert [event.step for event in events.Scalars("loss/training")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("validation/Mean_IoU")] == [2, 4]
    assert [event.value for event in events.Scalars("learning_rate/head")] == pytest.approx([0.05] * 2 + [0.01] * 2)


def test_tensorboard_escapes_what_would_end_a_cell(tmp_path):
    board = TensorBoard(tmp_path, resumed_at=0)
    board.table("class IoU", [("<b>cat</b> | dog", 0.93125)], header=("class", "IoU"))
    board.close()
    (table,) = text(EventAccumulator(str(tmp_path)).Reload(), "class IoU")
    assert table.splitlines()[2] == "| &lt;b&gt;cat&lt;/b&gt; &#124; dog | 0.9313 |"


def test_without_tensorboard_one_line_names_the_package_and_nothing_is_written(tb, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        tb("--total_itrs", 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--tensorboard: " in line and line.endswith("pip install tensorboard")
    assert not (tmp_path / "a").exists()


def test_event_files_that_cannot_be_written_cost_one_warning(tb, monkeypatch, warnings):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    tb("--total_itrs", 4)
    assert len(warnings) == 1 and "a/tb: cannot be written (No space left on device)" in warnings[0]


def test_both_dashboards_show_a_run(tb, port):
    events = tb("--total_itrs", 2, "--enable_vis", "--vis_port", port, "--vis_env", "both")
    shown = read_windows(port, "both")
    assert traces(shown["loss"])["training"][0] == [event.step for event in events.Scalars("loss/training")] == [1, 2]
    assert "sample 2" in shown and "sample/b2" in events.Tags()["images"]
