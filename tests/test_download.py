"""`download_voc` against a local server: no test contacts another host."""

import errno
import hashlib
import random
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest
from torchvision.datasets.voc import DATASET_YEAR_DICT

from datasets.prepare import download
from datasets.prepare.download import download_voc
from utils.errors import InputError

NAME = DATASET_YEAR_DICT["2012"]["filename"]
FILES = {
    "JPEGImages/a.jpg": random.Random(0).randbytes(200_000),
    "SegmentationClass/a.png": b"mask",
    "ImageSets/Segmentation/train.txt": b"a\n",
}
CUT = 70_000  # bytes sent first by servers that break off


def make_tar(files: dict[str, bytes], prefix: str = "VOCdevkit/VOC2012/") -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return buffer.getvalue()


TAR = make_tar(FILES)


class Server(ThreadingHTTPServer):
    """Sends `content`; the first part of the URL selects how, see `Handler.do_GET`."""

    daemon_threads, block_on_close = True, False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.release, self.requests = TAR, threading.Event(), []

    def url(self, behaviour: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{behaviour}/{NAME}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        behaviour, asked = self.path.split("/")[1], self.headers["Range"]
        self.server.requests.append((behaviour, asked))
        if behaviour == "hang":
            self.server.release.wait(10)
            return
        if behaviour == "missing":
            return self.send_error(404)
        body = self.server.content[::-1] if behaviour == "wrong" else self.server.content
        start = 0 if asked is None or "norange" in behaviour else int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if behaviour != "nolength":
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", "text/html" if behaviour == "page" else "application/x-tar")
        self.end_headers()
        cut = behaviour == "alwayscut" or ("cut" in behaviour and start == 0)
        end = start + CUT if cut else CUT if behaviour == "stall" else None
        self.wfile.write(body[start:end])
        if behaviour == "stall":
            self.server.release.wait(10)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    expect(monkeypatch, TAR)
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def expect(monkeypatch: pytest.MonkeyPatch, content: bytes) -> str:
    """Makes `content` match torchvision's md5."""
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setitem(DATASET_YEAR_DICT["2012"], "md5", md5)
    return md5


def assert_complete(root: Path) -> None:
    voc = root / "VOCdevkit" / "VOC2012"
    found = {str(p.relative_to(voc)): p.read_bytes() for p in voc.rglob("*") if p.is_file()}
    assert found == FILES
    assert [p.name for p in (root / "VOCdevkit").iterdir()] == ["VOC2012"]
    assert not (root / f"{NAME}.part").exists()


def test_fetches_and_extracts_with_one_request(server, tmp_path):
    root = tmp_path / "deep" / "root"
    assert download_voc(root, sources=[server.url("good")]) == root / "VOCdevkit" / "VOC2012"
    assert_complete(root)
    assert (root / NAME).read_bytes() == TAR
    assert server.requests == [("good", None)]


def test_a_complete_folder_needs_no_request_no_hash_no_extraction_and_no_write(server, tmp_path, monkeypatch):
    download_voc(tmp_path, sources=[server.url("good")])
    image = tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / "a.jpg"
    before = image.stat().st_mtime_ns, image.stat().st_ino
    (tmp_path / NAME).write_bytes(b"no longer the tar")
    (tmp_path / f"{NAME}.lock").unlink(missing_ok=True)
    monkeypatch.setattr(download, "calculate_md5", lambda path: pytest.fail("hashed"))
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("extracted"))
    download_voc(tmp_path, sources=[server.url("good")])
    assert (image.stat().st_mtime_ns, image.stat().st_ino) == before
    assert len(server.requests) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["VOCdevkit", NAME])


def test_the_augmented_year_fetches_the_same_tar_and_other_years_are_refused(server, tmp_path):
    download_voc(tmp_path / "aug", "2012_aug", sources=[server.url("good")])
    assert_complete(tmp_path / "aug")
    with pytest.raises(InputError, match=r"--year 2007.*2012 and 2012_aug"):
        download_voc(tmp_path / "other", "2007", sources=[server.url("good")])
    assert not (tmp_path / "other").exists()


def test_an_existing_tar_is_used_without_a_request(server, tmp_path):
    (tmp_path / NAME).write_bytes(TAR)
    download_voc(tmp_path, sources=[server.url("good")])
    assert_complete(tmp_path)
    assert server.requests == []


def test_a_tar_with_the_wrong_md5_is_refused_and_kept(server, tmp_path):
    (tmp_path / NAME).write_bytes(TAR[:-1])
    with pytest.raises(InputError) as caught:
        download_voc(tmp_path, sources=[server.url("good")])
    for part in (
        str(tmp_path / NAME),
        *(hashlib.md5(t).hexdigest() for t in (TAR, TAR[:-1])),
        "delete it",
        ".part",
    ):
        assert part in str(caught.value)
    assert (tmp_path / NAME).read_bytes() == TAR[:-1]
    assert server.requests == [] and not (tmp_path / "VOCdevkit").exists()


def test_a_partial_download_of_an_earlier_run_is_completed_by_requesting_only_the_rest(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(TAR[:12_345])
    download_voc(tmp_path, sources=[server.url("good")])
    assert_complete(tmp_path)
    assert server.requests == [("good", "bytes=12345-")]


def test_a_broken_connection_is_resumed_from_the_same_source(server, tmp_path):
    download_voc(tmp_path, sources=[server.url("cut"), server.url("good")])
    assert_complete(tmp_path)
    assert server.requests == [("cut", None), ("cut", f"bytes={CUT}-")]


def test_a_connection_that_breaks_again_and_again_still_completes(server, tmp_path):
    download_voc(tmp_path, sources=[server.url("alwayscut")])
    assert_complete(tmp_path)
    assert server.requests == [("alwayscut", f"bytes={n}-" if n else None) for n in range(0, len(TAR), CUT)]


def test_a_server_that_ignores_range_is_read_from_the_start(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 12_345)
    download_voc(tmp_path, sources=[server.url("norange")])
    assert_complete(tmp_path)
    assert server.requests == [("norange", "bytes=12345-")]


def test_a_server_that_ignores_range_and_always_breaks_off_is_given_up(server, tmp_path):
    with pytest.raises(InputError, match=f"stopped at byte {CUT} of {len(TAR)}"):
        download_voc(tmp_path, sources=[server.url("cut-norange")])
    assert len(server.requests) == 2


def test_a_server_that_sends_no_length_is_checked_by_md5(server, tmp_path):
    download_voc(tmp_path, sources=[server.url("nolength")])
    assert_complete(tmp_path)


def test_a_part_that_is_complete_is_accepted_when_the_server_answers_416(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(TAR)
    download_voc(tmp_path, sources=[server.url("good")])
    assert_complete(tmp_path)
    assert server.requests == [("good", f"bytes={len(TAR)}-")]


@pytest.mark.parametrize("junk", [b"x" * 100, b"x" * (len(TAR) + 1)], ids=["shorter", "longer"])
def test_a_part_with_wrong_bytes_is_discarded_and_the_same_source_read_from_its_start(server, tmp_path, junk):
    (tmp_path / f"{NAME}.part").write_bytes(junk)
    download_voc(tmp_path, sources=[server.url("good")])
    assert_complete(tmp_path)
    assert server.requests == [("good", f"bytes={len(junk)}-"), ("good", None)]


def test_a_source_with_the_wrong_md5_is_followed_by_the_next_from_its_start(server, tmp_path):
    download_voc(tmp_path, sources=[server.url("wrong"), server.url("good")])
    assert_complete(tmp_path)
    assert server.requests == [("wrong", None), ("good", None)]


def test_a_web_page_does_not_replace_an_earlier_part(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(TAR[:1000])
    download_voc(tmp_path, sources=[server.url("page"), server.url("good")])
    assert_complete(tmp_path)
    assert server.requests == [("page", "bytes=1000-"), ("good", "bytes=1000-")]


def test_a_silent_server_is_given_up_after_the_timeout(server, tmp_path):
    start = time.monotonic()
    with pytest.raises(InputError, match="timed out"):
        download_voc(tmp_path, sources=[server.url("hang")], timeout=0.2)
    assert 0.2 <= time.monotonic() - start < 2
    assert server.requests == [("hang", None)]


def test_a_transfer_that_falls_silent_is_taken_over_by_the_next_source(server, tmp_path):
    download_voc(tmp_path, sources=[server.url("stall"), server.url("good")], timeout=0.2)
    assert_complete(tmp_path)
    rest = f"bytes={CUT}-"
    assert server.requests == [("stall", None), ("stall", rest), ("good", rest)]


def test_when_all_sources_fail_one_line_names_each_with_its_reason_the_md5_and_the_folder(server, tmp_path):
    sources = [server.url("missing"), server.url("wrong"), server.url("page"), "http://127.0.0.1:1/closed"]
    with pytest.raises(InputError) as caught:
        download_voc(tmp_path, sources=sources)
    message, wrong = str(caught.value), hashlib.md5(TAR[::-1]).hexdigest()
    for url, reason in zip(sources, ("HTTP 404", f"its md5 is {wrong}", "a web page", ""), strict=True):
        assert f"{url} ({reason}" in message
    assert "Connection refused" in message
    assert hashlib.md5(TAR).hexdigest() in message and str(tmp_path) in message and NAME in message
    assert "\n" not in message
    assert not (tmp_path / NAME).exists() and not (tmp_path / "VOCdevkit").exists()


def test_the_default_sources_are_torchvisions_own_and_then_every_mirror_once(tmp_path, monkeypatch):
    asked = []

    def refuse(request, timeout):
        asked.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError, match="no network"):
        download_voc(tmp_path)
    own = DATASET_YEAR_DICT["2012"]["url"]
    assert asked[0] == own
    assert sorted(asked) == sorted({own, *(mirror + NAME for mirror in download.MIRRORS)})


@pytest.mark.parametrize("name", ["../evil", "../../evil", "VOCdevkit/../../evil"])
def test_a_member_outside_the_folder_is_refused_by_name_and_nothing_is_written(server, tmp_path, monkeypatch, name):
    root = tmp_path / "a" / "b" / "root"
    root.mkdir(parents=True)
    content = make_tar({f"VOCdevkit/VOC2012/{file}": FILES[file] for file in FILES} | {name: b"evil"}, prefix="")
    (root / NAME).write_bytes(content)
    expect(monkeypatch, content)
    with pytest.raises(InputError) as caught:
        download_voc(root, sources=[server.url("good")])
    assert name in str(caught.value) and str(root / NAME) in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        ["a", "b", "root", "VOCdevkit", NAME, f"{NAME}.lock"]
    )


def test_a_link_out_of_the_folder_is_refused(tmp_path, monkeypatch):
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("VOCdevkit/VOC2012/JPEGImages")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../../outside"
        archive.addfile(link)
    (tmp_path / NAME).write_bytes(buffer.getvalue())
    expect(monkeypatch, buffer.getvalue())
    with pytest.raises(InputError, match="VOC2012/JPEGImages"):
        download_voc(tmp_path)


@pytest.mark.parametrize(
    "content",
    [TAR[:100_000], b"not a tar" * 1000, make_tar({"JPEGImages/a.jpg": b"image"})],
    ids=["truncated", "garbage", "without masks"],
)
def test_an_unusable_tar_is_named_and_leaves_no_folder(tmp_path, monkeypatch, content):
    (tmp_path / NAME).write_bytes(content)
    expect(monkeypatch, content)
    with pytest.raises(InputError) as caught:
        download_voc(tmp_path)
    assert str(tmp_path / NAME) in str(caught.value)
    assert list((tmp_path / "VOCdevkit").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_extraction_leaves_no_folder_and_is_repeated(tmp_path, monkeypatch, error):
    (tmp_path / NAME).write_bytes(TAR)
    expect(monkeypatch, TAR)
    makefile = tarfile.TarFile.makefile

    def stop_at_the_second(self, member, target):
        if member.name.endswith(".png"):
            raise error
        makefile(self, member, target)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "makefile", stop_at_the_second)
        with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            download_voc(tmp_path)
    if isinstance(error, OSError):
        assert str(tmp_path) in str(caught.value) and "No space left" in str(caught.value)
    assert list((tmp_path / "VOCdevkit").iterdir()) == []
    download_voc(tmp_path)
    assert_complete(tmp_path)


def test_leftovers_of_a_killed_extraction_are_not_mistaken_for_the_data(tmp_path, monkeypatch):
    (tmp_path / NAME).write_bytes(TAR)
    expect(monkeypatch, TAR)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a kill cleans nothing up
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "rename", lambda *args: exit(9))
        download_voc(tmp_path)
    monkeypatch.undo()
    expect(monkeypatch, TAR)
    (left,) = (tmp_path / "VOCdevkit").iterdir()
    (left / "VOCdevkit" / "VOC2012" / "JPEGImages" / "stray.jpg").write_bytes(b"half a pict")
    download_voc(tmp_path)
    assert_complete(tmp_path)


def test_a_users_incomplete_folder_is_refused_and_left_alone(server, tmp_path):
    own = tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / "own.jpg"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"own")
    with pytest.raises(InputError, match=r"VOC2012: lacks SegmentationClass, ImageSets/Segmentation; move"):
        download_voc(tmp_path, sources=[server.url("good")])
    assert own.read_bytes() == b"own" and len(list((tmp_path / "VOCdevkit").rglob("*"))) == 3
    assert server.requests == []


def test_two_processes_that_start_together_download_and_extract_once(server, tmp_path, monkeypatch):
    extractions, extract = [], tarfile.TarFile.extractall

    def counted(self, *args, **kwargs):
        extractions.append(self)
        extract(self, *args, **kwargs)

    monkeypatch.setattr(tarfile.TarFile, "extractall", counted)
    start = threading.Barrier(2)

    def run(_: int) -> Path:
        start.wait()
        return download_voc(tmp_path, sources=[server.url("good")])

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [tmp_path / "VOCdevkit" / "VOC2012"] * 2
    assert_complete(tmp_path)
    assert len(server.requests) == 1 and len(extractions) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_names_the_folder_and_tries_no_other_source(server, tmp_path):
    (tmp_path / f"{NAME}.part").symlink_to("/dev/full")
    with pytest.raises(InputError) as caught:
        download_voc(tmp_path, sources=[server.url("good"), server.url("norange")])
    assert str(tmp_path) in str(caught.value) and "No space left on device" in str(caught.value)
    assert server.requests == [("good", None)]


def test_a_root_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file.data: cannot be written \(.*--data_root"):
        download_voc(tmp_path / "file" / "data")
