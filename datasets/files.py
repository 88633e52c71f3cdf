"""Reads and checks the files of a data set. Every error names the file, the value and the fix."""

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
FULL_SCALE = {"I": (2**16 - 1, 2**31 - 1), "F": (1, 2**8 - 1, 2**16 - 1)}  # by the first letter of Pillow's mode
UNREADABLE = (Exception,)  # Pillow's forty decoders share no narrower base class for what they raise
MAX_ID = 240  # bytes; with a suffix and .tmp it still fits into a file name of 255
MAX_CLASS_NAME = 100  # characters; tables are as wide as the longest name

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
        raise InputError(f"{folder}: there is no such folder; the data must be in VOC layout (see the README)")
    return folder


@contextlib.contextmanager
def _opened(path: Path, kind: str, *, otherwise: str) -> Iterator[Image.Image]:
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


def read_image(path: Path, prepare: Callable[[Image.Image], Image.Image] | None = None) -> torch.Tensor:
    """Reads an image as uint8 RGB `[3, H, W]`, after `prepare` if given.

    Grey values of more than 8 bits are scaled by their bit depth. Floats and 32-bit integers have no fixed scale, so
    theirs is the smallest that no value exceeds: 1, 255 or 65535 for floats, 65535 or 2^31 - 1 for integers.
    Raises InputError, naming the file, if it cannot be read or has grey values below 0 or above full scale.
    """
    with _opened(path, "an image", otherwise="leave it out") as image:
        image = prepare(image) if prepare else image
        mode = image.mode[0]  # I;16 and its byte orders count as I
        # RGB stays as it is, because convert would copy it.
        as_is = mode in FULL_SCALE or image.mode == "RGB"
        pixels = np.array(image if as_is else image.convert("RGB"))  # [H, W] or [H, W, 3]
    if mode in FULL_SCALE:
        pixels = np.repeat(_to_8_bits(pixels, FULL_SCALE[mode], path)[..., None], 3, axis=2)  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, H, W], channels last in memory


def _to_8_bits(grey: np.ndarray, scales: tuple[int, ...], path: Path) -> np.ndarray:
    low, high = grey.min(), grey.max()
    full = next((scale for scale in scales if low >= 0 and high <= scale), None)  # None for NaN too
    if full is None:
        raise InputError(f"{path}: grey values {low} to {high} are not in 0..{scales[-1]}; save it with 8 or 16 bits")
    return np.rint(grey.astype(np.float32) * np.float32(255 / full)).astype(np.uint8)


def read_mask(path: Path, num_classes: int) -> torch.Tensor:
    """Reads a mask as uint8 class ids `[H, W]`, void 255.

    Raises InputError if the file is not an image, holds colours instead of ids, or holds any other value.
    """
    with _opened(path, "a mask", otherwise="remove its id from the list") as image:
        mode = image.mode
        mask = np.array(image)  # [H, W] in the modes that pass the check below
    if mode not in ("P", "L", "1", "I;16", "I"):
        raise InputError(f"{path}: has mode {mode}, but a mask holds class ids; save it as a palette or grey PNG")
    # TIFF allows negative values.
    stray = mask[((mask >= num_classes) & (mask != VOID)) | (mask < 0)]
    if stray.size:
        raise InputError(
            f"{path}: value {int(stray[0])} is neither a class (0..{num_classes - 1}) nor void ({VOID}); "
            "fix the mask, or add the class to class_names.txt"
        )
    return torch.from_numpy(mask.astype(np.uint8))


def read_size(path: Path) -> tuple[int, int]:
    """Reads (height, width) of a mask from the file header. Raises InputError if the file is not an image."""
    with _opened(path, "a mask", otherwise="remove its id from the list") as image:
        return image.height, image.width


def require_one_size(image: torch.Tensor, mask: torch.Tensor, mask_path: Path) -> None:
    """Raises InputError unless the image `[3, H, W]` and its mask `[H, W]` have the same size."""
    if image.shape[-2:] != mask.shape:
        raise InputError(
            f"{mask_path}: the mask is {mask.shape[1]}x{mask.shape[0]}, its image "
            f"{image.shape[2]}x{image.shape[1]}; they must have the same size"
        )


def read_ids(path: Path) -> list[str]:
    """Reads a split list: one image id per line. An id may include sub-folders, as in `street/0001`.

    Raises InputError for an id that points outside the data folders, because results are saved under their ids.
    """
    if not is_file(path):
        known = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise InputError(f"{path}: there is no such split list; {path.parent} has {', '.join(known) or 'none'}")
    ids = _read_lines(path)
    if not ids:
        raise InputError(f"{path}: the split is empty; write one image id per line")
    for id in ids:
        if "\\" in id or ".." in PurePosixPath(id).parts or PurePosixPath(id).is_absolute():
            raise InputError(f"{path}: the id {id[:MAX_ID]!r} points outside the data; write names, or folder/name")
        if len(id.encode()) > MAX_ID:
            raise InputError(f"{path}: the id {id[:20]!r}... is longer than {MAX_ID} bytes; write one id per line")
    return ids


def read_class_names(path: Path) -> list[str]:
    """Reads one class name per line, in the order of their ids. labelme's `__ignore__` means void: not a class."""
    if not is_file(path):
        raise InputError(f"{path}: missing; write one class name per line, in the order of the mask values")
    names = [name for name in _read_lines(path) if name != "__ignore__"]
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
