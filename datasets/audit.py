"""Finds what no single file shows: classes without a pixel, palettes that differ, photographs that may be turned.

Training and the data set doctor judge by the same functions.
"""

import argparse
import contextlib
import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.files import (
    FIRST_QUARTER_TURN,
    TURNS,
    VOID,
    format_shares,
    highest_grey,
    read_header,
    read_mask,
    read_palette,
    read_size,
)
from datasets.voc import SegmentationDataset
from utils.errors import InputError

DEEP_GREYS = 20  # number of 16-bit images whose values are read
MAX_12_BITS = 2**12 - 1
MAX_NAMES = 10  # classes that a message names
log = logging.getLogger("deeplab")


@dataclass(frozen=True)
class Finding:
    """One problem of a data set."""

    path: str
    problem: str  # the problem and its fix, one line
    fatal: bool  # whether training stops at it; otherwise it trains on less data, or scores mean something else


def require_sound(opts: argparse.Namespace, datasets: Sequence[SegmentationDataset], *, fresh: bool) -> None:
    """Logs the findings about splits of one data set, the one that is trained on or tested first.

    A class that no mask shows is fatal at a fresh start on one's own folder. Raises InputError for a fatal finding.
    """
    allow_absent = opts.allow_absent or opts.dataset != "folder" or not fresh
    for finding in (*absent_classes(datasets[0], allow_absent=allow_absent), *mismatches(datasets)):
        if finding.fatal:
            raise InputError(f"{finding.path}: {finding.problem}")
        log.warning(f"{finding.path}: {finding.problem}")


def absent_classes(dataset: SegmentationDataset, *, allow_absent: bool) -> Iterator[Finding]:
    """Finds the classes without a pixel in a split, which is trained on or tested. Skips files that cannot be read.

    allow_absent: whether a class that occurs in no mask of the data set is a warning. A class that other splits show
    always is one.
    """
    counts = np.zeros(VOID + 1, np.int64)
    for index in tqdm(range(len(dataset)), desc="looking for classes", unit="mask", disable=None, delay=1):
        with contextlib.suppress(InputError):
            counts += np.bincount(dataset.mask(index).numpy().ravel(), minlength=VOID + 1)
        # Healthy data show every class in the first few masks.
        if counts[: dataset.num_classes].all():
            return
    if not counts.any():
        return
    absent = set(np.flatnonzero(counts[: dataset.num_classes] == 0).tolist())
    seen_in: dict[int, str] = {}  # by class, a mask of another split
    others = sorted(set(dataset.all_masks) - set(dataset.masks))
    for path in tqdm(others, desc="looking for classes", unit="mask", disable=None, delay=1):
        if seen_in.keys() >= absent:
            break
        with contextlib.suppress(InputError):
            found = set(read_mask(path, dataset.num_classes).unique().tolist())
            seen_in |= dict.fromkeys(found & absent - seen_in.keys(), path.name)
    folder, where = str(dataset.masks[0].parent), f"in the {len(dataset):,} masks of {dataset.split or 'this split'}"
    if nowhere := sorted(absent - seen_in.keys()):
        problem = f"no pixel of {_names(dataset, nowhere)} {where}"
        if allow_absent:
            yield Finding(folder, f"{problem}; such a class cannot be learned, nor scored here", fatal=False)
        else:
            fix = f"{_fix(dataset, counts, nowhere)}, or train all the same with --allow_absent"
            yield Finding(folder, f"{problem}, which hold {format_shares(counts)}; {fix}", fatal=True)
    if seen_in:
        fix = "draw again with another --random_seed, or write" if dataset.made_split else "move some ids between"
        problem = f"no pixel of {_names(dataset, sorted(seen_in))} {where}, but {seen_in[min(seen_in)]} shows it"
        yield Finding(folder, f"{problem}; {fix} the lists train.txt and val.txt", fatal=False)


def _names(dataset: SegmentationDataset, ids: list[int]) -> str:
    names = [f"{dataset.class_names[id]} (id {id})" for id in ids[:MAX_NAMES]]
    return ", ".join([*names, *([f"{len(ids) - MAX_NAMES} more classes"] if len(ids) > MAX_NAMES else [])])


def _fix(dataset: SegmentationDataset, counts: np.ndarray, absent: list[int]) -> str:
    if not counts[1:VOID].any() and counts[VOID]:
        name = dataset.class_names[absent[0]]
        return f"if 255 means {name}, convert the masks: {dataset.convert} --names {shlex.quote(name)}"
    fix = "annotate it, remove it from class_names.txt"
    if 0 in absent:
        return f"if the ids count from 1, convert the masks: {dataset.convert} --first_id 1; otherwise {fix}"
    return fix


def mismatches(datasets: Sequence[SegmentationDataset]) -> list[Finding]:
    """Finds ids with two colours, photographs whose masks may be turned differently, and images that are too dark.

    Reads the headers of all files, and pixels only where these differ. Skips files that cannot be read.
    """
    return [*_palettes(datasets), *_images(datasets)] if datasets else []


def _palettes(datasets: Sequence[SegmentationDataset]) -> Iterator[Finding]:
    num_classes, files = datasets[0].num_classes, {}
    masks = sorted({path for dataset in datasets for path in dataset.masks})
    for path in tqdm(masks, desc="comparing palettes", unit="mask", disable=None, delay=1):
        palette = read_palette(path)
        if palette is not None:
            files.setdefault(palette[:num_classes].tobytes(), []).append(path)
    palettes = [[palette[i : i + 3].hex() for i in range(0, len(palette), 3)] for palette in files]
    differing = {id for id in range(num_classes) if len({each[id] for each in palettes if id < len(each)}) > 1}
    seen: dict[int, tuple[str, Path]] = {}
    for palette, paths in zip(palettes, files.values(), strict=True) if differing else ():
        for path in paths:
            ids = set()
            with contextlib.suppress(InputError):
                ids = differing.intersection(read_mask(path, VOID).unique().tolist())
            for id in ids:
                colour, first = seen.setdefault(id, (palette[id], path))
                if colour != palette[id]:
                    problem = f"id {id} is #{colour} here, but #{palette[id]} in {path}"
                    fix = f"convert the masks: {datasets[0].convert} --kind colours if the colours are right"
                    yield Finding(str(first), f"{problem}; {fix}, --kind ids if the ids are", fatal=True)
                    return


def _images(datasets: Sequence[SegmentationDataset]) -> Iterator[Finding]:
    pairs = sorted({pair for dataset in datasets for pair in zip(dataset.images, dataset.masks, strict=True)})
    stored, unclear, deep = [], [], []
    for image, mask in tqdm(pairs, desc="reading headers", unit="image", disable=None, delay=1):
        with contextlib.suppress(InputError):
            size, mode, orientation = read_header(image)
            upright = size[::-1] if orientation >= FIRST_QUARTER_TURN else size
            if orientation in TURNS and read_size(mask) == size:
                (unclear if size == upright else stored).append(image)
            if mode.startswith("I;16"):
                deep.append(image)
    if stored:
        problem = (
            f"EXIF turns the image, but its mask fits the stored pixels, so these are kept ({len(stored):,} files)"
        )
        fix = f"predict has no mask and will turn such images; convert them: {datasets[0].convert}"
        yield Finding(str(stored[0]), f"{problem}; {fix}", fatal=False)
    if unclear:
        problem = f"EXIF turns the image, and its size does not tell if the mask fits ({len(unclear):,} files)"
        fix = "images are read upright; look at some with visualize.py samples"
        yield Finding(str(unclear[0]), f"{problem}; {fix}", fatal=False)
    highest = 0
    for path in deep[:DEEP_GREYS]:
        with contextlib.suppress(InputError):
            highest = max(highest, highest_grey(path))
    if 0 < highest <= MAX_12_BITS:
        problem = (
            f"16-bit images reach only {highest} of 65535, so that {highest // 257 + 1} of 256 grey levels are left"
        )
        yield Finding(str(deep[0]), f"{problem}; if the camera has 10 or 12 bits, scale them to 16", fatal=False)
