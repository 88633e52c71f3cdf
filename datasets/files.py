"""Reads and checks the files of a data set. Every error names the file, the value and the fix."""

import contextlib
import csv
import logging
import os
import shlex
import unicodedata
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.Image import Transpose

from utils.errors import InputError

CONVERT = "python -m datasets.prepare.convert"
KIND = "--kind KIND (ids, colours, binary or instances)"
COLOUR = 1 << 24  # marks the colours among values of masks
VOID = 255  # the mask value that is neither trained on nor scored
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # in any case
JPEG_SUFFIXES = (".jpg", ".jpeg")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", *JPEG_SUFFIXES)  # JPEG is recognised in order to refuse it
CLASS_FILES = ("class_names.txt", "classes.txt", "labels.txt", "_classes.csv")
FULL_SCALE = {"I": (2**16 - 1, 2**31 - 1), "F": (1, 2**8 - 1, 2**16 - 1)}  # by the first letter of Pillow's mode
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow spreads greys of 2 and 4 bits over 0..255
UNREADABLE = (Exception,)  # Pillow's forty decoders share no narrower base class for what they raise
FIRST_QUARTER_TURN = 5  # from this EXIF orientation on, height and width change places
MAX_ID = 240  # bytes; with a suffix and .tmp it still fits into a file name of 255
MAX_CLASS_NAME = 100  # characters; tables are as wide as the longest name
TURNS = {  # by EXIF orientation; 1 is upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# Pillow warns about metadata, which nothing here reads, and about images above 89 million pixels, which are fine.
# What it logs about a bad file it also raises. `catch_warnings` around each file is no alternative: it would make
# Python forget which other warnings it has already shown.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def is_file(path: Path) -> bool:
    """Whether `path` is a file. A path that cannot exist, such as one with an overlong name, is not."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_file()
    return False


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder. A path that cannot exist is not."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_dir()
    return False


def existing_folder(folder: Path) -> Path:
    """Returns `folder`. Raises InputError if it does not exist."""
    if not is_folder(folder):
        raise InputError(f"{folder}: there is no such folder; docs/own_masks.md shows the layouts")
    return folder


def is_ghost(name: str) -> bool:
    """Whether a file or folder is one that systems leave behind, such as `._a.png`, `.DS_Store` and `Thumbs.db`."""
    return name.startswith(".") or name.lower() == "thumbs.db"


def list_files(folder: Path, suffixes: Collection[str]) -> dict[str, list[Path]]:
    """Lists the files with these suffixes, in any case, in a folder and its sub-folders.

    Returns the paths by id: the path relative to the folder without its suffix, in Unicode form NFC, as in
    `street/0001`. An id has several paths if files differ only in their suffix.
    """
    found: dict[str, list[Path]] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_ghost(name))
        inner = Path(parent)
        prefix = "" if inner == folder else f"{inner.relative_to(folder).as_posix()}/"
        for name in sorted(names):
            stem, _, suffix = name.rpartition(".")
            if f".{suffix.lower()}" in suffixes and not is_ghost(name):
                found.setdefault(unicodedata.normalize("NFC", f"{prefix}{stem}"), []).append(inner / name)
    return found


def only_path(paths: list[Path]) -> Path:
    """Returns the path of an id. Raises InputError if there are several."""
    if len(paths) > 1:
        others = ", ".join(path.name for path in paths[1:])
        raise InputError(f"{paths[0]}: {others} beside it has the same id; keep one of them")
    return paths[0]


def convert_command(folder: Path) -> str:
    """Returns the command that makes masks of ids from a data folder, into one beside it."""
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    return f"{CONVERT} --images {shlex.quote(str(folder))} --out {shlex.quote(f'{folder}_converted')}"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns any error of the block, which reads annotations, into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be read ({reason}); export it again, or move it away") from None


@contextlib.contextmanager
def opened(path: Path, kind: str, *, otherwise: str) -> Iterator[Image.Image]:
    """Opens an image file. Pillow reads only the header and refuses more than 179 million pixels.

    Raises InputError for any error inside the block.
    """
    try:
        with Image.open(path) as image:
            yield image
    except UNREADABLE as error:
        empty = is_file(path) and path.stat().st_size == 0
        reason = "it is empty" if empty else next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{path}: cannot be read as {kind} ({reason}); replace it or {otherwise}") from None


def read_image(path: Path, *, fits: tuple[int, int] | None = None) -> torch.Tensor:
    """Reads an image as uint8 RGB `[3, H, W]`; of several frames the first.

    It is turned upright as its EXIF orientation says, unless it has the size (H, W) `fits` only as it is stored.
    Transparent parts become white. Grey values of more than 8 bits are scaled by their bit depth. Floats and 32-bit
    integers have no fixed scale: theirs is the smallest full scale that no value exceeds, of 1 and 255 for floats,
    then 65535 and, for integers, 2^31 - 1. Colour profiles are not applied.
    Raises InputError, naming the file, if it cannot be read or has grey values below 0 or above full scale.
    """
    with opened(path, "an image", otherwise="leave it out") as image:
        return to_rgb(image, where=path, fits=fits)


def to_rgb(image: Image.Image, *, where: str | Path, fits: tuple[int, int] | None = None) -> torch.Tensor:
    """Converts a Pillow image as `read_image` does; `where` names it in messages."""
    image.load()
    if (turn := TURNS.get(orientation_of(image))) is not None:
        turned = image.transpose(turn)
        keep = fits == (image.height, image.width) != (turned.height, turned.width)
        image = image if keep else turned
    mode = image.mode[0]  # I;16 and its byte orders count as I
    if mode not in FULL_SCALE and image.has_transparency_data:
        image = _on_white(image)
    as_is = mode in FULL_SCALE or image.mode == "RGB"  # convert would copy
    pixels = np.array(image if as_is else image.convert("RGB"))  # [H, W] or [H, W, 3]
    if mode in FULL_SCALE:
        pixels = np.repeat(_to_8_bits(pixels, FULL_SCALE[mode], where)[..., None], 3, axis=2)  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W], channels last in memory


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation of an image, 1 to 8; 1, upright, if it has none that can be read.

    `ImageOps.exif_transpose` rewrites the EXIF data, which fails for what some cameras put there.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1  # viewers do the same


def _on_white(image: Image.Image) -> Image.Image:
    image, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def read_header(path: Path) -> tuple[tuple[int, int], str, int]:
    """Reads (height, width) as stored, Pillow's mode and the EXIF orientation of an image from its file header.

    A TIFF has orientation 1, because Pillow turns it upright.
    Raises InputError if the file is not an image.
    """
    with opened(path, "an image", otherwise="leave it out") as image:
        # In a PNG Pillow looks for it behind the pixels too, and decodes them.
        has_none = image.format == "PNG" and "exif" not in image.info
        orientation = 1 if has_none else orientation_of(image)
        if image.format == "TIFF" and orientation in TURNS:
            image.load()  # turns it, and no other format
            orientation = 1
        return (image.height, image.width), image.mode, orientation


def upright_size(path: Path) -> tuple[int, int]:
    """Reads (height, width) of an image that is turned as its EXIF orientation says."""
    size, _, orientation = read_header(path)
    return size[::-1] if orientation >= FIRST_QUARTER_TURN else size


def highest_grey(path: Path) -> int:
    """Reads the highest value of a grey image, before it is scaled to 8 bits. Raises InputError if it cannot."""
    with opened(path, "an image", otherwise="leave it out") as image:
        return int(np.array(image).max())


def _to_8_bits(grey: np.ndarray, scales: tuple[int, ...], where: str | Path) -> np.ndarray:
    low, high = grey.min(), grey.max()
    full = next((scale for scale in scales if low >= 0 and high <= scale), None)  # None for NaN too
    if full is None:
        raise InputError(
            f"{where}: grey values {low} to {high} are not in 0..{scales[-1]}; save it with 8 or 16 bits"
        )
    return np.rint(grey.astype(np.float32) * np.float32(255 / full)).astype(np.uint8)


def read_mask(path: Path, num_classes: int, *, convert: str = CONVERT) -> torch.Tensor:
    """Reads a mask as uint8 class ids `[H, W]`, void 255.

    convert: the command to recommend for masks that hold something else.
    Raises InputError if the file is not an image, holds colours instead of ids, is a JPEG, or holds any other value.
    """
    with opened(path, "a mask", otherwise="remove its id from the list") as image:
        mode, is_jpeg, step = image.mode, image.format == "JPEG", grey_step(image)
        mask = np.array(image)  # [H, W] in the modes that pass the check below
    if is_jpeg:
        raise InputError(f"{path}: a JPEG mask, whose lossy compression smears the ids; convert the masks: {convert}")
    if mode not in ("P", "L", "1", "I;16", "I"):
        raise InputError(f"{path}: holds colours (mode {mode}), but a mask holds ids; convert the masks: {convert}")
    mask = mask // step if step > 1 else mask
    # TIFF allows negative values.
    stray = mask[((mask >= num_classes) & (mask != VOID)) | (mask < 0)]
    if stray.size:
        count_from_1 = f"--first_id 1 (if the ids count from 1 to {num_classes})"
        raise InputError(
            f"{path}: value {int(stray[0])} is neither a class (0..{num_classes - 1}) nor void ({VOID}); "
            "fix the mask, add the class to class_names.txt, or convert the masks: "
            f"{convert} {count_from_1 if stray.max() == num_classes else KIND}"
        )
    return torch.from_numpy(mask.astype(np.uint8))


def grey_step(image: Image.Image) -> int:
    """Returns what Pillow multiplies the pixels with, 1 unless greys have 2 or 4 bits. Call it before loading."""
    arguments = image.tile[0][3] if image.tile else ""  # how the pixels are stored, such as "L;2"
    return GREY_STEPS.get(arguments if isinstance(arguments, str) else str(arguments[0] if arguments else ""), 1)


def read_values(path: Path, *, expand: bool) -> np.ndarray:
    """Reads a mask of any kind as int32 `[H, W]`: a grey or an index is itself, a colour is COLOUR + 0xRRGGBB.

    Transparent pixels are 0. expand: replaces the indices of palettes by their colours.
    Raises InputError for a file that cannot be read, and for fractions and negative values.
    """
    with opened(path, "a mask", otherwise="leave it out") as image:
        step = grey_step(image)
        if (image.mode[0] not in "1IFL" or image.mode == "LA") and (expand or image.mode != "P"):
            pixels = np.array(image.convert("RGBA")).astype(np.int32)  # [H, W, 4]
            pixels[pixels[..., 3] == 0] = 0
            red, green, blue, _ = pixels.transpose(2, 0, 1)  # [H, W] each
            return np.where((red == green) & (green == blue), red, COLOUR | red << 16 | green << 8 | blue)
        pixels = np.array(image.convert("L") if image.mode == "1" else image)
        values = pixels.astype(np.int32) // step
        if (pixels != values * step).any() or not 0 <= values.min() <= values.max() < COLOUR:
            raise ValueError(f"{pixels.min()} to {pixels.max()} are no ids")
        return values


def read_size(path: Path) -> tuple[int, int]:
    """Reads (height, width) of a mask from the file header. Raises InputError if the file is not an image."""
    with opened(path, "a mask", otherwise="remove its id from the list") as image:
        return image.height, image.width


def read_palette(path: Path) -> np.ndarray | None:
    """Reads the palette of a mask from the file header, uint8 RGB `[N, 3]`, N <= 256.

    None for a file without one, for a grey ramp, which a grey PNG has in mode P, and for a file that cannot be read.
    """
    with contextlib.suppress(*UNREADABLE), Image.open(path) as image:
        if image.mode == "P":
            # getpalette would decode the pixels first.
            own, mode = image.palette, (image.palette.mode, image.palette.rawmode)
            own = own.palette if mode in (("RGB", None), ("RGB", "RGB")) else image.getpalette("RGB")
            palette = np.frombuffer(bytes(own), np.uint8).reshape(-1, 3)
            return None if (palette == np.arange(len(palette))[:, None]).all() else palette
    return None


def format_shares(counts: np.ndarray) -> str:
    """Formats the values of masks with their shares of all pixels. counts: pixels of each value, int `[256]`."""
    found, names = np.flatnonzero(counts), {VOID: f"{VOID} (void)"}
    shares = [f"{names.get(value, value)}: {counts[value] / counts.sum():.1%}" for value in found.tolist()]
    return ", ".join([*shares[:12], *([f"{len(shares) - 12} more values"] if len(shares) > 12 else [])])


def read_ids(path: Path, known: Collection[str] = ()) -> list[str]:
    """Reads a split list: one image id per line. An id may include sub-folders, as in `street/0001`.

    A suffix and the second column that VOC's lists may have are dropped, unless `known` has the whole line as an id.
    Raises InputError for an id that points outside the data folders, because results are saved under their ids.
    """
    if not is_file(path):
        names = {other.name for other in path.parent.glob("*.txt") if not is_ghost(other.name)} - {*CLASS_FILES}
        names = sorted(name.removesuffix(".txt") for name in names)
        fix = (
            f"choose from {', '.join(names)} with --train_split and --val_split" if names else "write one id per line"
        )
        raise InputError(f"{path}: there is no such split list; {fix}")
    lines = [unicodedata.normalize("NFC", line) for line in _read_lines(path)]
    ids = [line if line in known else _id_in(line) for line in lines]
    if not ids:
        raise InputError(f"{path}: the split is empty; write one image id per line")
    for id in ids:
        if "\\" in id or ".." in PurePosixPath(id).parts or PurePosixPath(id).is_absolute():
            raise InputError(f"{path}: the id {id[:MAX_ID]!r} points outside the data; write names, or folder/name")
        if len(id.encode()) > MAX_ID:
            raise InputError(f"{path}: the id {id[:20]!r}... is longer than {MAX_ID} bytes; write one id per line")
    return ids


def _id_in(line: str) -> str:
    """Returns the id in a line such as `a1.jpg`, `a1 -1` or `/JPEGImages/a1.jpg /SegmentationClass/a1.png`."""
    first, _, second = line.partition(" ")
    second = second.strip()
    if second in ("-1", "0", "1") or PurePosixPath(second).suffix.lower() in MASK_SUFFIXES:
        line = first
    if PurePosixPath(line).suffix.lower() in IMAGE_SUFFIXES:
        line = str(PurePosixPath(line).with_suffix(""))
    return line.removeprefix("/JPEGImages/").removeprefix("JPEGImages/")


def find_class_names(*folders: Path) -> Path | None:
    """Returns the first file of class names in these folders, one of `CLASS_FILES`; None if there is none."""
    return next((folder / name for folder in folders for name in CLASS_FILES if is_file(folder / name)), None)


def read_class_names(path: Path) -> list[str]:
    """Reads class names in the order of their ids: one per line, or the second column of a `_classes.csv`.

    labelme's `__ignore__` means void: not a class. Raises InputError for names that cannot be used.
    """
    lines = _read_lines(path)
    if path.suffix == ".csv":
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines)][1:]
        if any(len(row) < 2 or row[0] != str(number) for number, row in enumerate(rows)):
            raise InputError(f"{path}: its rows are not 0, name, then 1, name; write the names to class_names.txt")
        lines = [row[1] for row in rows]
    names = [unicodedata.normalize("NFC", name) for name in lines if name != "__ignore__"]
    if len(names) == 1:
        raise InputError(f"{path}: lists one class; add a first line for everything else, such as background")
    if not 2 <= len(names) <= VOID:
        raise InputError(f"{path}: lists {len(names)} classes; list 2 to {VOID} (mask value {VOID} is void)")
    for name in names:
        if len(name) > MAX_CLASS_NAME:
            raise InputError(
                f"{path}: {name[:20]!r}... is longer than {MAX_CLASS_NAME} characters; write one per line"
            )
        if names.count(name) > 1:
            raise InputError(f"{path}: {name!r} is listed twice; give each class its own name")
    return names


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); save it as UTF-8") from None
    # English text in UTF-16 has one in every other byte.
    if "\0" in text:
        raise InputError(f"{path}: contains NUL characters; save it as UTF-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
