"""Reads the polygons of labelme, COCO and YOLO-seg and draws them as masks, for `datasets.prepare.convert`."""

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.files import UNREADABLE
from utils.errors import InputError

# An entry of a YAML list or dictionary, on one line or several, with or without quotes.
YAML_NAME = re.compile(r"""(?:-\s+|(\d+)\s*:\s*)?(?:'([^']*)'|"([^"]*)"|([^\s,\[\]{}'"-][^,\[\]{}\n]*))""")


class Drawing(NamedTuple):
    """The objects of one image: (class name, parts). A part is an array of corners `[N, 2]`, or an RLE of COCO.

    name: path of the image without its suffix. size: (width, height) of the coordinates; None if they are fractions.
    """

    path: Path
    name: str
    size: tuple[int, int] | None
    objects: list[tuple[str, list]]


def class_name(name: object) -> str:
    """Returns a class name without spaces around it; labelme's `_background_` and the like are `background`."""
    text = str(name).strip()
    return "background" if text.strip("_").lower() == "background" else text


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns any error inside the block into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be read ({reason}); export it again, or move it away") from None


def find_drawings(
    folder: Path, files: list[tuple[str, Path]], *, coco: list[str], names: list[str]
) -> tuple[list[Drawing], list[str]]:
    """Reads annotations: JSON and text `files`, (name, path), in `folder`, or only COCO's `FILE` or `SPLIT=FILE`.

    names: labelme's classes in order. Returns the drawings, and the class names with background first.
    Raises InputError for damaged files, and for `names` that do not go with them.
    """
    drawings, categories, labels = [], {}, {}
    given = [(f"{split}/", Path(file)) for split, _, file in (text.rpartition("=") for text in coco)]
    for name, path in given or [(name, path) for name, path in files if path.suffix.lower() == ".json"]:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            keys = set(content) if isinstance(content, dict) else set()
            if given or {"images", "annotations", "categories"} <= keys:
                categories |= {(entry["id"], class_name(entry["name"])): path for entry in content["categories"]}
                drawings += _coco(path, content, name.rpartition("/")[0])
            elif "shapes" in keys:
                drawings.append(_labelme(path, content, name))
                labels = {label: path for label, _ in drawings[-1].objects} | labels
    if not drawings and (classes := _yaml_names(folder)):
        categories = dict.fromkeys(classes.items(), folder)
        drawings = [_yolo(path, classes, name) for name, path in files if path.suffix.lower() == ".txt"]
    if drawings and names and categories:
        raise InputError("--names: COCO and YOLO bring their own names; leave it out")
    order = [class_name(name) for name in names] or [name for _, name in sorted(categories)] or sorted(labels)
    order = list(dict.fromkeys(["background", *order]))
    if missing := [label for label in labels if label not in order]:
        raise InputError(f"{labels[missing[0]]}: label {missing[0]!r} is not in --names; add it")
    return drawings, order


def _labelme(path: Path, content: dict, name: str) -> Drawing:
    objects = []
    for shape in content["shapes"]:
        kind, corners = shape.get("shape_type") or "polygon", np.array(shape["points"], float).reshape(-1, 2)
        if kind == "circle":
            angles, radius = np.linspace(0, 2 * np.pi, 128, endpoint=False), np.hypot(*(corners[1] - corners[0]))
            corners = corners[0] + radius * np.stack([np.cos(angles), np.sin(angles)], 1)  # [128, 2]
        elif kind == "rectangle":
            (left, top), (right, bottom) = corners.min(0), corners.max(0)
            corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        has_area = len(corners) > 2 and kind not in ("linestrip", "points", "mask")
        objects.append((class_name(shape["label"]), [corners] if has_area else []))
    return Drawing(path, name, (int(content["imageWidth"]), int(content["imageHeight"])), objects)


def _coco(path: Path, content: dict, inside: str) -> list[Drawing]:
    names = {category["id"]: class_name(category["name"]) for category in content["categories"]}
    objects, drawings = defaultdict(list), []
    for annotation in content["annotations"]:
        parts = annotation.get("segmentation") or []
        parts = [parts] if isinstance(parts, dict) else [np.array(part, float).reshape(-1, 2) for part in parts]
        objects[annotation["image_id"]].append((names[annotation["category_id"]], parts))
    for image in content["images"]:
        name = Path(inside, image["file_name"].replace("\\", "/")).with_suffix("").as_posix()
        drawings.append(Drawing(path, name, (int(image["width"]), int(image["height"])), objects[image["id"]]))
    return drawings


def _yolo(path: Path, classes: dict[int, str], name: str) -> Drawing:
    objects = []
    with reading(path):
        for line in filter(str.strip, path.read_text(encoding="utf-8-sig").splitlines()):
            number, *values = line.split()
            corners = np.array(values, float).reshape(-1, 2)  # a box has two pairs of numbers
            objects.append((classes[int(number)], [corners] if len(corners) > 2 else []))
    return Drawing(path, name, None, objects)


def _yaml_names(folder: Path) -> dict[int, str]:
    """Reads `names:` of the YAML file in the folder or up to two above it; empty if there is none."""
    for path in (path for place in (folder, *folder.resolve().parents[:2]) for path in sorted(place.glob("*.y*ml"))):
        with reading(path):
            text = re.sub(r"(^|\s)#.*", "", path.read_text(encoding="utf-8-sig"))
            # Further lines of the entry are indented, items of a list, or its end.
            if entry := re.search(r"^names:(.*(?:\n(?:[ \t\-\]}].*)?)*)", text, re.M):
                found = enumerate(YAML_NAME.findall(entry[1]))
                return {int(number or place): class_name(a or b or c) for place, (number, a, b, c) in found}
    return {}


def draw(drawing: Drawing, size: tuple[int, int], names: list[str]) -> np.ndarray:
    """Draws the objects as indices of `names`, int32 `[H, W]`, background 0; larger ones first.

    A pixel belongs to a polygon if its centre does. `size`, (width, height), is the image's, for fractions.
    """
    width, height = drawing.size or size
    with reading(drawing.path):
        canvas, objects = np.zeros(height * width, np.int32), []
        for name, parts in drawing.objects:
            scale = 1 if drawing.size else size
            pixels = [
                _decode(part, width, height) if isinstance(part, dict) else _fill(part * scale, width, height)
                for part in parts
            ]
            objects.append((names.index(name), np.concatenate([np.zeros(0, int), *pixels])))
    for index, pixels in sorted(objects, key=lambda object: -len(object[1])):
        canvas[pixels] = index
    return canvas.reshape(height, width)


def _fill(corners: np.ndarray, width: int, height: int) -> np.ndarray:
    """Fills a polygon `[N, 2]` by the even-odd rule; returns the flat indices of its pixels, `[pixels]`."""
    if not np.isfinite(corners).all():
        raise ValueError("a coordinate is not finite")
    bounds = np.clip(np.ceil([corners.min(0) - 0.5, corners.max(0) - 0.5]), 0, (width, height)).astype(int)
    (left, top), (right, bottom) = bounds
    flips = np.zeros((bottom - top, right - left + 1), bool)  # where a row enters or leaves the polygon
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        (x0, y0), (x1, y1) = sorted((start, end), key=lambda corner: corner[1])
        rows = np.arange(*np.clip(np.ceil([y0 - 0.5, y1 - 0.5]), top, bottom).astype(int))
        if rows.size:
            columns = np.ceil(x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0) - 0.5).clip(left, right)
            flips[rows - top, columns.astype(int) - left] ^= True
    rows, columns = np.nonzero(np.logical_xor.accumulate(flips, axis=1)[:, :-1])
    return (rows + top) * width + columns + left


def _decode(rle: dict, width: int, height: int) -> np.ndarray:
    """Decodes an RLE of COCO, compressed or not; returns the flat indices of its pixels, `[pixels]`."""
    counts = rle["counts"]
    if isinstance(counts, str):
        # 5 bits a character, little end first, signed; from the third on a difference to the count before the last
        # (rleFrString in COCO's maskApi.c).
        text, counts, value, shift = counts, [], 0, 0
        for code in (character - 48 for character in text.encode()):
            value, shift = value | (code & 31) << shift, shift + 5
            if not code & 32:
                value -= (code & 16) and 1 << shift
                counts.append(value + (counts[-2] if len(counts) > 2 else 0))
                value = shift = 0
    mask = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    if list(rle["size"]) != [height, width] or mask.size != height * width:
        raise ValueError(f"an RLE of size {rle['size']} does not cover an image of {width}x{height}")
    return np.flatnonzero(mask.reshape(width, height).T)  # columns first
