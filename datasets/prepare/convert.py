"""Converts masks as other tools write them to the VOC layout that training reads.

    python -m datasets.prepare.convert --images photos --masks masks --out my_data      # --dry_run only looks
    python -m datasets.prepare.convert --images photos --masks cvat/SegmentationClass --out my_data
    python -m datasets.prepare.convert --images photos --out my_data          # labelme: JSON beside the images
    python -m datasets.prepare.convert --images photos --coco annotations.json --out my_data
    python -m datasets.prepare.convert --images export --out my_data          # Roboflow: COCO or YOLO-seg
    python main.py --dataset folder --data_root my_data

In colour masks fully transparent pixels count as black, because nobody painted them. With JPEG noise or soft edges a
class is a colour that fills areas; other pixels get the class beside them whose colour is nearest. Images that EXIF
data turn are written upright with their masks.
"""

import contextlib
import re
import shutil
import tempfile
import unicodedata
from argparse import ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from datasets.files import IMAGE_SUFFIXES, MAX_CLASS_NAME, UNREADABLE, VOID, is_folder, read_ids, read_image
from datasets.prepare.check import check_dataset, format_findings
from datasets.prepare.polygons import Drawing, class_name, draw, find_drawings, reading
from datasets.voc import voc_colormap
from utils.cli import Parser, any_path, friendly_errors
from utils.errors import InputError
from utils.files import cannot_write

GREY, DEEP = 0x010101, 1 << 24  # a grey or index v is kept as the colour v * GREY, or above 255 as DEEP + v
NEAR = 16  # near-duplicates of a colour differ by at most this much in each channel
EVEN = 4  # 3x3 pixels whose channels vary by no more are an area
SOFT = 8  # more colours than this without an area are JPEG noise or soft edges, not thin classes
SUFFIXES = {suffix.lower() for suffix in IMAGE_SUFFIXES}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PLAIN = (*SPLITS, "images", "labels", "masks", "annotations", "", ".", "..")  # folders that are no part of an id
VOIDS = ("void", "ignore", "__ignore__")  # classes of these names become 255
ORIENTATION = 0x112  # the EXIF tag


class Pair(NamedTuple):
    """An image with its mask: the file `source`, or a drawing read from it."""

    id: str
    image: Path
    source: Path
    drawing: Drawing | None
    split: str | None


def list_files(folder: Path, suffixes: set[str]) -> list[tuple[str, Path]]:
    """Finds files in a folder and below, without hidden ones; returns (name less folder and suffix, path)."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes and path.is_file()]
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    return [(name, path) for name, path in zip(names, paths, strict=True) if "/." not in f"/{name}"]


def split_name(name: str, ending: str) -> tuple[str | None, str, str]:
    """Returns the split that a folder names, an id made of split, other folders and stem, and the stem.

    The stem is the file name in Unicode's composed form, without `ending` and suffixes of images.
    """
    *folders, stem = unicodedata.normalize("NFC", name).split("/")
    stem = re.sub(rf"(.)({'|'.join(map(re.escape, (*SUFFIXES, ending)))})+$", r"\1", stem, flags=re.IGNORECASE)
    split = next((SPLITS[folder.lower()] for folder in folders if folder.lower() in SPLITS), None)
    return split, "_".join([*filter(None, [split]), *(f for f in folders if f.lower() not in PLAIN), stem]), stem


def find_pairs(args: Namespace, masks: Path, drawings: list[Drawing]) -> tuple[list[Pair], list[str]]:
    """Pairs images with drawings, or else with mask files; also returns lines about the files left out.

    A mask of `a.jpg` is called `a`, `a.jpg`, or either with `_mask`. It belongs to the image at the same place, or
    else to the only one of that name. Splits are those of folders, or of ImageSets/Segmentation beside the masks.
    Raises InputError if there are no pairs, or if anything has two partners.
    """
    folder, ending = Path(args.images), args.mask_suffix or "_mask"
    sources = [(drawing.name, drawing.path, drawing) for drawing in drawings]
    if not drawings:
        sources = [(name, path, None) for name, path in list_files(masks, SUFFIXES | {".gif"})]
        if args.mask_suffix or masks == folder:
            sources = [source for source in sources if source[0].lower().endswith(ending.lower())]
    taken, images, ids = {path for _, path, _ in sources}, {}, defaultdict(list)
    for name, path in list_files(folder, SUFFIXES):
        if path not in taken:
            split, id, stem = split_name(name, ending)
            ids[stem].append(id)
            if images.setdefault(id, (path, split))[0] != path:
                raise InputError(f"{path}: has the same name as {images[id][0]}; rename or move one of them")

    def find_id(name: str) -> str | None:
        split, id, stem = split_name(name, ending)
        others = [other for other in ids[stem] if None in (split, images[other][1])]
        return id if id in images else others[0] if len(others) == 1 else None

    found, lonely = {}, []
    for name, source, drawing in sources:
        if not (id := find_id(name)):
            lonely.append(name)
        elif id in found:
            raise InputError(f"{images[id][0]}: has two masks, {found[id].source} and {source}; leave one out")
        else:
            found[id] = Pair(id, images[id][0], source, drawing, images[id][1] or split_name(name, ending)[0])
    if not found:
        names = f"{min(images, default='no image')!r} and {min(lonely, default='no mask')!r}"
        advice = "give masks, labelme or COCO JSON, or YOLO txt with data.yaml; for other endings --mask_suffix"
        raise InputError(f"--masks {masks}: no mask is named as an image ({names}); {advice}")
    for path in masks.parent.glob("ImageSets/Segmentation/*.txt"):
        for id in filter(found.get, map(find_id, read_ids(path) if path.stem.lower() in SPLITS else ())):
            found[id] = found[id]._replace(split=SPLITS[path.stem.lower()])
    alone = {"images without a mask": sorted(images.keys() - found.keys()), "masks without an image": lonely}
    return list(found.values()), [
        f"{what}, left out ({len(n):,}): {', '.join(n[:5])}" for what, n in alone.items() if n
    ]


def read_frame(path: Path) -> tuple[tuple[int, int], int]:
    """Reads the upright (width, height) of an image and its EXIF orientation, 1 if it is stored upright."""
    orientation = 1
    with reading(path), Image.open(path) as image:
        if image.format == "TIFF":
            image.load()  # turns it
        else:
            with contextlib.suppress(*UNREADABLE):  # damaged EXIF data: viewers ignore them too
                orientation = image.getexif().get(ORIENTATION)
        size = image.size[::-1] if orientation in range(5, 9) else image.size
    return size, orientation if orientation in range(2, 9) else 1


def fit(values: np.ndarray, pair: Pair) -> np.ndarray:
    """Turns values `[H, W]` that fit only the stored pixels of the image with it. Raises InputError if none fit."""
    size, orientation = read_frame(pair.image)
    if values.shape == size != size[::-1] and orientation > 4:
        stored = Image.fromarray(values)
        stored.getexif()[ORIENTATION] = orientation
        values = np.array(ImageOps.exif_transpose(stored))
    if values.shape != size[::-1]:
        sizes = f"the mask is {values.shape[1]}x{values.shape[0]}, its image {pair.image} {size[0]}x{size[1]}"
        advice = "they must have the same size, export it again in that of the image"
        raise InputError(f"{pair.source}: {sizes}; {advice}")
    return values


def read_mask(path: Path, *, expand: bool) -> tuple[np.ndarray, bytes]:
    """Reads a mask file as int32 `[H, W]` of values (see GREY), and the palette if the values are indices.

    expand: replaces indices by their colours. Raises InputError, naming the file, for values that are not ids.
    """
    with reading(path), Image.open(path) as image:
        # Pillow spreads greys of 2 and 4 bits over 0..255.
        step = {"L;2": 85, "L;4": 17}.get(str(image.tile[0][3]) if image.tile else "", 1)
        image = ImageOps.exif_transpose(image)
        palette = bytes(image.getpalette("RGB")) if image.mode == "P" and not expand else b""
        if not palette and image.mode[0] not in "1IF" and image.mode != "L":
            pixels = np.array(image.convert("RGBA")).astype(np.int32)  # [H, W, 4]
            red, green, blue = (pixels[..., :3] * (pixels[..., 3:] > 0)).transpose(2, 0, 1)
            return red << 16 | green << 8 | blue, b""
        pixels = np.array(image.convert("L") if image.mode == "1" else image)
        values = pixels.astype(np.int32) // step
        if image.mode[0] in "IF" and not ((pixels == values) & (values >= 0) & (values < DEEP)).all():
            raise ValueError(f"{pixels.min()} to {pixels.max()} are no ids")
    return np.where(values > 255, DEEP + values, values * GREY), palette


def plain(value: int) -> int:
    """Returns the grey or index that a value stands for (see GREY)."""
    return value - DEEP if value >= DEEP else value & 255


def channels(values: np.ndarray | list[int]) -> np.ndarray:
    """Splits 0xRRGGBB `[...]` into red, green and blue, int32 `[..., 3]`."""
    return np.stack([np.asarray(values, np.int32) >> shift & 255 for shift in (16, 8, 0)], -1)


def around(values: np.ndarray) -> list[np.ndarray]:
    """Returns nine views `[H, W, ...]`: each pixel and its neighbours, where the edge is repeated."""
    padded = np.pad(values, ((1, 1), (1, 1), *[(0, 0)] * (values.ndim - 2)), mode="edge")
    return [padded[y : y + values.shape[0], x : x + values.shape[1]] for y in range(3) for x in range(3)]


def is_even(values: np.ndarray) -> np.ndarray:
    """Whether the 3x3 pixels around each of `[H, W]` have nearly one colour."""
    nine = around(channels(values).astype(np.uint8))  # [H, W, 3] each
    return (np.maximum.reduce(nine) - np.minimum.reduce(nine) <= EVEN).all(-1)


class Scan:
    """Counts the pixels with each value, and those in `areas` of 3x3 and more; `..._rows` are the pairs with them.

    coloured: values that are no greys. soft: whether there is JPEG noise, or edges are soft. conflict: files whose
    palettes cannot be read as ids.
    """

    def __init__(self, pairs: list[Pair], read: Callable) -> None:
        self.pixels, self.areas, self.conflict, first = Counter(), Counter(), "", {}
        self.pixel_rows, self.area_rows = defaultdict(set), defaultdict(set)
        for row, pair in enumerate(tqdm(pairs, desc="reading masks", unit="mask", disable=None)):
            values, palette = read(pair)
            even = values[:0] if pair.drawing else values[is_even(values)]
            for part, counter, rows in ((values, self.pixels, self.pixel_rows), (even, self.areas, self.area_rows)):
                for value, count in zip(*(a.tolist() for a in np.unique(part, return_counts=True)), strict=True):
                    counter[value] += count
                    rows[value].add(row)
            for value in np.unique(values).tolist() if palette else ():
                colour = palette[3 * plain(value) : 3 * plain(value) + 3]
                if first.setdefault(value, (colour, pair.source))[0] != colour:
                    self.conflict = f" (the palettes of {first[value][1]} and {pair.source} differ)"
        self.coloured = [value for value in self.pixels if value < DEEP and value % GREY]
        if first and self.coloured:
            self.conflict = f" (some files have colours, others palettes, such as {first.popitem()[1][1]})"
        lossy = any(pair.source.suffix.lower() in (".jpg", ".jpeg") for pair in pairs)
        self.soft = lossy or sum(not self.areas[value] for value in self.pixels) > SOFT

    def count(self, values: list[int]) -> int:
        return sum(self.pixels[value] for value in values)

    def colours(self, named: list[int]) -> list[int]:
        """Returns the colours of classes: `named`, then all others, the most frequent first."""
        colours, least = list(named), 1e-4 * self.pixels.total() if self.soft else 0 if named else -1
        for value in [value for value, _ in self.pixels.most_common() if self.areas[value] > least]:
            rivals = channels(colours if self.soft else named)
            if not (np.abs(rivals - channels(value)).max(-1) <= NEAR).any():
                colours.append(value)
        return colours


def find_kind(scan: Scan, args: Namespace) -> str | None:
    """Returns the kind of the masks from their content, None if it is unclear."""
    values = {plain(value) for value in scan.pixels}
    if scan.conflict or scan.coloured:
        return None if scan.conflict else "colours"
    if values in ({0, 255}, {0, 65535}):
        return "binary"
    if args.first_id or (args.names and max(values - {VOID}, default=0) <= len(args.names)):
        return "ids"
    ends = {round(value / 255) if min(value, 255 - value) <= NEAR else 2 for value in map(plain, scan.colours([]))}
    return "binary" if scan.soft and ends == {0, 1} else "instances" if len(values) > VOID + 1 else None


def classify_values(scan: Scan, kind: str, args: Namespace) -> tuple[list[str], dict[int, int]]:
    """Returns class names and the index of the class of each value, the number of classes for void.

    Raises InputError for an id without a name, and for flags that do not go with the kind.
    """
    names, first = args.names, args.first_id
    if kind != "ids":
        if len(names) > 2:
            raise InputError(f"--names: these masks are {kind}, so there are two classes; give one name or two")
        levels = {value: plain(value) if value >= DEEP else channels(value).max() for value in scan.pixels}
        least = 1 if kind == "instances" else (max(levels.values()) + 1) // 2
        names = names if len(names) == 2 else ["background", *(names or ["object"])]
        return names, {value: int(level >= least) for value, level in levels.items()}
    if scan.coloured:
        raise InputError(f"--kind ids: the masks have colours, such as #{scan.coloured[0]:06x}; give --kind colours")
    ids = sorted({plain(value) for value in scan.pixels} - {VOID, *range(first)})
    if len(names) == max(ids, default=0) and not first:
        advice = "put `background` first, or add --first_id 1, which makes 0 void"
        raise InputError(f"--names: has {len(names)} for ids 0 to {len(names)}; {advice}")
    order = [*range(first, first + len(names))] or ids
    if missing := sorted(set(ids) - set(order)):
        raise InputError(f"--names: has {len(names)}, none for id {missing[0]}; add names, or give another --kind")
    return names or [*map(str, ids)], {value: [*order, plain(value)].index(plain(value)) for value in scan.pixels}


def classify_colours(
    scan: Scan, args: Namespace, named: dict[str, int]
) -> tuple[list[str], dict[int, int], list[int]]:
    """Returns class names, the index of the class of each value, -1 if the pixels beside tell it, and the colours.

    named: the colours of classes. Raises InputError for a colour without a name, and for --names.
    """
    if args.names or max(scan.pixels) >= DEEP:
        advice = "leave it out, and name colours with --colours name=#rrggbb"
        raise InputError(f"--names: these masks are colours (the greatest grey is 255); {advice}")
    values, colours = list(scan.pixels), scan.colours(list(named.values()))
    if extra := [f"#{colour:06x}" for colour in colours[len(named) :] if named]:
        raise InputError(f"--colours: {', '.join(extra[:5])} has no name; add {extra[0]} with its name")
    colours = colours if named else sorted(colours, key=bool)  # black first
    distances = np.stack([np.abs(channels(values) - channels(colour)).max(-1) for colour in colours])  # [C, values]
    index = np.where(distances.min(0) <= NEAR, distances.argmin(0), -1).tolist()
    names = list(named) or [f"#{colour:06x}" if colour else "background" for colour in colours]
    return names, dict(zip(values, index, strict=True)), colours


def merge(classes: np.ndarray, values: np.ndarray, colours: list[int]) -> np.ndarray:
    """Gives each unsure pixel of `classes` `[H, W]` that class among its neighbours whose colour is nearest.

    Sure are pixels of exactly the colour of their class, and those in the middle of nine of one class.
    """
    flat = np.logical_and.reduce([other == classes for other in around(classes)])
    classes = np.where((classes >= 0) & (flat | (values == np.array(colours)[classes])), classes, -1)
    while (classes < 0).any():
        unsure = np.nonzero(classes < 0)
        options = np.stack([other[unsure] for other in around(classes)], 1)  # [N, 9]
        if (options < 0).all():
            options = np.broadcast_to(np.arange(len(colours)), (len(options), len(colours)))  # [N, C]
        distances = np.abs(channels(colours)[options] - channels(values[unsure])[:, None]).sum(-1)
        nearest = (distances + 1000 * (options < 0)).argmin(1)
        classes[unsure] = options[np.arange(len(options)), nearest]
    return classes


def write_pair(draft: Path, pair: Pair, ids: np.ndarray, palette: np.ndarray) -> None:
    """Writes the mask, and the image: turned upright if need be, otherwise the same bytes."""
    mask, copy = Image.fromarray(ids), draft / "JPEGImages" / f"{pair.id}{pair.image.suffix.lower()}"
    mask.putpalette(palette.tobytes())
    mask.save(draft / "SegmentationClass" / f"{pair.id}.png")
    shutil.copyfile(pair.image, copy)
    if read_frame(pair.image)[1] > 1:
        with reading(pair.image), Image.open(pair.image) as image:
            ImageOps.exif_transpose(image).save(copy, quality=95)


def draw_preview(draft: Path, pairs: list[Pair], names: dict[int, str], palette: np.ndarray) -> None:
    """Draws images beside their masks, with the colours of the classes."""
    wide, high, font = 320, 240, ImageFont.load_default(16)
    width = 2 * wide + 40 + round(max(map(font.getlength, names.values())))
    sheet = Image.new("RGB", (width, max(len(pairs) * high, 24 * len(names) + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, pair in enumerate(pairs):
        image = read_image(draft / "JPEGImages" / f"{pair.id}{pair.image.suffix.lower()}").permute(1, 2, 0)
        with Image.open(draft / "SegmentationClass" / f"{pair.id}.png") as mask:
            pictures = (
                (Image.fromarray(image.numpy()), Image.Resampling.BICUBIC),
                (mask.convert("RGB"), Image.Resampling.NEAREST),
            )
        for column, (picture, method) in enumerate(pictures):
            sheet.paste(ImageOps.contain(picture, (wide - 8, high - 8), method), (column * wide, row * high))
    for row, (id, name) in enumerate(names.items()):
        pen.rectangle((2 * wide, 24 * row + 4, 2 * wide + 24, 24 * row + 22), tuple(palette[id].tolist()), "black")
        pen.text((2 * wide + 32, 24 * row + 3), name, "black", font)
    sheet.save(draft / "preview.png")


def table(rows: list[tuple[str, str, int, int]], total: int) -> str:
    """Formats rows of value, class, pixels (a share of `total`) and files."""
    width = max(len(name) for _, name, _, _ in rows)
    lines = [f"{value:>12} > {name:<{width}} {n / total:>8.2%} {files:>7,}" for value, name, n, files in rows]
    return "\n".join([f"{'value':>12} > {'class':<{width}} {'pixels':>8} {'files':>7}", *lines])


def read_labelmap(masks: Path) -> dict[str, int]:
    """Reads the names of colours from CVAT's labelmap.txt in or beside the masks, background first; {} without it."""
    named = {}
    for path in (masks.parent / "labelmap.txt", masks / "labelmap.txt"):
        with reading(path):
            lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
            for name, colour, *_ in (line.split(":") for line in lines if line.strip() and line[0] != "#"):
                named[class_name(name)] = int.from_bytes(bytes(map(int, colour.split(","))))
    return dict(sorted(named.items(), key=lambda item: item[0] != "background"))


def names_of(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def colour_names(text: str) -> dict[str, int]:
    """Parses `name=#rrggbb,...`: an argparse type."""
    found = [re.fullmatch(r"\s*(.+?)=#([0-9a-fA-F]{6})\s*", item) for item in text.split(",")]
    if not all(found) or len({match[1] for match in found}) < len(found):
        raise ArgumentTypeError(f"{text!r}: give name=#rrggbb,name=#rrggbb, each name once")
    return {match[1]: int(match[2], 16) for match in found}


def convert(args: Namespace) -> None:
    """Runs the command line at the top of the file. Raises InputError for input that cannot be used."""
    out, folder, masks = Path(args.out), Path(args.images), Path(args.masks or args.images)
    masks = masks / "SegmentationClass" if is_folder(masks / "SegmentationClass") else masks
    if out.exists():
        raise InputError(f"--out {out}: exists already; choose another folder, or delete it")
    for flag, source in (("--images", folder), ("--masks", masks)):
        if not is_folder(source):
            raise InputError(f"{flag} {source}: there is no such folder; check the path")
        if out.resolve().is_relative_to(source.resolve()):
            raise InputError(f"--out {out}: lies inside {flag}, which is only read; choose another folder")
    # What are the annotations, and which image does each belong to?
    drawings, names, colours = [], [], []
    if args.coco and (args.kind or args.colours):
        raise InputError("--coco: has polygons; leave out --kind and --colours")
    if not (args.kind or args.colours):
        stems = {split_name(name, "")[2] for name, _ in list_files(folder, SUFFIXES)}
        texts = [(name, path) for name, path in list_files(masks, {".txt"}) if split_name(name, "")[2] in stems]
        files = [*list_files(masks, {".json"}), *texts]
        drawings, names = find_drawings(masks, files, coco=args.coco, names=args.names)
    pairs, notes = find_pairs(args, masks, drawings)
    named = args.colours or ({} if drawings or args.kind not in (None, "colours") else read_labelmap(masks))

    def read(pair: Pair) -> tuple[np.ndarray, bytes]:
        if pair.drawing:
            return draw(pair.drawing, read_frame(pair.image)[0], names), b""
        return read_mask(pair.source, expand=bool(named) or args.kind == "colours")

    # Which values do they have, and which class is each?
    scan = Scan(pairs, read)
    kind = "polygons" if drawings else "colours" if named else args.kind or find_kind(scan, args)
    if kind is None:
        rows = [(str(plain(value)), "?", n, len(scan.pixel_rows[value])) for value, n in scan.pixels.most_common(20)]
        print(table(rows, scan.pixels.total()))
        advice = "pass --kind ids, colours, binary or instances, and for ids --names"
        raise InputError(f"--masks {masks}: it is unclear what these values are{scan.conflict}; {advice}")
    if args.first_id and kind != "ids":
        raise InputError(f"--first_id: goes with ids, and these masks are {kind}; leave it out")
    if kind == "colours":
        names, index, colours = classify_colours(scan, args, named)
    elif kind == "polygons":
        index = {value: value for value in scan.pixels}
    else:
        names, index = classify_values(scan, kind, args)
    used = {*index.values(), 0} if kind in ("colours", "polygons") else range(len(names))
    kept = [place for place, name in enumerate(names) if place in used and name.lower() not in VOIDS]
    if not 2 <= len(kept) <= VOID:
        raise InputError(
            f"--masks {masks}: classes found as {kind}: {len(kept)}; 2 to {VOID} are needed, check --kind"
        )
    for name in [name for name in names if names.count(name) > 1 or not 0 < len(name) <= MAX_CLASS_NAME]:
        raise InputError(f"class name {name[:20]!r}: is empty, too long or there twice; change it")
    ids, palette = np.full(len(names) + 1, VOID, np.uint8), voc_colormap()
    ids[kept] = range(len(kept))
    palette[: len(kept)] = channels(colours)[kept] if colours else palette[: len(kept)]
    # What does each class consist of?
    classes = {id: names[place] for id, place in enumerate(kept)} | {VOID: "void"}
    values = {id: sorted(value for value in index if index[value] >= 0 and ids[index[value]] == id) for id in classes}
    showing = scan.area_rows if colours and scan.soft else scan.pixel_rows
    files = {id: set().union(*(showing[value] for value in values[id])) for id in classes}
    rows = []
    for id in [id for id in classes if id != VOID or values[VOID]]:
        text = "..".join(map(str, dict.fromkeys(map(plain, (*values[id][:1], *values[id][-1:])))))
        text = f"#{max(values[id], key=scan.pixels.get):06x}" if colours else "" if drawings else text
        rows.append((text, f"{id} {classes[id]}", scan.count(values[id]), len(files[id])))
    if merged := [value for value in scan.pixels if colours and value not in colours]:
        edges = scan.count([value for value in merged if index[value] < 0]) / scan.pixels.total()
        notes.append(
            f"near-duplicate colours, merged: {len(merged):,}; {edges:.2%} of the pixels get the class beside"
        )
    if colours and not named:
        notes.append("classes are named by their colours; --colours NAME=#RRGGBB,... names them")
    if unused := [name for place, name in enumerate(names) if place not in used]:
        notes.append(f"classes without a pixel, left out ({len(unused):,}): {', '.join(unused)}")
    if empty := sum(not parts for drawing in drawings for _, parts in drawing.objects):
        notes.append(f"shapes without an area, left out ({empty:,}): boxes, lines, points or labelme's masks")
    splits = sorted({pair.split for pair in pairs if pair.split})
    splits = splits if len(splits) > 1 else []
    if splits and (unlisted := [pair.id for pair in pairs if not pair.split]):
        notes.append(f"pairs in no split, so in no list ({len(unlisted):,}): {', '.join(unlisted[:5])}")
    if splits and "val" not in splits:
        notes.append(f"there is no list val; train with --val_split {splits[0]}")
    print(f"pairs: {len(pairs):,}, kind: {kind}", table(rows, scan.pixels.total()), *notes, sep="\n")
    if args.dry_run:
        return
    # Write it, whole or not at all.
    keys = np.array(sorted(index))
    places = np.array([index[key] for key in keys.tolist()])
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.resolve().parent) as staging:
            draft = Path(staging) / out.name
            for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
                (draft / part).mkdir(parents=True)
            for pair in tqdm(pairs, desc="converting", unit="pair", disable=None):
                found = fit(read(pair)[0], pair)
                found_places = places[np.searchsorted(keys, found)]
                write_pair(
                    draft, pair, ids[merge(found_places, found, colours) if colours else found_places], palette
                )
            (draft / "class_names.txt").write_text("".join(f"{names[place]}\n" for place in kept), encoding="utf-8")
            for split in splits:
                text = "".join(f"{pair.id}\n" for pair in pairs if pair.split == split)
                (draft / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text, encoding="utf-8")
            most = [row for row, _ in Counter(row for rows in files.values() for row in sorted(rows)).most_common(4)]
            shown = {id: f"{id} {classes[id]}" for id in classes if not files[id].isdisjoint(most)}
            draw_preview(draft, [pairs[row] for row in most], shown, palette)
            draft.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from None
    findings, checked = check_dataset("folder", out)
    print("\n".join(format_findings(findings, checked)))
    if any(finding.fatal for finding in findings):
        raise InputError(f"{out}: is written, but training would fail; fix what the lines above call FATAL")
    print(f"next: look at {out / 'preview.png'}, then python main.py --dataset folder --data_root {out}")


@friendly_errors
def main(argv: list[str] | None = None) -> None:
    """Runs the command line above."""
    parser = Parser(prog="python -m datasets.prepare.convert", description="Convert masks to VOC layout.")
    add = parser.add_argument
    add("--images", required=True, type=any_path, metavar="DIR", help="images, perhaps in folders train/ and val/")
    add("--masks", type=any_path, metavar="DIR", help="masks or annotations, if they are not beside the images")
    add("--out", required=True, type=any_path, metavar="DIR", help="folder to write; it must not exist")
    add("--coco", action="append", default=[], metavar="FILE", help="COCO JSON, or SPLIT=FILE once per split")
    add("--kind", choices=("ids", "colours", "binary", "instances"), help="what the values of mask files are")
    add("--names", type=names_of, default=[], metavar="A,B", help="names of ids, or labelme's labels, in order")
    add("--colours", type=colour_names, metavar="A=#RRGGBB", help="names of colours, in order; greys too")
    add("--first_id", type=int, choices=(0, 1), default=0, help="1: ids begin at 1, and 0 is void")
    add("--mask_suffix", metavar="TEXT", help="what the names of masks add to those of images, such as _segmentation")
    add("--dry_run", action="store_true", help="print the table of classes, write nothing")
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    main()
