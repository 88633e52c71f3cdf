"""Checks a data set: reads every file as training does, and reports each problem with its fix."""

import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from datasets import build_dataset
from datasets.audit import Finding, absent_classes, mismatches
from datasets.files import VOID, read_image, read_mask
from datasets.folder import Layout, Splits
from datasets.voc import SegmentationDataset, require_one_size
from utils.errors import InputError

BACKGROUND = ("background", "bg")  # a mask that holds only a class 0 of this name shows nothing
APART = (("train", "val"), ("train", "test"), ("val", "test"))  # lists that must not share images


def check_dataset(
    name: str, root: str | Path, splits: list[str] | None = None, *, year: str = "2012", allow_absent: bool = False
) -> tuple[list[Finding], dict]:
    """Reads every pair of image and mask in these splits once and collects the problems. Writes nothing.

    splits: None means all that the data set has. allow_absent: as for training, see `datasets.audit`.
    Returns the findings, and what was checked in the splits that could be opened: {"folder": str, "classes": int,
    "pairs": {split: count}}. Besides bad files and what `audit` finds, it finds ids that are listed twice. Between
    `train`, `val` and `test` (also fold1_train and fold1_val) it finds shared ids and identical images under two ids.
    "shapes" is generated if it does not exist.
    """
    root = Path(root)
    folder = {"voc": root / "VOCdevkit" / "VOC2012", "shapes": root / "shapes"}.get(name, root)
    findings, opened = [], {}
    for split in splits or _all_splits(name, folder, year):
        try:
            opened[split] = build_dataset(name, root, split, year=year)
        except InputError as error:
            findings.append(_finding(error))
    absent = []
    for split in ["train"] if "train" in opened else [split for split in opened if "train" in split]:
        absent += absent_classes(opened[split], allow_absent=allow_absent or name != "folder")
    # Where a class has no pixel at all, masks of nothing but background are no news.
    findings += absent + _check_files(opened.values(), find_empty=not any(finding.fatal for finding in absent))
    findings += _check_lists(opened, leave_out={finding.path for finding in findings})
    findings += _without_masks(opened)
    findings += mismatches(list(opened.values()))
    pairs = {split: len(dataset) for split, dataset in opened.items()}
    classes = max((dataset.num_classes for dataset in opened.values()), default=0)
    return list(dict.fromkeys(findings)), {"folder": str(folder), "classes": classes, "pairs": pairs}


def _all_splits(name: str, folder: Path, year: str) -> list[str]:
    names = {path.stem for path in (folder / "ImageSets" / "Segmentation").glob("*.txt")}
    if name == "folder":
        # A folder without a known layout is reported when its splits are opened.
        with contextlib.suppress(InputError):
            names = set(Splits(Layout(folder)).names)
    if name == "voc":
        # train_aug is the train split of 2012_aug only.
        names = names - {"train_aug"} | ({"train"} if year == "2012_aug" else set())
    return sorted(names, key=lambda name: (name not in ("train", "val"), name)) or ["train", "val"]


def _finding(error: InputError) -> Finding:
    path, _, problem = str(error).partition(": ")
    return Finding(path, problem, fatal=True)


def _check_files(datasets: Iterable[SegmentationDataset], *, find_empty: bool) -> list[Finding]:
    """Checks each image, each mask, and that the two match."""
    pairs = {mask: (image, data) for data in datasets for image, mask in zip(data.images, data.masks, strict=True)}
    findings, missing_images, missing_masks = [], [], []
    for mask_path, (image_path, dataset) in tqdm(pairs.items(), desc="checking", unit="pair", disable=None):
        image = mask = None
        if mask_path.is_file():
            mask = _attempt(findings, read_mask, mask_path, dataset.num_classes, convert=dataset.convert)
        else:
            missing_masks.append(mask_path)
        if image_path.is_file():
            fits = None if mask is None else tuple(mask.shape)
            image = _attempt(findings, read_image, image_path, fits=fits)
        else:
            missing_images.append(image_path)
        if image is not None and mask is not None:
            _attempt(findings, require_one_size, image, mask, mask_path)
        if find_empty and mask is not None and (problem := _emptiness(mask, dataset.class_names[0])):
            findings.append(Finding(str(mask_path), problem, fatal=False))
    findings += _missing("the image is missing", missing_images, len(pairs))
    return findings + _missing("the mask is missing", missing_masks, len(pairs))


def _attempt(
    findings: list[Finding], function: Callable, *arguments: object, **keywords: object
) -> torch.Tensor | None:
    try:
        return function(*arguments, **keywords)
    except InputError as error:
        findings.append(_finding(error))
        return None


def _emptiness(mask: torch.Tensor, first_class: str) -> str:
    # NumPy, because on so little data torch's threads cost more than they gain.
    ids = mask.numpy()
    labelled = ids[ids != VOID]
    if not labelled.size:
        return "the whole mask is void; annotate it, or remove its id from the list"
    if not labelled.any() and first_class.strip("_").lower() in BACKGROUND:
        return f"the only label is {first_class}; annotate it, unless the image really shows no other class"
    return ""


def _missing(problem: str, paths: list[Path], total: int) -> list[Finding]:
    # One cause, one finding.
    if paths and len(paths) == total:
        return [Finding(str(paths[0]), f"{problem} ({total:,} of {total:,}); add them", fatal=True)]
    return [Finding(str(path), f"{problem}; add it, or remove its id from the list", fatal=True) for path in paths]


def _check_lists(opened: dict[str, SegmentationDataset], leave_out: set[str]) -> Iterable[Finding]:
    """Finds ids listed twice, and samples shared by lists that must be apart. `leave_out`: paths of bad images."""
    refused = set()
    for split, dataset in opened.items():
        try:
            dataset.require_apart()
        except InputError as error:
            refused.add(split)
            yield _finding(error)
        if twice := [id for id, count in Counter(dataset.ids).items() if count > 1]:
            problem = f"{_some(twice)} listed more than once; keep one line each"
            yield Finding(str(dataset.source), problem, fatal=False)
    for one, other in _lists_apart(opened):
        shared = sorted(set(opened[one].ids) & set(opened[other].ids))
        # A refusal has reported those of val already.
        if shared and not (one in refused and other == "val"):
            problem = f"{_some(shared)} also in {other}, so its scores are too high; remove them from one list"
            yield Finding(str(opened[one].source), problem, fatal=False)
        for copy, original in _same_images(opened[one], opened[other], leave_out):
            problem = f"is the same image as {original}, which is in {one}; remove one of them from its list"
            yield Finding(copy, problem, fatal=False)


def _lists_apart(names: Iterable[str]) -> list[tuple[str, str]]:
    return [
        (one, one.removesuffix("_aug").replace(word, counterpart))
        for one in names
        for word, counterpart in APART
        if word in one and one.removesuffix("_aug").replace(word, counterpart) in names
    ]


def _same_images(one: SegmentationDataset, other: SegmentationDataset, leave_out: set[str]) -> list[tuple[str, str]]:
    """Returns (path in `other`, id in `one`) of images that are byte-identical under two ids."""
    # Only files of equal length need reading.
    by_size = defaultdict(lambda: ([], []))
    for side, dataset in enumerate((one, other)):
        for id, path in zip(dataset.ids, dataset.images, strict=True):
            if path.is_file() and str(path) not in leave_out:
                by_size[path.stat().st_size][side].append((id, path))
    found = []
    for ours, theirs in by_size.values():
        originals = {_digest(path): id for id, path in ours} if theirs else {}
        copies = [(id, str(path), originals.get(_digest(path), id)) for id, path in theirs if originals]
        found += [(path, original) for id, path, original in copies if original != id]
    return found


def _without_masks(opened: dict[str, SegmentationDataset]) -> Iterable[Finding]:
    """Finds images without a mask, which stay unused if there are no lists."""
    if all(split in opened and opened[split].made_split for split in ("train", "val")):
        layout = opened["train"].layout
        if alone := sorted(layout.images.keys() - layout.masks.keys()):
            problem = f"{_some(alone)} without a mask of that name, so unused; annotate or remove them"
            yield Finding(str(layout.places[0].images), problem, fatal=False)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _some(ids: list[str]) -> str:
    shown = ", ".join(ids[:5])
    return f"{shown} and {len(ids) - 5:,} more are" if len(ids) > 5 else f"{shown} {'is' if len(ids) == 1 else 'are'}"


def format_findings(findings: list[Finding], checked: dict, *, limit: int = 20) -> list[str]:
    """Formats the result of `check_dataset`: what was checked, the findings, a verdict.

    Fatal findings come first. Files with the same problem are grouped, at most `limit` of them listed.
    """
    width = max(map(len, checked["pairs"]), default=0)
    lines = [f"{checked['folder']}: {checked['classes']} classes"]
    lines += [f"  {split:<{width}}  {count:>7,} pairs" for split, count in checked["pairs"].items()]
    groups = defaultdict(list)
    for finding in sorted(findings, key=lambda finding: not finding.fatal):
        groups["FATAL  " if finding.fatal else "warning", finding.problem].append(finding.path)
    for (mark, problem), paths in groups.items():
        if len(paths) == 1:
            lines.append(f"{mark}  {paths[0]}: {problem}")
        else:
            lines += [f"{mark}  {len(paths):,} files: {problem}", *(f"{'':9}{path}" for path in paths[:limit])]
            lines += [f"{'':9}and {len(paths) - limit:,} more"] if len(paths) > limit else []
    fatal = sum(finding.fatal for finding in findings)
    if not findings:
        return [*lines, "no problem found"]
    return [*lines, f"fatal: {fatal:,}, warnings: {len(findings) - fatal:,}"]
