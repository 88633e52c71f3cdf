"""Opens your own data: finds images, masks, splits and class names in the layouts that annotation tools write."""

import shlex
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from datasets.files import (
    IMAGE_SUFFIXES,
    JPEG_SUFFIXES,
    KIND,
    MASK_SUFFIXES,
    VOID,
    convert_command,
    existing_folder,
    find_class_names,
    format_shares,
    is_file,
    is_folder,
    is_ghost,
    list_files,
    only_path,
    read_class_names,
    read_ids,
    read_mask,
    read_palette,
)
from datasets.voc import SegmentationDataset, voc_colormap
from utils.errors import InputError

FOLDERS = (  # an image folder, and what its mask folder may be called
    ("JPEGImages", ("SegmentationClass", "SegmentationClassPNG")),
    ("images", ("masks", "labels", "annotations")),
    ("img_dir", ("ann_dir",)),
)
VAL = ("val", "valid", "validation")
SPLITS = {"train": "train", **dict.fromkeys(VAL, "val"), "test": "test"}  # by what folders and lists are called
LAYOUTS = "docs/own_masks.md shows the layouts"


class FolderSegmentation(SegmentationDataset):
    """One split of a folder in one of the layouts that `Layout` knows, with its class names in `class_names.txt`.

    Colours come from the masks' own palette.
    named: the splits that a command line asks for, see `Splits`. seed: of the division of a folder without splits.
    lists: a folder with the lists of an earlier division.
    Attributes besides those of `SegmentationDataset`: `layout` and `splits`.
    Raises InputError for a folder that cannot be used; often it names the command that converts it.
    """

    def __init__(
        self,
        root: str | Path,
        image_set: str = "train",
        transform: Callable | None = None,
        *,
        named: Collection[str] = ("train", "val"),
        lists: Path | None = None,
        seed: int = 1,
    ) -> None:
        folder = existing_folder(Path(root))
        self.layout = Layout(folder)
        self.splits = Splits(self.layout, named={*named, image_set})
        ids, source = self.splits.ids(image_set, seed=seed, earlier=lists)
        images, masks = zip(*map(self.layout.pair, ids), strict=True)
        super().__init__(
            folder,
            ids,
            images=images,
            masks=masks,
            class_names=class_names_of(self.layout),
            transform=transform,
            convert=self.layout.convert,
        )
        self.made_split, self.source = source is None, source or folder
        self.all_masks = [paths[0] for paths in self.layout.masks.values()]
        self.palette = _palette_of(self.masks[0], self.num_classes)


@dataclass(frozen=True)
class Place:
    """A folder of images and its folder of masks, which may be the same. `prefix` begins the ids of its files."""

    prefix: str
    images: Path
    masks: Path


class Layout:
    """The pairs of a data folder.

    Attributes: `folder`, `places`, `images` and `masks` (paths by id), `convert` (the command to convert the masks).
    Raises InputError for an unknown layout, and for masks that are polygons.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.places = folder, find_places(folder)
        self.images: dict[str, list[Path]] = {}
        self.masks: dict[str, list[Path]] = {}
        for place in self.places:
            images, masks = list_pairs(place)
            self.images |= {f"{place.prefix}{id}": paths for id, paths in images.items()}
            for name, paths in masks.items():
                id = f"{place.prefix}{match(name, images)}"
                self.masks[id] = [*self.masks.get(id, []), *paths]
        self.convert = convert_command(folder)
        if not self.masks:
            raise _no_masks(self)

    def pair(self, id: str) -> tuple[Path, Path]:
        """Returns the paths of an image and its mask, which need not exist. Raises InputError if several fit."""
        place = next((place for place in self.places if id.startswith(place.prefix)), self.places[0])
        inner = id.removeprefix(place.prefix)
        image = only_path(self.images.get(id) or [place.images / f"{inner}.jpg"])
        return image, only_path(self.masks.get(id) or [place.masks / f"{inner}.png"])

    def __str__(self) -> str:
        first = self.places[0]
        names = dict.fromkeys(f"{path.relative_to(self.folder)}/" for path in (first.images, first.masks))
        where = " and ".join(names) if len(names) > 1 else "one folder"
        more = f" and {len(self.places) - 1} more such folders" if len(self.places) > 1 else ""
        return f"{self.folder}: {len(self.masks):,} masks; images and masks in {where}{more}"


class Splits:
    """The splits of a data folder: in lists, otherwise in folders such as `train/`, otherwise divided here.

    Lists are in ImageSets/Segmentation or beside the folders. A single list is divided unless its name is a usual one
    or among `named`, the splits that a command line asks for. `train/` is divided if `val` is asked for but missing.
    Attributes: `names`, and `source`, where they come from. Raises InputError for ids outside the split folders.
    """

    def __init__(self, layout: Layout, named: Collection[str] = ("train", "val")) -> None:
        self.layout = layout
        self._by_name: dict[str, Path | list[str]] = find_lists(layout.folder, named)  # a list, or the ids
        self._pool: Path | list[str] | None = None  # what is divided into train and val
        if self._by_name:
            only = next(iter(self._by_name))
            self.source = f"lists {', '.join(self._by_name)}"
            if len(self._by_name) == 1 and only not in {*SPLITS, *named}:
                self.source, self._pool = f"list {only}, divided 80/20", self._by_name.pop(only)
        elif folders := _split_folders(layout):
            self.source, self._by_name = f"folders {', '.join(folders)}", folders
            if "train" in folders and "val" in named and not folders.keys() & set(VAL):
                self.source, self._pool = f"{self.source}; train is divided 80/20", self._by_name.pop("train")
        else:
            self.source, self._pool = "none, divided 80/20", sorted(layout.masks)
        self.names = [*(() if self._pool is None else ("train", "val")), *self._by_name]

    def ids(self, name: str, *, seed: int, earlier: Path | None = None) -> tuple[list[str], Path | None]:
        """Returns the ids of a split and their list or folder; None if they were drawn here.

        `valid` and `validation` count as `val`.

        seed: of the draw. earlier: a folder with the lists of an earlier draw.
        Raises InputError for an unknown split.
        """
        known = self.layout.masks.keys() | self.layout.images.keys()
        for each in (name, *(VAL if name == "val" else ())):
            if each in self._by_name:
                source = self._by_name[each]
                return _read(source, known), source if isinstance(source, Path) else self.layout.folder
        if self._pool is not None and name in ("train", "val"):
            drawn = earlier / f"{name}.txt" if earlier else None
            if drawn and is_file(drawn):
                return read_ids(drawn, known), None
            pool = _read(self._pool, known)
            if len(pool) < 2:
                raise InputError(f"{self.layout.folder}: one mask cannot be divided into train and val; add more")
            return _divide(pool, name, seed=seed), None
        if lists := [source for source in self._by_name.values() if isinstance(source, Path)]:
            read_ids(lists[0].parent / f"{name}.txt")  # raises, and says which lists there are
        raise InputError(
            f"{self.layout.folder}: has no split {name}; choose from {', '.join(self.names)} with --train_split and "
            "--val_split"
        )


def _read(source: Path | list[str], known: Collection[str]) -> list[str]:
    return read_ids(source, known) if isinstance(source, Path) else source


def _divide(ids: list[str], split: str, *, seed: int) -> list[str]:
    """Draws the train part (80%) or the val part of ids; they keep their order."""
    order = np.random.default_rng(seed).permutation(len(ids))
    num_val = max(1, round(0.2 * len(ids)))
    chosen = order[:num_val] if split == "val" else order[num_val:]
    return [ids[i] for i in sorted(chosen)]


def find_lists(folder: Path, named: Collection[str]) -> dict[str, Path]:
    """Returns the split lists by name; those in sub-folders only if they are named."""
    own = folder / "ImageSets" / "Segmentation"
    names = {path.stem for path in own.glob("*.txt") if not is_ghost(path.name)}
    names |= {name for name in named if is_file(own / f"{name}.txt")}
    if names:
        return {name: own / f"{name}.txt" for name in sorted(names)}
    beside = {name: folder / f"{name}.txt" for name in (*SPLITS, *named)}
    return {name: path for name, path in beside.items() if is_file(path)}


def _split_folders(layout: Layout) -> dict[str, list[str]]:
    """Returns the ids in each folder that is named after a split."""
    groups: dict[str, list[str]] = {}
    for id in sorted(layout.masks):
        groups.setdefault(id.split("/")[0] if "/" in id else "", []).append(id)
    found = {name: groups.pop(name) for name in SPLITS if name in groups}
    if found and groups:
        stray = layout.pair(next(iter(groups.values()))[0])[1]
        raise InputError(f"{stray}: lies outside the folders {', '.join(found)}; move it into one, or write lists")
    return found


def find_places(folder: Path) -> list[Place]:
    """Finds images and masks in the folder itself, otherwise in the folders of its splits, otherwise side by side."""
    if pair := find_pair(folder):
        return [Place("", *pair)]
    inner = [folder / name for name in SPLITS if is_folder(folder / name)]
    if inner:
        return [Place(f"{path.name}/", *(find_pair(path) or (path, path))) for path in inner]
    return [Place("", folder, folder)]


def find_pair(folder: Path) -> tuple[Path, Path] | None:
    """Returns the folder of images and the folder of masks; of several that masks may have, the first with masks."""
    for images, names in FOLDERS:
        found = [folder / name for name in names if is_folder(folder / name)]
        # The masks of VOC alone are enough for statistics.
        if found and (is_folder(folder / images) or images == "JPEGImages"):
            return folder / images, next((path for path in found if list_files(path, MASK_SUFFIXES)), found[0])
    return None


def list_pairs(place: Place, ending: str = "_mask") -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Returns the paths of images and of masks by name, a mask's as the file is called; see `match`."""
    if place.images != place.masks:
        return list_files(place.images, IMAGE_SUFFIXES), _lossless(list_files(place.masks, MASK_SUFFIXES))
    images = list_files(place.images, {*IMAGE_SUFFIXES, *MASK_SUFFIXES})
    masks = {name: images.pop(name) for name in list(images) if _shorter(name, ending) in images}
    if not masks:  # a.jpg and a.png
        for name, paths in images.items():
            jpegs = [path for path in paths if path.suffix.lower() in JPEG_SUFFIXES]
            if len(jpegs) == 1 and len(paths) == 2:
                images[name], masks[name] = jpegs, [path for path in paths if path not in jpegs]
    return images, masks


def match(name: str, images: Collection[str], ending: str = "_mask") -> str:
    """Returns the image that a mask called `name` belongs to: `a` for `a`, `a_mask` and `a.jpg`; `name` if none does.

    ending: what the names of masks add to those of images, in any case.
    """
    shorter: str | None = name
    while shorter and shorter not in images:
        shorter = _shorter(shorter, ending)
    return shorter or name


def match_anywhere(name: str, images: Mapping[str, Collection[str]], ending: str) -> str | None:
    """Returns the image for a mask in another folder: the only one so called, unless it is of another split.

    images: names by their last part.
    """
    found = images.get(match(name.rpartition("/")[2], images, ending), ())
    found = [other for other in found if None in (split_of(name), split_of(other))]
    return found[0] if len(found) == 1 else None


def in_split(name: str) -> str:
    """Returns a name in Unicode form NFC, with folders such as `valid` called by their split."""
    *folders, stem = unicodedata.normalize("NFC", name).split("/")
    return "/".join([*(SPLITS.get(folder.lower(), folder) for folder in folders), stem])


def split_of(name: str) -> str | None:
    """Returns the split that the folders of a name from `in_split` say."""
    return next((folder for folder in name.split("/")[:-1] if folder in SPLITS), None)


def _shorter(name: str, ending: str) -> str | None:
    path = PurePosixPath(name)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return str(path.with_suffix(""))
    return name[: -len(ending)] if name.lower().endswith(ending.lower()) else None


def _lossless(masks: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Drops a JPEG beside another file of the same name: it can only be an illustration."""
    return {
        name: [path for path in paths if path.suffix.lower() not in JPEG_SUFFIXES] or paths
        for name, paths in masks.items()
    }


def _no_masks(layout: Layout) -> InputError:
    """Says why a folder has no masks: often they are polygons."""
    place = layout.places[0]
    for name, paths in list_files(place.masks, (".json", ".txt")).items():
        if f"{place.prefix}{name}" in layout.images or paths[0].suffix.lower() == ".json":
            return InputError(f"{paths[0]}: holds polygons, not a mask; convert them: {layout.convert}")
    return InputError(f"{place.masks}: has no masks; {LAYOUTS}")


def class_names_of(layout: Layout) -> list[str]:
    """Reads the class names in the data folder or beside its images or masks.

    Raises InputError without a list; it has the ids in the masks and the command that writes the list.
    """
    inner = [folder for place in layout.places for folder in (place.masks, place.images, place.images.parent)]
    path = find_class_names(layout.folder, *inner)
    if path is not None:
        return read_class_names(path)
    counts = np.zeros(VOID + 1, np.int64)
    masks = [paths[0] for paths in layout.masks.values()]
    for mask in tqdm(masks, desc="looking for ids", unit="mask", disable=None, delay=1):
        counts += np.bincount(read_mask(mask, VOID, convert=layout.convert).numpy().ravel(), minlength=VOID + 1)
    path, ids = layout.folder / "class_names.txt", np.flatnonzero(counts[:VOID])
    last = int(ids.max(initial=0))
    if last == 0 and not (counts[0] and counts[VOID]):
        fix = "nothing is annotated; annotate some images"
    elif last == 0 or last > 3 * len(ids):
        kind = f" {KIND}" if last else ""
        fix = f"these are not ids from 0 on; convert the masks: {layout.convert}{kind}"
    else:
        names = " ".join(["background", *(f"class_{id}" for id in range(1, last + 1))])
        fix = f"write the names in this order, a line each: printf '%s\\n' {names} > {shlex.quote(str(path))}"
    raise InputError(f"{path}: missing; the masks hold {format_shares(counts)}; {fix}")


def _palette_of(mask: Path, num_classes: int) -> np.ndarray:
    """Returns the palette of a mask file if its colours tell the classes apart, otherwise VOC's."""
    palette, own = voc_colormap(), read_palette(mask)
    if own is None or len(np.unique(own[:num_classes], axis=0)) < num_classes:
        return palette
    palette[:num_classes] = own[:num_classes]
    if len(own) > VOID:
        palette[VOID] = own[VOID]
    return palette
