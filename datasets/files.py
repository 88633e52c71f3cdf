"""Reads the files of a data set, each with its checks: what is wrong is named by file, value and fix."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from utils.errors import InputError

VOID = 255  # the mask value that is neither trained on nor scored
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".tif", ".tiff", ".webp")
FULL_SCALE = {"I": (2**16 - 1, 2**31 - 1), "F": (1, 2**8 - 1, 2**16 - 1)}  # by the mode's first letter
UNREADABLE = (Exception,)  # what Pillow raises for bad files: its forty formats keep to no smaller family
MAX_ID = 240  # bytes; with a suffix and .tmp it must still be a file name, of 255
MAX_CLASS_NAME = 100  # characters; tables are as wide as the longest

# Pillow warns of metadata, which nothing here reads, and of over 89 million pixels, which are read; what it logs of
# a bad file it raises as well. Not `catch_warnings` around each file: Python then forgets which others were said.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def is_file(path: Path) -> bool:
    """Whether it is a file; False too for what cannot be one, like a name that is too long."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_file()
    return False


def is_folder(path: Path) -> bool:
    """As `is_file`."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_dir()
    return False


def existing_folder(folder: Path) -> Path:
    if not is_folder(folder):
        raise InputError(f"{folder}: there is no such folder; the data must be in VOC layout (see the README)")
    return folder


@contextlib.contextmanager
def _opened(path: Path, kind: str, *, otherwise: str) -> Iterator[Image.Image]:
    """The picture in a file, of which Pillow has read the header alone and refused more than 179 million pixels.

    Raises InputError for whatever goes wrong with it inside.
    """
    try:
        with Image.open(path) as picture:
            yield picture
    except UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        reason = "it is empty" if _is_empty(path) else reason
        raise InputError(f"{path}: cannot be read as a {kind} ({reason}); replace it, or {otherwise}") from None


def _is_empty(path: Path) -> bool:
    return is_file(path) and path.stat().st_size == 0


def read_image(path: Path, prepare: Callable[[Image.Image], Image.Image] | None = None) -> torch.Tensor:
    """The picture, after `prepare` if given, as uint8 RGB `[3, H, W]`.

    Greys of more than 8 bits are scaled by their bit depth; floats, and integers of 32 bits, have no certain one:
    full scale is the smallest of 1 (floats), 255 (floats), 65535 and 2^31 - 1 (integers) that none exceeds.
    Raises InputError for a file that cannot be read, and for greys below 0 or above full scale, naming it.
    """
    with _opened(path, "picture", otherwise="leave it out") as picture:
        picture = prepare(picture) if prepare else picture
        mode = picture.mode[0]  # I;16 and its byte orders count as I
        as_it_is = mode in FULL_SCALE or picture.mode == "RGB"  # convert would copy
        pixels = np.array(picture if as_it_is else picture.convert("RGB"))  # [H, W] or [H, W, 3]
    if mode in FULL_SCALE:
        pixels = np.repeat(_to_8_bits(pixels, FULL_SCALE[mode], path)[..., None], 3, axis=2)  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W], in memory channels last


def _to_8_bits(grey: np.ndarray, scales: tuple[int, ...], path: Path) -> np.ndarray:
    low, high = grey.min(), grey.max()
    full = next((scale for scale in scales if low >= 0 and high <= scale), None)  # None for NaN too
    if full is None:
        raise InputError(f"{path}: greys from {low} to {high}, not 0 to {scales[-1]}; save it with 8 or 16 bits")
    return np.rint(grey.astype(np.float32) * np.float32(255 / full)).astype(np.uint8)


def read_mask(path: Path, num_classes: int) -> torch.Tensor:
    """The annotation as uint8 class ids `[H, W]`, void 255.

    Raises InputError for a file that is no picture, is in colours instead of ids, or holds another value.
    """
    with _opened(path, "mask", otherwise="remove its id") as picture:
        mode = picture.mode
        mask = np.array(picture)  # [H, W] for the modes that are let through
    if mode not in ("P", "L", "1", "I;16", "I"):
        raise InputError(f"{path}: a {mode} picture, but a mask holds class ids: save it as a palette or grey PNG")
    stray = mask[((mask >= num_classes) & (mask != VOID)) | (mask < 0)]  # a TIFF may have signs
    if stray.size:
        raise InputError(
            f"{path}: value {int(stray[0])} is neither a class (0..{num_classes - 1}) nor void ({VOID}); "
            "mend the mask, or name the class in class_names.txt"
        )
    return torch.from_numpy(mask.astype(np.uint8))


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of a mask, from its file's header. Raises InputError for a file that is no picture."""
    with _opened(path, "mask", otherwise="remove its id") as picture:
        return picture.height, picture.width


def require_one_size(image: torch.Tensor, mask: torch.Tensor, mask_path: Path) -> None:
    """Raises InputError unless the picture `[3, H, W]` and its mask `[H, W]` go together."""
    if image.shape[-2:] != mask.shape:
        raise InputError(
            f"{mask_path}: the mask is {mask.shape[1]}x{mask.shape[0]}, its picture "
            f"{image.shape[2]}x{image.shape[1]}; they must be of one size"
        )


def read_ids(path: Path) -> list[str]:
    """The image ids of a split list, one a line; an id may lie in sub-folders, as in `street/0001`.

    Raises InputError for ids that lead out of the folders that they are looked up in: results are saved by id too.
    """
    if not is_file(path):
        known = sorted(p.stem for p in path.parent.glob("*.txt"))
        there = f"{path.parent} has {', '.join(known)}" if known else f"{path.parent} has no lists"
        raise InputError(f"{path}: there is no such split list ({there})")
    ids = _read_lines(path)
    if not ids:
        raise InputError(f"{path}: the split is empty; write one image id a line")
    for id in ids:
        if "\\" in id or ".." in PurePosixPath(id).parts or PurePosixPath(id).is_absolute():
            raise InputError(f"{path}: the id {id[:MAX_ID]!r} leads elsewhere; write names, and a/b for sub-folders")
        if len(id.encode()) > MAX_ID:
            raise InputError(f"{path}: the id {id[:20]!r}... has over {MAX_ID} bytes; write one image id a line")
    return ids


def read_class_names(path: Path) -> list[str]:
    """One class name a line, in the order of the ids. labelme's `__ignore__` is void and not counted."""
    if not is_file(path):
        raise InputError(f"{path}: missing; write one class name a line, in the order of the mask values")
    names = [name for name in _read_lines(path) if name != "__ignore__"]
    if not 2 <= len(names) <= VOID:
        raise InputError(f"{path}: {len(names)} classes; it takes 2 to {VOID}, for {VOID} is void")
    for name in names:
        if len(name) > MAX_CLASS_NAME:
            raise InputError(f"{path}: {name[:20]!r}... has over {MAX_CLASS_NAME} characters; write one name a line")
        if names.count(name) > 1:
            raise InputError(f"{path}: {name!r} stands there twice; give each class a name of its own")
    return names


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); save it as UTF-8") from None
    if "\0" in text:  # in UTF-16 every other byte of English text
        raise InputError(f"{path}: holds nul characters; save it as UTF-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
