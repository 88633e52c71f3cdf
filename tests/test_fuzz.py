"""Whatever a user gives, the outcome is a correct result or an InputError: one line that names the file or flag.

SEG_FUZZ=5000 python -m pytest tests/test_fuzz.py -rP   # files tried per kind, a fifth of it of what hypothesis
    makes up; shows what became of them
"""

import contextlib
import functools
import hashlib
import io
import itertools
import os
import random
import re
import resource
import shutil
import signal
import struct
import tarfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from torchvision import tv_tensors
from torchvision.datasets.voc import DATASET_YEAR_DICT

import main
from datasets.files import VOID, read_class_names, read_ids, read_image, read_mask, read_size
from datasets.prepare.check import check_dataset
from datasets.prepare.download import download_voc
from datasets.transforms import MEAN_COLOUR, crop_val_transform, train_transform
from utils.engine import MAX_SCALE, parse_tta
from utils.errors import InputError
from utils.metrics import ConfusionMatrix
from utils.options import check_options, get_parser

FUZZ = int(os.environ.get("SEG_FUZZ", 200))
SECONDS = 30  # that one input may take
MEMORY = 4 << 20  # KiB that a test may take at its peak; Pillow's limit of 179 million pixels allows 3 GB
CLASSES = 4
READERS = {
    "read_image": read_image,
    "read_mask": lambda path: read_mask(path, CLASSES),
    "read_size": read_size,
}
# libtiff writes of bad files straight to the file descriptor.
LIBTIFF = re.compile(r"^[\w .-]*: (?!.*(Error:|Warning:|Traceback))")

fuzzed = settings(
    max_examples=max(10, FUZZ // 5),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Tally:
    """What became of the inputs of a kind. Anything but a result or a refusal of one line is `other`."""

    def __init__(self) -> None:
        self.counts, self.others = Counter(), []

    def attempt(self, function: Callable, *arguments: object, names: str = "") -> object:
        """The result, None where it was refused; `names` is what a refusal must hold."""
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            result = function(*arguments)
        except InputError as error:
            self.counts["refused"] += 1
            if len(str(error).splitlines()) != 1 or names not in str(error):
                self.others.append(f"refused with {str(error)!r}")
            return None
        except BaseException as error:
            self.others.append(f"{type(error).__name__}: {error} at {arguments!r:.200}")
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.counts["read"] += 1
        return result


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def peak_memory() -> int:
    """KiB, of the process since the last `reset_peak`."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture
def tally(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture) -> Iterator[Tally]:
    """Fails the test for inputs that end otherwise, for noise on stderr, and for memory without bounds."""
    tally, before = Tally(), signal.signal(signal.SIGALRM, _too_long)
    reset_peak()
    start, memory = time.monotonic(), peak_memory()
    try:
        with warnings.catch_warnings(record=True) as said:
            yield tally
    finally:
        signal.signal(signal.SIGALRM, before)
    grown = peak_memory() - memory
    noise = [line for line in capfd.readouterr().err.splitlines() if not LIBTIFF.match(line)]
    figures = ", ".join(f"{count} {what}" for what, count in sorted(tally.counts.items()))
    print(f"{request.node.name}: {figures}, {len(tally.others)} other, ", end="")
    print(f"{time.monotonic() - start:.1f} s, peak memory +{grown >> 10} MB")
    assert not tally.others, (len(tally.others), tally.others[:10])
    # Pillow's, which `datasets.files` has unsaid, but pytest resets the filters before each test.
    said = [str(warning.message) for warning in said if "PIL" not in Path(warning.filename).parts]
    assert not noise and not said, (noise[:10], said[:10])
    assert grown < MEMORY
    assert tally.counts["read"] and tally.counts["refused"]  # otherwise the inputs are too tame, or too wild


# Files of pictures


@functools.cache
def good_files() -> dict[str, list[bytes]]:
    """By format: files of every mode and variant that this Pillow writes and reads."""
    rng, found = np.random.default_rng(0), {}
    rgb = Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8))
    grey = Image.fromarray(rng.integers(0, CLASSES, (24, 20)).astype(np.uint8))
    palette = grey.copy()
    palette.putpalette(rng.bytes(768))
    modes = [rgb, grey, palette, *(rgb.convert(mode) for mode in ("1", "RGBA", "LA", "CMYK", "YCbCr"))]
    modes += [Image.fromarray(rng.integers(0, 2**16, (24, 20)).astype(kind)) for kind in (np.uint16, np.int32)]
    modes += [Image.fromarray(rng.random((24, 20), np.float32))]

    def add(kind: str, picture: Image.Image, **options: object) -> None:
        file = io.BytesIO()
        with (
            contextlib.suppress(Exception),
            warnings.catch_warnings(action="ignore"),
        ):  # no such mode in this format, or no such codec in this Pillow
            picture.save(file, kind, **options)
            with Image.open(file) as saved:
                saved.load()
            found.setdefault(kind, []).append(file.getvalue())

    Image.init()
    for kind in sorted(Image.SAVE.keys() & Image.OPEN.keys() - {"EPS", "WMF", "GRIB", "HDF5", "BUFR"}):  # others read
        for picture in modes[: 1 if kind == "ICNS" else None]:  # which writes ten sizes
            add(kind, picture)
    texts, exif = PngImagePlugin.PngInfo(), Image.Exif()
    texts.add_text("a", "x" * 50)
    texts.add_text("b", "y" * 500, zip=True)
    texts.add_itxt("c", "z" * 100, zip=True)
    exif[0x112], exif[0x10E], exif.get_ifd(0x8769)[0x9003] = 6, "text", "2020:01:01 00:00:00"
    told = {"exif": exif, "icc_profile": rng.bytes(600)}
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb]}
    add("PNG", rgb, pnginfo=texts, **told)
    add("PNG", palette, transparency=bytes(range(256)))
    add("PNG", rgb, **frames)
    add("JPEG", rgb, comment=b"x" * 30, **told)
    add("JPEG", rgb, progressive=True, restart_marker_rows=1)
    add("MPO", rgb, **frames)
    add("WEBP", rgb, **told)
    add("WEBP", rgb, **frames)
    add("GIF", palette, transparency=1, comment=b"text", **frames)
    add("TIFF", rgb, compression="tiff_lzw", **frames)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd", "lzma"):
        add("TIFF", rgb, compression=compression, exif=exif)
    add("TIFF", modes[3], compression="group4")
    return found


EXTREMES = [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0"]
EXTREMES += [struct.pack(order + "I", 13000) for order in "<>"]  # sides of a picture just within Pillow's limit


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Bits flipped, bytes replaced, inserted, removed, moved and doubled, the end cut off, the head or the tail of
    another file put in; more often near the start, where the headers are."""
    file = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not file:
            break
        at = rng.randrange(min(len(file), 64) if rng.random() < 0.4 else len(file))
        some = rng.choice([1, 2, 4, 16, 64])
        match rng.randrange(11):
            case 0:
                file[at] ^= 1 << rng.randrange(8)
            case 1:
                file[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
            case 2:
                del file[rng.randrange(len(file)) :]
            case 3:
                file[at:at] = rng.randbytes(some)
            case 4:
                del file[at : at + some]
            case 5:
                file[at : at + 4] = rng.choice(EXTREMES)
            case 6:
                to = rng.randrange(len(file))
                file[at : at + some], file[to : to + some] = file[to : to + some], file[at : at + some]
            case 7:
                file[at : at + 8 * some] = bytes(8 * some)
            case 8:
                file[:some] = rng.choice(others)[:some]
            case 9:
                file[at:at] = file[at : at + 2 * some]
            case 10:
                other = rng.choice(others)
                file[at:] = other[rng.randrange(len(other)) :]
    return _checked(file) if rng.random() < 0.7 else bytes(file)


def _checked(file: bytearray) -> bytes:
    """With right checksums, where it still is a PNG: otherwise few changes would reach the decoder."""
    at = 8
    while file.startswith(b"\x89PNG") and at + 12 <= len(file):
        end = at + 8 + int.from_bytes(file[at : at + 4], "big")
        if end + 4 > len(file):
            break
        file[end : end + 4] = struct.pack(">I", zlib.crc32(file[at + 4 : end]))
        at = end + 4
    return bytes(file)


def mutations(kind: str, count: int, seed: int) -> Iterator[bytes]:
    """Good files of a format first, then changed ones; kind "any" is all other formats."""
    files, rng = good_files(), random.Random(seed)
    everything = [file for files in files.values() for file in files]
    own = [
        f for name in files for f in files[name] if name == kind or (kind == "any" and name not in ("PNG", "JPEG"))
    ]
    yield from own[:count]
    for _ in range(count - len(own)):
        yield mutated(rng.choice(own), everything, rng)


@pytest.mark.parametrize(
    ("kind", "reader"),
    # A JPEG is no mask, whatever its bytes.
    [pair for pair in itertools.product(["PNG", "JPEG", "any"], READERS) if pair != ("JPEG", "read_mask")],
)
def test_a_picture_is_read_or_refused_by_its_name_whatever_its_bytes(tally, tmp_path, kind, reader):
    path = tmp_path / "picture.png"
    for data in mutations(kind, FUZZ, seed=len(kind)):
        path.write_bytes(data)
        result = tally.attempt(READERS[reader], path, names=f"{path}: ")
        if reader == "read_mask" and result is not None:
            assert result.dtype == torch.uint8 and not ((result >= CLASSES) & (result != VOID)).any()
        elif reader == "read_size" and result is not None:
            assert min(result) > 0
        elif result is not None:
            assert result.dtype == torch.uint8 and result.ndim == 3 and len(result) == 3 and result.numel()


def test_the_doctor_names_every_file_that_cannot_be_read_and_no_other(tally, tmp_path):
    images, masks = mutations("any", FUZZ // 2, seed=7), mutations("PNG", FUZZ // 2, seed=8)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "class_names.txt").write_text("\n".join(map(str, range(CLASSES))))
    bad, ids = set(), [f"{number:06}" for number in range(FUZZ // 2)]
    for id, image, mask in zip(ids, images, masks, strict=True):
        paths = {"JPEGImages": (image, read_image), "SegmentationClass": (mask, READERS["read_mask"])}
        for folder, (data, reader) in paths.items():
            path = tmp_path / folder / f"{id}.png"
            path.write_bytes(data)
            if tally.attempt(reader, path) is None:
                bad.add(str(path))
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(ids))
    findings, checked = check_dataset("folder", tmp_path)
    problems = ("cannot be read", "save it", "neither a class", "holds colours", "a JPEG mask")
    named = {finding.path for finding in findings if any(problem in finding.problem for problem in problems)}
    assert named == bad and checked["pairs"] == {"train": len(ids)}
    assert all(len(f"{finding.path}: {finding.problem}".splitlines()) == 1 for finding in findings)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Grey, of 8 bits."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = (struct.pack(">I", len(data)) + name + data for name, data in [header, *chunks, (b"IEND", b"")])
    crcs = (struct.pack(">I", zlib.crc32(name + data)) for name, data in [header, *chunks, (b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + b"".join(part + crc for part, crc in zip(parts, crcs, strict=True))


PIXELS = (b"IDAT", zlib.compress(bytes(8 * 9)))
BOMB = zlib.compress(bytes(50 << 20), 9)
BOMBS = {
    "pixels": png(60_000, 60_000, (b"IDAT", BOMB)),
    "text": png(8, 8, (b"zTXt", b"a\0\0" + BOMB), PIXELS),
    "profile": png(8, 8, (b"iCCP", b"a\0\0" + BOMB), PIXELS),
    "no bytes": b"",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_by_name_before_it_takes_memory(tmp_path, bomb, reader):
    path = tmp_path / "bomb.png"
    path.write_bytes(BOMBS[bomb])
    reset_peak()
    before = peak_memory()
    with pytest.raises(InputError, match=r"bomb\.png: cannot be read as (an image|a mask) \(.*\); replace it or "):
        READERS[reader](path)
    assert peak_memory() - before < 30 << 10


def test_more_compressed_data_than_pixels_is_not_unpacked(tmp_path):
    path = tmp_path / "long.png"
    path.write_bytes(png(8, 8, (b"IDAT", BOMB)))
    reset_peak()
    before = peak_memory()
    assert read_image(path).shape == (3, 8, 8)
    assert peak_memory() - before < 30 << 10


# Transforms and scores


def seven(height: int, width: int) -> torch.Tensor:
    """A picture of one colour, in memory as `read_image` gives it, for torch 2.15 fails on planes of one pixel."""
    return torch.full((height, width, 3), 7, dtype=torch.uint8).permute(2, 0, 1)  # [3, height, width]


sides = st.one_of(st.integers(1, 40), st.integers(1, 700), st.sampled_from([1, 2, 3, 2000]))
ids = st.integers(0, 255)


@fuzzed
@given(sides, sides, st.integers(1, 100), st.tuples(ids, ids, ids), st.integers(0, 2**32 - 1), st.data())
def test_a_training_sample_has_no_pixel_but_those_of_its_picture_and_invented_ones(h, w, crop, present, seed, data):
    low = data.draw(st.floats(0.01, 4))
    high = data.draw(st.floats(low, 4))
    mask = torch.tensor(present, dtype=torch.uint8)[torch.arange(h * w).view(h, w) % 3]
    image = seven(h, w)
    transform = train_transform(crop, scale=(low, high), seed=seed)
    pixels, labels = transform(tv_tensors.Image(image), tv_tensors.Mask(mask), epoch=seed % 7, index=seed % 11)
    assert pixels.shape == (3, crop, crop) and labels.shape == (crop, crop)
    assert pixels.dtype == labels.dtype == torch.uint8
    real = (pixels == 7).all(dim=0)
    assert real.any()
    assert set(labels[real].unique().tolist()) <= set(mask.unique().tolist())
    assert (labels[~real] == VOID).all() and (pixels[:, ~real] == torch.tensor(MEAN_COLOUR)[:, None]).all()


@fuzzed
@given(sides, sides, st.integers(1, 100), st.tuples(ids, ids, ids))
@example(1, 3_000_000, 100, (0, 1, 2))  # scaled as a whole it would take 90 GB
def test_a_centre_crop_has_its_size_whatever_the_picture(h, w, crop, present):
    mask = torch.tensor(present, dtype=torch.uint8)[torch.arange(h * w).view(h, w) % 3]
    image = seven(h, w)
    pixels, labels = crop_val_transform(crop)(tv_tensors.Image(image), tv_tensors.Mask(mask))
    assert pixels.shape == (3, crop, crop) and labels.shape == (crop, crop)
    assert (pixels == 7).all() and set(labels.unique().tolist()) <= set(mask.unique().tolist())


@given(st.integers())
@example(10**9)
@fuzzed
def test_a_crop_is_made_or_refused_by_its_flag(crop):
    for make in (train_transform, crop_val_transform):
        try:
            make(crop) if crop < 2000 or crop > 2**14 else None  # large ones are made, and take their memory
        except InputError as error:
            assert str(error).startswith(f"--crop_size {crop}: ")
            continue
        assert 1 <= crop <= 2**14


@fuzzed
@given(
    st.integers(2, 255),
    st.sampled_from([(1,), (0, 5), (3, 4, 5), (2, 17)]),
    st.floats(0, 1),
    st.sampled_from([torch.uint8, torch.int64, torch.int16]),
    st.integers(0, 2**32 - 1),
)
def test_the_confusion_matrix_is_that_of_a_loop_over_pixels(num_classes, shape, void, dtype, seed):
    rng = np.random.default_rng(seed)
    confusion, expected = ConfusionMatrix(num_classes), np.zeros((num_classes, num_classes), int)
    for _ in range(2):
        target, prediction = (rng.integers(0, num_classes, shape) for _ in range(2))
        target[rng.random(shape) < void] = VOID
        confusion.update(*(torch.tensor(ids, dtype=dtype) for ids in (target, prediction)))
        for label, answer in zip(target.flat, prediction.flat, strict=True):
            if label != VOID:
                expected[label, answer] += 1
    assert (confusion.matrix().numpy() == expected).all()


@fuzzed
@given(st.integers(2, 254), st.integers(-300, 600), st.booleans())
def test_a_stray_label_or_prediction_is_refused_not_counted(num_classes, value, in_target):
    allowed = 0 <= value < num_classes or (in_target and value == VOID)
    stray, zeros = torch.tensor([[0, value]]), torch.zeros(1, 2, dtype=torch.int64)
    confusion = ConfusionMatrix(num_classes)
    with contextlib.nullcontext() if allowed else pytest.raises(InputError, match=str(value)):
        confusion.update(*((stray, zeros) if in_target else (zeros, stray)))
        confusion.matrix()


# Command lines

GARBAGE = [
    "",
    "-1",
    "--",
    "1\n",
    "0",
    "1",
    "7",
    "513",
    "9" * 20,
    "9" * 5000,
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e-320",
    "0x10",
    "1_0",
]
GARBAGE += [
    "²",
    "\uff11\uff12",
    "é",
    "a b",
    "-x",
    "[1,2]",
    "%s",
    "%(prog)s",
    "a\0b",
    "../x",
    "/",
    "a" * 5000,
    "flip",
    "~",
]
GARBAGE += ["0.5,flip", "flip,flip", "nan,1", ",", "True", "none", "cuda:-1", "\t"]


def command_line(rng: random.Random) -> list[str]:
    words = []
    for action in rng.sample(get_parser()._actions[1:], rng.choice([1, 1, 2, 3, 8])):  # the first is --help
        words.append(action.option_strings[0])
        if action.nargs != 0:
            choices = [str(choice) for choice in action.choices or ()]
            words.append(rng.choice(choices if choices and rng.random() < 0.7 else GARBAGE))
        if rng.random() < 0.03:
            words.append(rng.choice(GARBAGE))
    return [f"{words[0]}={words[1]}", *words[2:]] if len(words) > 1 and rng.random() < 0.3 else words


def parse(argv: list[str]) -> None:
    check_options(get_parser().parse_args(argv))


def test_any_command_line_is_parsed_or_refused(tally):
    rng = random.Random(0)
    for _ in range(FUZZ):
        tally.attempt(parse, command_line(rng))


@example("nan")
@example("flip,1e300")
@example("0.0")
@fuzzed
@given(st.one_of(st.text(), st.lists(st.one_of(st.just("flip"), st.floats().map(str))).map(",".join)))
def test_any_tta_is_parsed_or_refused(text):
    try:
        flip, scales = parse_tta(text)
    except InputError as error:
        assert str(error).startswith("--tta ")
        return
    assert isinstance(flip, bool) and scales and all(0 < scale <= MAX_SCALE for scale in scales)


SOON = ["--backbone_weights", "none", "--device", "cpu", "--num_workers", "0", "--data_root", "nowhere"]
NO_PATH = ["", "a\0b", "../x", "/dev/null", "é", " ", "~", "-"]
NOT_HERE = [[flag, path] for flag in ("--data_root", "--ckpt", "--run_dir", "--run_name") for path in NO_PATH]
NOT_HERE += [["--dataset", "folder", "--data_root", path] for path in [*NO_PATH, "a" * 300, "a/" * 3000]]
NOT_HERE += [["--test_only", flag, path] for flag in ("--ckpt", "--run_name") for path in NO_PATH]
NOT_HERE += [
    ["--device", name] for name in ["", "cuda:99", "cpu:x", "cuda:-1", "a\0b", "x" * 5000, "CPU", "ve", "xla"]
]
NOT_HERE += [["--crop_size", "1000000000"], ["--val_split", "a\0b"], ["--tta", "nan"], ["--lr", "-inf"]]
# What still ends otherwise: it is for `utils.cli`, `utils.errors` and `choose_device` to refuse.
TOO_LONG_OR_BROKEN = [
    [flag, path] for flag in ("--data_root", "--ckpt", "--run_dir", "--run_name") for path in ("a" * 300, "a/" * 3000)
]
TOO_LONG_OR_BROKEN += [[flag, "a\nb"] for flag in ("--data_root", "--ckpt", "--tta", "--device")]
TOO_LONG_OR_BROKEN += [
    ["--crop_val", "a\nb"],
    ["--batch_size=--"],
    *(["--device", name] for name in ("mkldnn", "hpu")),
]


def assert_main_refuses(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main.main(argv)
    assert left.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("words", NOT_HERE, ids=lambda words: repr(" ".join(words))[:60])
def test_a_command_line_that_cannot_run_ends_with_2_and_one_line_and_writes_nothing(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert_main_refuses([*SOON, *words], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", TOO_LONG_OR_BROKEN, ids=lambda words: repr(" ".join(words))[:60])
def test_a_path_that_is_too_long_and_a_line_break_end_with_2_and_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_main_refuses([*SOON, *words], capsys)


# Archives

INSIDE = "VOCdevkit/VOC2012"
MEMBERS = {"JPEGImages/a.jpg": b"x" * 700, "SegmentationClass/a.png": b"mask", "ImageSets/Segmentation/t.txt": b"a"}
TAR_NAME = DATASET_YEAR_DICT["2012"]["filename"]


def member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def make_tar(*further: tarfile.TarInfo, layout: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as archive:
        for name, content in MEMBERS.items():
            info = member(f"{INSIDE}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in further:
            archive.addfile(info)
    return file.getvalue()


def mutated_tar(data: bytes, rng: random.Random) -> bytes:
    file = bytearray(data)
    for _ in range(rng.choice([1, 2, 4, 16])):
        at = rng.randrange(max(len(file), 1))
        at = at // 512 * 512 + rng.randrange(345) if rng.random() < 0.7 else at  # a field of a header
        if at >= len(file):
            continue
        block, step = at // 512 * 512, rng.choice([1, 512])
        match rng.randrange(8):
            case 0:
                file[at] ^= 1 << rng.randrange(8)
            case 1:
                file[at] = rng.choice([0, 10, 46, 47, 48, 128, 255, rng.randrange(256)])
            case 2 if rng.random() < 0.2:
                del file[at:]
            case 3:
                file[at : at + 4] = rng.choice([b"../x", b"/tmp", b"\0\0\0\0", b"7777", b"\x80\xff\xff\xff"])
            case 4:
                file[block + 156 : block + 157] = random.Random(at).choice([bytes([c]) for c in b"01234567gxLKS"])
            case 5:
                sizes = [b"77777777777\0", b"00000000777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0"]
                file[block + 124 : block + 136] = rng.choice(sizes)
            case 6:
                del file[at : at + step]
            case 7:
                file[at:at] = file[at : at + step]
    if rng.random() < 0.8:  # with right checksums, otherwise no header would be believed
        for at in range(0, len(file) - 511, 512):
            if file[at + 257 : at + 262] == b"ustar":
                file[at + 148 : at + 156] = b" " * 8
                file[at + 148 : at + 156] = b"%06o\0 " % sum(file[at : at + 512])
    return bytes(file)


def tars() -> Iterator[bytes]:
    links = [member(f"{INSIDE}/l", tarfile.SYMTYPE, "JPEGImages/a.jpg"), member(f"{INSIDE}/{'n' * 150}")]
    links += [
        member(f"{INSIDE}/h", tarfile.LNKTYPE, f"{INSIDE}/JPEGImages/a.jpg"),
        member(f"{INSIDE}/d", tarfile.DIRTYPE),
    ]
    good = [make_tar(), make_tar(*links), make_tar(*links, layout=tarfile.PAX_FORMAT)]
    rng = random.Random(0)
    yield from good
    for _ in range(FUZZ - len(good)):
        yield mutated_tar(rng.choice(good), rng)


def extract(root: Path, data: bytes) -> Path:
    (root / TAR_NAME).write_bytes(data)
    DATASET_YEAR_DICT["2012"]["md5"] = hashlib.md5(data).hexdigest()
    return download_voc(root)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root four folders deep; nothing may appear in those above it."""
    monkeypatch.setitem(DATASET_YEAR_DICT["2012"], "md5", "")
    root = tmp_path / "a" / "b" / "c" / "root"
    root.mkdir(parents=True)
    return root


def outside(root: Path) -> list[str]:
    """All there is beside what the download itself makes."""
    own = (root / "VOCdevkit", root / TAR_NAME, root / f"{TAR_NAME}.lock")
    paths = (path for path in root.parents[3].rglob("*") if not any(path.is_relative_to(name) for name in own))
    return [str(path) for path in paths if path != root and path not in root.parents]


def test_an_archive_is_extracted_or_refused_whole_and_nothing_lands_elsewhere(tally, canary):
    for data in tars():
        voc = tally.attempt(extract, canary, data)
        assert (voc is not None) == (canary / INSIDE).exists()
        assert [path.name for path in (canary / "VOCdevkit").iterdir()] == ["VOC2012"] * (voc is not None)
        assert outside(canary) == []
        shutil.rmtree(canary / "VOCdevkit")


EVIL = {
    "file above": [member("../evil")],
    "file far above": [member(f"{INSIDE}/../../../../evil")],
    "symbolic link": [member(f"{INSIDE}/l", tarfile.SYMTYPE, "../../../../")],
    "absolute symbolic link": [member(f"{INSIDE}/l", tarfile.SYMTYPE, "/tmp")],
    "hard link": [member(f"{INSIDE}/l", tarfile.LNKTYPE, "../../../evil")],
    "file through a link": [member(f"{INSIDE}/l", tarfile.SYMTYPE, "../../.."), member(f"{INSIDE}/l/evil")],
    "character device": [member(f"{INSIDE}/null", tarfile.CHRTYPE)],
    "block device": [member(f"{INSIDE}/disk", tarfile.BLKTYPE)],
    "pipe": [member(f"{INSIDE}/pipe", tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("evil", EVIL)
def test_an_archive_with_an_evil_member_is_refused_by_name(canary, evil):
    with pytest.raises(InputError, match=rf"{TAR_NAME}: cannot be extracted") as caught:
        extract(canary, make_tar(*EVIL[evil]))
    assert len(str(caught.value).splitlines()) == 1
    assert outside(canary) == [] and list((canary / "VOCdevkit").iterdir()) == []


def test_an_absolute_member_lands_inside(canary):
    """`tarfile`'s data filter takes the slash away."""
    extract(canary, make_tar(member("/evil")))
    assert outside(canary) == [] and not Path("/evil").exists()


# Lists

PIECES = [
    b"a",
    b"2007_000032",
    b"\n",
    b"\r\n",
    b"\r",
    b" ",
    b"\t",
    b"\xef\xbb\xbf",
    b"\0",
    b"\xff",
    b"\xc3\xa9",
    b"../",
    b"/",
]
PIECES += [
    b"\\",
    b"C:",
    b"x" * 300,
    b"..",
    b".",
    b"a/b",
    "\u2028".encode(),
    b"__ignore__\n",
    b"sky\nroad\n",
    b"\x1b[2J",
]


def lists(count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(count):
        pieces = rng.choices(PIECES, k=rng.choice([0, 1, 2, 5, 30, 300]))
        weights = [b"\n" if rng.random() < 0.4 else b"" for _ in pieces]
        text = b"".join(piece + end for piece, end in zip(pieces, weights, strict=True))
        yield rng.choice([text, text, text.replace(b"\0", b"").replace(b"\xff", b""), rng.randbytes(len(text))])


@pytest.mark.parametrize("reader", [read_ids, read_class_names])
def test_a_list_is_read_or_refused_by_its_name_whatever_its_bytes(tally, tmp_path, reader):
    path, folder = tmp_path / "list.txt", tmp_path / "data" / "SegmentationClass"
    for data in lists(FUZZ):
        path.write_bytes(data)
        names = tally.attempt(reader, path, names=f"{path}: ")
        assert names is None or all(name == name.strip() != "" and "\n" not in name for name in names)
        if names and reader is read_ids:
            for id in names:
                assert Path(os.path.normpath(folder / f"{id}.png")).is_relative_to(folder)
                assert not (folder / f"{id}.png").is_file()  # which raises for a name that is too long
        elif names:
            assert 2 <= len(set(names)) == len(names) <= 255 and max(map(len, names)) <= 100


def test_a_list_of_one_huge_line_is_refused_in_a_short_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"x" * (20 << 20) + b"\ny")
    for reader in (read_ids, read_class_names):
        with pytest.raises(InputError, match=r"list\.txt: .*'x+'\.\.\. is longer than") as caught:
            reader(path)
        assert len(str(caught.value)) < 300 + len(str(path))
