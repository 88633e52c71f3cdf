"""Reads the polygons of labelme, COCO and YOLO-seg and draws them as masks, for `datasets.prepare.convert`."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.files import list_files, reading, upright_size
from datasets.folder import SPLITS, Place, in_split
from utils.errors import InputError


class Drawing(NamedTuple):
    """The objects of one image: (class name, parts). A part is an array of corners `[N, 2]`, or an RLE of COCO."""

    path: Path
    name: str
    size: tuple[int, int]  # (height, width)
    objects: list[tuple[str, list]]


def class_name(name: object) -> str:
    """Returns a class name without spaces around it; labelme's `_background_` and the like are `background`."""
    text = str(name).strip()
    return "background" if text.strip("_").lower() == "background" else text


def find_drawings(
    root: Path, places: list[Place], images: dict[str, Path], *, coco: list[str], names: list[str]
) -> tuple[list[Drawing], list[str]]:
    """Reads the JSON files in the places, or COCO's `FILE` or `SPLIT=FILE`; without any, YOLO's text files.

    names: labelme's classes in order. Returns the drawings, and the class names with background first.
    Raises InputError for damaged files, and for `names` that do not go with them.
    """
    drawings, categories, labels = [], {}, {}
    given = [re.fullmatch(r"(?:(\w+)=)?(.+)", text).groups("") for text in coco]
    for name, path in [(f"{split}/", Path(file)) for split, file in given] or _list(places, ".json"):
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            keys = set(content) if isinstance(content, dict) else set()
            if given or {"images", "annotations", "categories"} <= keys:
                categories |= {(entry["id"], class_name(entry["name"])): path for entry in content["categories"]}
                drawings += _coco(path, content, name.rpartition("/")[0])
            elif "shapes" in keys:
                drawings.append(_labelme(path, content, name))
                labels = {label: path for label, _ in drawings[-1].objects} | labels
    if not drawings and (classes := _yolo_names(root)):
        categories = dict.fromkeys(classes.items())
        found = [(in_split(name), path) for name, path in _list(places, ".txt")]
        drawings = [_yolo(path, classes, name, images[name]) for name, path in found if name in images]
    if drawings and names and categories:
        raise InputError("--names: COCO and YOLO bring their own names; leave it out")
    order = [class_name(name) for name in names] or [name for _, name in sorted(categories)] or sorted(labels)
    order = list(dict.fromkeys(["background", *order]))
    if missing := [label for label in labels if label not in order]:
        raise InputError(f"{labels[missing[0]]}: label {missing[0]!r} is not in --names; add it")
    return drawings, order


def _list(places: list[Place], suffix: str) -> list[tuple[str, Path]]:
    found = [(place.prefix, list_files(place.masks, (suffix,))) for place in places]
    return [(prefix + name, path) for prefix, by_name in found for name, paths in by_name.items() for path in paths]


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
    return Drawing(path, name, (int(content["imageHeight"]), int(content["imageWidth"])), objects)


def _coco(path: Path, content: dict, inside: str) -> list[Drawing]:
    # The file's own name may say the split: instances_train2017.json.
    inside = inside or next((word for word in re.split("[^a-z]+", path.stem.lower()) if word in SPLITS), "")
    names = {category["id"]: class_name(category["name"]) for category in content["categories"]}
    objects, drawings = defaultdict(list), []
    for annotation in content["annotations"]:
        parts = annotation.get("segmentation") or []
        parts = [parts] if isinstance(parts, dict) else [np.array(part, float).reshape(-1, 2) for part in parts]
        objects[annotation["image_id"]].append((names[annotation["category_id"]], parts))
    for image in content["images"]:
        name = Path(inside, image["file_name"].replace("\\", "/")).with_suffix("").as_posix()
        drawings.append(Drawing(path, name, (int(image["height"]), int(image["width"])), objects[image["id"]]))
    return drawings


def _yolo(path: Path, classes: dict[int, str], name: str, image: Path) -> Drawing:
    (height, width), objects = upright_size(image), []
    with reading(path):
        for line in filter(str.strip, path.read_text(encoding="utf-8-sig").splitlines()):
            number, *values = line.split()
            corners = np.array(values, float).reshape(-1, 2) * (width, height)  # a box has two pairs of numbers
            objects.append((classes[int(number)], [corners] if len(corners) > 2 else []))
    return Drawing(path, name, (height, width), objects)


def _yolo_names(root: Path) -> dict[int, str]:
    """Reads `names` of the YAML file in the folder or the one above it; empty if there is none."""
    for path in (path for place in (root, root.resolve().parent) for path in sorted(place.glob("*.y*ml"))):
        with reading(path):
            try:
                import yaml
            except ImportError:
                raise InputError(f"{path}: YOLO's names need a package; pip install pyyaml") from None
            content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
            if names := content.get("names") if isinstance(content, dict) else None:
                names = names if isinstance(names, dict) else dict(enumerate(names))
                return {int(number): class_name(name) for number, name in names.items()}
    return {}


def draw(drawing: Drawing, names: list[str]) -> np.ndarray:
    """Draws the objects as indices of `names`, int32 `[H, W]`, background 0; larger ones first."""
    height, width = drawing.size
    canvas, objects = np.zeros(height * width, np.int32), []
    with reading(drawing.path):
        for name, parts in drawing.objects:
            pixels = [(_decode if isinstance(part, dict) else _fill)(part, height, width) for part in parts]
            objects.append((names.index(name), np.concatenate([np.zeros(0, int), *pixels])))
    for index, pixels in sorted(objects, key=lambda object: -len(object[1])):
        canvas[pixels] = index
    return canvas.reshape(height, width)


def _fill(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the flat indices of the pixels whose centres a polygon `[N, 2]` encloses, by the even-odd rule."""
    if not np.isfinite(corners).all():
        raise ValueError("a coordinate is not finite")
    flips = np.zeros((height, width + 1), bool)  # where a row enters or leaves the polygon
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        rows = np.arange(*np.clip(np.ceil([min(y0, y1) - 0.5, max(y0, y1) - 0.5]), 0, height).astype(int))
        columns = np.ceil(x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0) - 0.5) if rows.size else rows
        flips[rows, columns.clip(0, width).astype(int)] ^= True
    return np.flatnonzero(np.logical_xor.accumulate(flips, axis=1)[:, :-1])


def _decode(rle: dict, height: int, width: int) -> np.ndarray:
    """Returns the flat indices of the pixels in an RLE of COCO, compressed or not."""
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
