"""Converts masks as other tools write them to the VOC layout that training reads.

    python -m datasets.prepare.convert --images photos --masks masks --out my_data      # --dry_run only looks
    python -m datasets.prepare.convert --images export --out my_data      # all in one folder: CVAT, Roboflow, labelme
    python -m datasets.prepare.convert --images photos --coco annotations.json --out my_data
    python main.py --dataset folder --data_root my_data

Fully transparent pixels count as black. With JPEG noise or soft edges a class is a colour that fills areas; other
pixels get the class that is most frequent around them. Images that EXIF data turn are written upright.
"""

import contextlib
import re
import shutil
import tempfile
from argparse import ArgumentTypeError, Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

from datasets import files
from datasets.files import COLOUR, VOID, read_image
from datasets.folder import (
    SPLITS,
    Place,
    find_lists,
    find_pair,
    find_places,
    in_split,
    list_pairs,
    match,
    match_anywhere,
    split_of,
)
from datasets.prepare.check import check_dataset, format_findings
from datasets.prepare.polygons import Drawing, class_name, draw, find_drawings
from datasets.voc import voc_colormap
from utils.cli import Parser, any_path, friendly_errors
from utils.errors import InputError
from utils.files import cannot_write

NEAR = 16  # near-duplicates of a colour differ by at most this much in each channel
EVEN = 4  # 3x3 pixels whose channels vary by no more are an area
SOFT = 8  # more colours than this without an area are JPEG noise or soft edges, not thin classes
LEAST = 1e-4  # among those, a class has areas of at least this share of all pixels
VOIDS = ("void", "ignore", "__ignore__")  # classes of these names become 255


class Pair(NamedTuple):
    """An image with its mask: the file `source`, or a drawing read from it."""

    id: str
    image: Path
    source: Path
    drawing: Drawing | None
    split: str | None


def find_source(args: Namespace) -> tuple[Path, list[Place]]:
    """Returns the data folder, and where in it images and masks are. Raises InputError for paths of no use."""
    images, masks, out = Path(args.images), Path(args.masks or args.images), Path(args.out)
    if out.exists():
        raise InputError(f"--out {out}: exists already; choose another folder, or delete it")
    for flag, source in (("--images", images), ("--masks", masks)):
        if not files.is_folder(source):
            raise InputError(f"{flag} {source}: there is no such folder; check the path")
        if out.resolve().is_relative_to(source.resolve()):
            raise InputError(f"--out {out}: lies inside {flag}, which is only read; choose another folder")
    if not args.masks:
        return images, find_places(images)
    masks = (find_pair(masks) or (images, masks))[1]
    return masks.parent, [Place("", images, masks)]


def list_source(places: list[Place], suffix: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """Lists images and masks by name, see `in_split`. Raises InputError for two files of one name."""
    images, masks = {}, {}
    for place in places:
        for paths, found in zip((images, masks), list_pairs(place, suffix or "_mask"), strict=True):
            paths |= {in_split(place.prefix + name): files.only_path(same) for name, same in found.items()}
    masks = {name: path for name, path in masks.items() if name.lower().endswith(suffix.lower())}
    # Masks may lie in a folder inside that of the images.
    inside = {*masks.values()}
    return {name: path for name, path in images.items() if path not in inside}, masks


def find_pairs(
    images: dict[str, Path], sources: list[tuple[str, Path, Drawing | None]], *, lists: dict[str, Path], ending: str
) -> tuple[list[Pair], list[str]]:
    """Pairs images with masks or drawings by name; also returns lines about what is left out.

    Raises InputError if there are no pairs, or if an image has two masks.
    """
    by_stem, found, alone = defaultdict(list), {}, []
    for name in images:
        by_stem[name.rpartition("/")[2]].append(name)

    def partner(name: str) -> str | None:
        same = match(name, images, ending)
        return same if same in images else match_anywhere(name, by_stem, ending)

    for name, source, drawing in sources:
        own = partner(name)
        if own in found:
            raise InputError(f"{images[own]}: has two masks, {found[own].source} and {source}; leave one out")
        if own:
            found[own] = Pair(own.replace("/", "_"), images[own], source, drawing, split_of(own) or split_of(name))
        else:
            alone.append(name)
    if not found:
        names = f"{min(images, default='no image')!r} and {min(alone, default='no mask')!r}"
        advice = "give masks, labelme or COCO JSON, or YOLO txt with data.yaml; for other endings --mask_suffix"
        raise InputError(f"--masks: no mask is named as an image ({names}); {advice}")
    if len({pair.id for pair in found.values()}) < len(found):
        raise InputError("--images: two names are the same once / is _, as in a/b and a_b; rename one")
    for path in [path for path in lists.values() if path.stem.lower() in SPLITS]:
        for own in found.keys() & set(map(partner, files.read_ids(path, images))):
            found[own] = found[own]._replace(split=SPLITS[path.stem.lower()])
    notes = note("images without a mask, left out", sorted(images.keys() - found.keys()))
    return list(found.values()), notes + note("masks without an image, left out", alone)


def note(what: str, names: list[str]) -> list[str]:
    return [f"{what} ({len(names):,}): {', '.join(names[:5])}"] if names else []


def read(pair: Pair, *, names: list[str], expand: bool) -> np.ndarray:
    """Reads or draws a mask upright, int32 `[H, W]` of values. Raises InputError if its image has another size."""
    values = draw(pair.drawing, names) if pair.drawing else files.read_values(pair.source, expand=expand)
    size, _, orientation = files.read_header(pair.image)
    upright = files.upright_size(pair.image)
    if values.shape == size != upright:
        values = np.array(Image.fromarray(values).transpose(files.TURNS[orientation]))
    if values.shape != upright:
        sizes = "the mask is {1}x{0}, its image {4} {3}x{2}".format(*values.shape, *upright, pair.image)
        raise InputError(f"{pair.source}: {sizes}; they must have the same size, export the mask again")
    return values


def channels(values: np.ndarray | list[int]) -> np.ndarray:
    """Splits values `[...]`, see `read_values`, into red, green and blue, int32 `[..., 3]`."""
    values = np.asarray(values, np.int32)
    values = np.where(values < COLOUR, np.minimum(values, 255) * 0x010101, values)
    return np.stack([values >> shift & 255 for shift in (16, 8, 0)], -1)


def variation(pixels: np.ndarray) -> np.ndarray:
    """Returns highest less lowest value of the 3x3 pixels around each of `[H, W]` or `[H, W, 3]`, uint8."""
    image = Image.fromarray(pixels.astype(np.uint8))
    return np.array(image.filter(ImageFilter.MaxFilter(3))) - np.array(image.filter(ImageFilter.MinFilter(3)))


class Scan:
    """The `values` of all masks, their numbers of `pixels`, and how many of these lie in `areas` of 3x3; all `[V]`.

    soft: whether there is JPEG noise, or edges are soft. masks: the values of each mask; if soft, those of areas.
    conflict: files whose palettes cannot be read as ids.
    """

    def __init__(self, pairs: list[Pair], names: list[str], *, expand: bool, palettes: bool) -> None:
        found, even, seen, self.conflict = [], [], {}, ""
        for pair in tqdm(pairs, desc="reading masks", unit="mask", disable=None):
            mask = read(pair, names=names, expand=expand)
            inside = mask if pair.drawing else mask[(variation(channels(mask)) <= EVEN).all(-1)]
            found.append(np.unique(mask, return_counts=True))
            even.append(np.unique(inside, return_counts=True))
            palette = files.read_palette(pair.source) if palettes else None
            for value in found[-1][0].tolist() if palette is not None else ():
                colour, path = seen.setdefault(value, (palette[value : value + 1].tobytes(), pair.source))
                if colour != palette[value : value + 1].tobytes():
                    self.conflict = f" (the palettes of {path} and {pair.source} differ)"
        self.values = np.unique(np.concatenate([values for values, _ in found]))
        self.pixels, self.areas = np.zeros((2, len(self.values)), np.int64)
        for total, parts in ((self.pixels, found), (self.areas, even)):
            for values, counts in parts:
                total[np.searchsorted(self.values, values)] += counts
        self.coloured = self.values.max() >= COLOUR
        if seen and self.coloured:
            self.conflict = f" (some files have colours, others palettes, such as {seen.popitem()[1][1]})"
        lossy = any(pair.source.suffix.lower() in files.JPEG_SUFFIXES for pair in pairs)
        self.soft = lossy or (self.areas == 0).sum() > SOFT
        self.masks = [values for values, _ in (even if self.soft else found)]


def table(scan: Scan, groups: list[tuple[str, str, np.ndarray]]) -> str:
    """Formats a row for each group: value, class, and which of the scan's values it has, bool `[V]`."""
    width = max(len(name) for _, name, _ in groups)
    lines = [f"{'value':>12} > {'class':<{width}} {'pixels':>8} {'files':>7}"]
    for value, name, chosen in groups:
        shown = sum(np.isin(values, scan.values[chosen]).any() for values in scan.masks)
        share = scan.pixels[chosen].sum() / scan.pixels.sum()
        lines.append(f"{value:>12} > {name:<{width}} {share:>8.2%} {shown:>7,}")
    return "\n".join(lines)


def find_kind(scan: Scan, names: list[str], first_id: int) -> str | None:
    """Returns the kind of the masks from their content, None if it is unclear."""
    values = {*scan.values.tolist()}
    if scan.conflict or scan.coloured:
        return None if scan.conflict else "colours"
    main = scan.values[scan.areas > LEAST * scan.pixels.sum()] if scan.soft else scan.values
    is_end = np.minimum(np.abs(main), np.abs(main - 255)) <= (NEAR if scan.soft else 0)
    if values == {0, 65535} or (main.size and is_end.all() and main.min() < main.max() - NEAR):
        return "binary"
    if first_id or (names and max(values - {VOID}, default=0) <= len(names)):
        return "ids"
    return "instances" if len(values) > VOID + 1 else None


def classify_colours(scan: Scan, named: dict[str, int]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Returns the classes of colours, see `classify`. Raises InputError for a colour without a name."""
    colours, order = channels(list(named.values())), np.argsort(-scan.pixels, kind="stable")
    least = LEAST * scan.pixels.sum() if scan.soft else 0 if named else -1
    for colour in channels(scan.values[order][scan.areas[order] > least]):
        rivals = colours if scan.soft else colours[: len(named)]
        if not (np.abs(rivals - colour).max(-1) <= NEAR).any():
            colours = np.concatenate([colours, colour[None]])
    if len(colours) < 2:
        raise InputError(f"--masks: areas of one colour, classes found as colours: {len(colours)}; check --kind")
    colours = colours if named else np.array(sorted(colours.tolist(), key=any))  # black first
    texts = [as_text(colour) for colour in colours]
    if named and (extra := texts[len(named) :]):
        raise InputError(f"--colours: {', '.join(extra[:5])} has no name; add {extra[0]} with its name")
    names = list(named) or ["background" if text == "#000000" else text for text in texts]
    distances = [np.abs(channels(scan.values) - colour).sum(-1) for colour in colours]  # C of [V]
    return names, np.argmin(distances, 0), colours


def as_text(colour: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def settle(places: np.ndarray, values: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Gives pixels of soft edges in `places` `[H, W]` the most frequent class around them.

    Other pixels have exactly the colour of their class, or are in the middle of nine of one class.
    """
    sure = (colours[places] == channels(values)).all(-1) | (variation(places) == 0)
    return np.where(sure, places, Image.fromarray(places.astype(np.uint8)).filter(ImageFilter.ModeFilter(5)))


def names_beside(*folders: Path) -> list[str]:
    """Reads the class names that the data have already; [] without them."""
    with contextlib.suppress(InputError):
        path = files.find_class_names(*folders)
        return files.read_class_names(path) if path else []
    return []


def read_labelmap(*folders: Path) -> dict[str, int]:
    """Reads the names of colours from CVAT's labelmap.txt in one of the folders, background first; {} without it."""
    named = {}
    for path in [folder / "labelmap.txt" for folder in folders if (folder / "labelmap.txt").is_file()]:
        with files.reading(path):
            lines = [line.split(":") for line in path.read_text(encoding="utf-8-sig").splitlines()]
            for name, colour, *_ in (line for line in lines if line[1:] and line[0][0] != "#"):
                named[class_name(name)] = COLOUR | int.from_bytes(bytes(map(int, colour.split(","))))
    return dict(sorted(named.items(), key=lambda item: item[0] != "background"))


def colour_names(text: str) -> dict[str, int]:
    """Parses `name=#rrggbb,...`: an argparse type."""
    found = [re.fullmatch(r"\s*(.+?)=#([0-9a-fA-F]{6})\s*", item) for item in text.split(",")]
    if not all(found) or len({match[1] for match in found}) < len(found):
        raise ArgumentTypeError(f"{text!r}: give name=#rrggbb,name=#rrggbb, each name once")
    return {match[1]: COLOUR | int(match[2], 16) for match in found}


def classify(
    scan: Scan, kind: str, args: Namespace, *, named: dict[str, int], names: list[str]
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Returns names of classes, the place of each value's (void: len(names)), `[V]`, and perhaps colours, `[C, 3]`.

    named: colours by name. names: of ids. Raises InputError for flags and names that do not go with the values.
    """
    values, first, allowed = scan.values, args.first_id, {"colours": 0, "binary": 2, "instances": 2}.get(kind)
    if first and kind != "ids":
        raise InputError(f"--first_id: goes with ids, and these masks are {kind}; leave it out")
    if allowed is not None and len(args.names) > allowed:
        raise InputError(f"--names: these masks are {kind}; give {allowed} names at most, and colours with --colours")
    if kind == "polygons":
        return names, values, None
    if kind == "colours":
        return classify_colours(scan, named)
    if kind != "ids":
        names = names if len(names) == 2 else ["background", *(args.names or ["object"])]
        levels = np.where(values < COLOUR, values, channels(values).max(-1))
        return names, (levels >= (1 if kind == "instances" else (levels.max() + 1) // 2)).astype(int), None
    ids = [value for value in values.tolist() if value != VOID and value >= first]
    order = [*range(first, first + len(names))] or ids
    if scan.coloured:
        raise InputError("--kind ids: the masks have colours; give --kind colours")
    if len(names) == max(ids, default=0) and not first:
        advice = "put `background` first, or add --first_id 1, which makes 0 void"
        raise InputError(f"--names: has {len(names)} for ids 0 to {len(names)}; {advice}")
    if missing := sorted({*ids} - {*order}):
        raise InputError(f"--names: has {len(names)}, none for id {missing[0]}; add names, or give another --kind")
    return names or [*map(str, ids)], np.array([[*order, value].index(value) for value in values.tolist()]), None


def find_classes(scan: Scan, kind: str, names: list[str], of: np.ndarray) -> tuple[list[int], list[str]]:
    """Returns the places of names that are classes, and lines about others. Raises InputError for unusable names."""
    used = {*of.tolist(), 0} if kind in ("colours", "polygons") else {*range(len(names))}
    kept = [place for place, name in enumerate(names) if place in used and name.lower() not in VOIDS]
    if not 2 <= len(kept) <= VOID:
        raise InputError(f"--masks: classes found as {kind}: {len(kept)}; 2 to {VOID} are needed, check --kind")
    for name in [name for name in names if names.count(name) > 1 or not 0 < len(name) <= files.MAX_CLASS_NAME]:
        raise InputError(f"class name {name[:20]!r}: is empty, too long or there twice; change it")
    return kept, note(
        "classes without a pixel, left out", [names[place] for place in range(len(names)) if place not in used]
    )


def describe(
    scan: Scan, pairs: list[Pair], names: list[str], ids: np.ndarray, colours: np.ndarray | None
) -> list[str]:
    """Returns the table of classes, and what else to know. ids: of the scan's values, `[V]`."""
    groups, lines = [], []
    for id, name in [*enumerate(names), *([(VOID, "void")] if VOID in ids else [])]:
        values, pixels = scan.values[ids == id], scan.pixels[ids == id]
        text = "..".join(map(str, sorted({*values[:1].tolist(), *values[-1:].tolist()})))
        text = text if colours is None or not len(values) else as_text(channels(values[pixels.argmax()]))
        groups.append((text, f"{id} {name}", ids == id))
    if colours is not None and (merged := (channels(scan.values)[:, None] != colours).any(-1).all(-1).sum()):
        lines.append(f"near-duplicate colours, merged: {merged:,}")
    if any(name.startswith("#") for name in names):
        lines.append("classes are named by their colours; --colours NAME=#RRGGBB,... names them")
    if names == ["background", "object"]:
        lines.append("the class is called object; --names NAME names it")
    if empty := sum(not parts for pair in pairs if pair.drawing for _, parts in pair.drawing.objects):
        lines.append(f"shapes without an area, left out ({empty:,}): boxes, lines, points or labelme's masks")
    if splits := splits_of(pairs):
        lines += note("pairs in no split, so in no list", [pair.id for pair in pairs if not pair.split])
        lines += [] if "val" in splits else [f"there is no list val; train with --val_split {splits[0]}"]
    return [table(scan, groups), *lines]


def splits_of(pairs: list[Pair]) -> list[str]:
    splits = sorted({pair.split for pair in pairs if pair.split})
    return splits if len(splits) > 1 else []


def write(
    out: Path,
    pairs: list[Pair],
    ids_of: Callable[[Pair], np.ndarray],
    *,
    names: list[str],
    palette: np.ndarray,
    most: list[Pair],
) -> None:
    """Writes the data set, whole or not at all. Images are turned upright if need be, otherwise the same bytes.

    most: the pairs in the preview. Raises InputError if it cannot be written.
    """
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.resolve().parent) as staging:
            draft = Path(staging) / out.name
            for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
                (draft / part).mkdir(parents=True)
            for pair in tqdm(pairs, desc="converting", unit="pair", disable=None):
                copy = draft / "JPEGImages" / f"{pair.id}{pair.image.suffix.lower()}"
                mask = Image.fromarray(ids_of(pair))
                mask.putpalette(palette.tobytes())
                mask.save(draft / "SegmentationClass" / f"{pair.id}.png")
                shutil.copyfile(pair.image, copy)
                if files.read_header(pair.image)[2] in files.TURNS:
                    Image.fromarray(read_image(pair.image).permute(1, 2, 0).numpy()).save(copy, quality=95)
            (draft / "class_names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            for split in splits_of(pairs):
                text = "".join(f"{pair.id}\n" for pair in pairs if pair.split == split)
                (draft / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text, encoding="utf-8")
            draw_preview(draft, most, names, palette)
            draft.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from None


def draw_preview(draft: Path, pairs: list[Pair], names: list[str], palette: np.ndarray) -> None:
    """Draws images beside their masks, and the names of the colours."""
    sheet = Image.new("RGB", (1000, max(len(pairs) * 240, len(names) * 24)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, pair in enumerate(pairs):
        image = Image.fromarray(read_image(pair.image).permute(1, 2, 0).numpy())
        mask = Image.open(draft / "SegmentationClass" / f"{pair.id}.png").convert("RGB")
        for column, picture in enumerate((image, mask)):
            small = ImageOps.contain(picture, (312, 232), Image.Resampling.NEAREST)
            sheet.paste(small, (column * 320, row * 240))
    for row, name in enumerate(names):
        pen.rectangle((640, 24 * row + 2, 664, 24 * row + 20), tuple(palette[row].tolist()), "black")
        pen.text((672, 24 * row + 2), name, "black", font)
    sheet.save(draft / "preview.png")


def convert(args: Namespace) -> None:
    """Runs the command line at the top of the file. Raises InputError for input that cannot be used."""
    root, places = find_source(args)
    folders, drawings, out = [root, *(place.masks for place in places)], [], Path(args.out)
    images, masks = list_source(places, args.mask_suffix)
    if args.coco and (args.kind or args.colours):
        raise InputError("--coco: has polygons; leave out --kind and --colours")
    if not (args.kind or args.colours):
        drawings, names = find_drawings(root, places, images, coco=args.coco, names=args.names)
    if not drawings:
        names = args.names or names_beside(*folders)
    sources = [(in_split(drawing.name), drawing.path, drawing) for drawing in drawings]
    sources = sources or [(name, path, None) for name, path in masks.items()]
    ending = args.mask_suffix or "_mask"
    pairs, notes = find_pairs(images, sources, lists=find_lists(root, ()), ending=ending)
    # Which values do they have, and which class is each?
    named = args.colours or ({} if drawings or args.kind not in (None, "colours") else read_labelmap(*folders))
    expand = bool(named) or args.kind == "colours"
    scan = Scan(pairs, names, expand=expand, palettes=not (drawings or expand or args.kind))
    kind = "polygons" if drawings else "colours" if named else args.kind or find_kind(scan, names, args.first_id)
    if kind is None:
        print(table(scan, [(str(value), "?", scan.values == value) for value in scan.values[:20].tolist()]))
        advice = "pass --kind ids, colours, binary or instances, and for ids --names"
        raise InputError(f"--masks {folders[-1]}: it is unclear what these values are{scan.conflict}; {advice}")
    all_names, of, colours = classify(scan, kind, args, named=named, names=names)
    kept, more = find_classes(scan, kind, all_names, of)
    ids, palette, classes = np.full(len(all_names) + 1, VOID, np.uint8), voc_colormap(), [all_names[k] for k in kept]
    ids[kept] = range(len(kept))
    palette[: len(kept)] = palette[: len(kept)] if colours is None else colours[kept]
    lines = [*describe(scan, pairs, classes, ids[of], colours), *notes, *more]
    print(f"pairs: {len(pairs):,}, kind: {kind}", *lines, sep="\n")
    if args.dry_run:
        return

    def ids_of(pair: Pair) -> np.ndarray:
        values = read(pair, names=names, expand=expand)
        found = of[np.searchsorted(scan.values, values)]
        return ids[found if colours is None or not scan.soft else settle(found, values, colours)]

    most = [pairs[row] for row in sorted(range(len(pairs)), key=lambda row: -len(scan.masks[row]))[:4]]
    write(out, pairs, ids_of, names=classes, palette=palette, most=most)
    findings, checked = check_dataset("folder", out)
    print("\n".join(format_findings(findings, checked)))
    if any(finding.fatal for finding in findings):
        raise InputError(f"{out}: is written, but training would fail; fix what the lines above call FATAL")
    print(f"next: look at {out / 'preview.png'}, then python main.py --dataset folder --data_root {out}")


def names_of(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


@friendly_errors
def main(argv: list[str] | None = None) -> None:
    """Runs the command line above."""
    parser = Parser(prog="python -m datasets.prepare.convert", description="Convert masks to VOC layout.")
    add = parser.add_argument
    add("--images", required=True, type=any_path, metavar="DIR", help="images, or a data folder in any known layout")
    add("--masks", type=any_path, metavar="DIR", help="masks or annotations, if they are not beside the images")
    add("--out", required=True, type=any_path, metavar="DIR", help="folder to write; it must not exist")
    add("--coco", action="append", default=[], metavar="FILE", help="COCO JSON, or SPLIT=FILE once per split")
    add("--kind", choices=("ids", "colours", "binary", "instances"), help="what the values of mask files are")
    add("--names", type=names_of, default=[], metavar="A,B", help="names of ids, or labelme's labels, in order")
    add("--colours", type=colour_names, metavar="A=#RRGGBB", help="names of colours, in order; greys too")
    add("--first_id", type=int, choices=(0, 1), default=0, help="1: ids begin at 1, and 0 is void")
    add("--mask_suffix", default="", metavar="TEXT", help="what the names of masks add to those of images: _label")
    add("--dry_run", action="store_true", help="print the table of classes, write nothing")
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    main()
