"""The data set doctor: reads every file of a data set as training does, and names each problem with its fix."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from datasets.files import IMAGE_SUFFIXES, VOID, read_image, read_mask, require_one_size
from datasets.folder import FolderSegmentation
from datasets.voc import SegmentationDataset, VOCSegmentation, augmented_list
from utils.errors import InputError

BACKGROUND = ("background", "bg")  # a class 0 of this name tells nothing where a mask has no other
APART = (("train", "val"), ("train", "test"), ("val", "test"))  # lists that must not share pictures


@dataclass(frozen=True)
class Finding:
    path: str
    problem: str  # what is wrong and how to mend it, one line
    fatal: bool  # whether training stops at it; otherwise it runs, on less or to better scores than it seems


class _OpenAnyway:
    """Opens a split that training refuses, in order to find all that is wrong with it."""

    refusal: InputError | None = None

    def require_masks(self) -> None:
        """Each missing mask is a finding of its own."""

    def require_apart(self, path: Path, ids: list[str], val_ids: list[str]) -> None:
        try:
            super().require_apart(path, ids, val_ids)
        except InputError as error:
            self.refusal = error


class _VOC(_OpenAnyway, VOCSegmentation):
    pass


class _Folder(_OpenAnyway, FolderSegmentation):
    pass


def check_dataset(
    name: str, root: str | Path, splits: list[str] | None = None, *, year: str = "2012"
) -> tuple[list[Finding], dict]:
    """Opens every pair of these splits, each pair once, and collects what is wrong. Writes nothing.

    splits: None means all lists in ImageSets/Segmentation, or train and val where there are none.
    Returns the findings and what was checked: {"folder": str, "classes": int, "pairs": {split: count}}, of the
    splits that could be opened. Besides bad files it finds ids listed twice and, between `train`, `val` and
    `test` (also fold1_train and fold1_val), shared ids and one picture under two ids.
    "shapes" is generated if it is not there.
    """
    root = Path(root)
    folder = {"voc": root / "VOCdevkit" / "VOC2012", "shapes": root / "shapes"}.get(name, root)
    lists = folder / "ImageSets" / "Segmentation"
    findings, opened, paths = [], {}, {}
    for split in splits or _all_splits(lists, year):
        try:
            opened[split] = _open(name, root, split, year)
            augmented = (name, year) == ("voc", "2012_aug") and split in ("train", "train_aug")
            paths[split] = str(augmented_list(root, lists) if augmented else lists / f"{split}.txt")
        except InputError as error:
            findings.append(_finding(error))
    findings += _check_files(opened.values())
    findings += _check_lists(opened, paths, leave_out={finding.path for finding in findings})
    findings += _without_masks(opened)
    pairs = {split: len(dataset) for split, dataset in opened.items()}
    classes = max((dataset.num_classes for dataset in opened.values()), default=0)
    return list(dict.fromkeys(findings)), {"folder": str(folder), "classes": classes, "pairs": pairs}


def _all_splits(lists: Path, year: str) -> list[str]:
    names = {path.stem for path in lists.glob("*.txt")} - {"train_aug"}  # it is 2012_aug's train, no other year's
    names |= {"train"} if year == "2012_aug" else set()
    return sorted(names, key=lambda name: (name not in ("train", "val"), name)) or ["train", "val"]


def _open(name: str, root: Path, split: str, year: str) -> SegmentationDataset:
    if name == "voc":
        return _VOC(root, year, split)
    if name == "shapes":
        from datasets import shapes  # here, as in `build_dataset`

        root = shapes.generate(root / "shapes")
    return _Folder(root, split)


def _finding(error: InputError) -> Finding:
    path, _, problem = str(error).partition(": ")
    return Finding(path, problem, fatal=True)


def _check_files(datasets: Iterable[SegmentationDataset]) -> list[Finding]:
    """What is wrong with each picture, each mask and the two together."""
    pairs = {mask: (image, data) for data in datasets for image, mask in zip(data.images, data.masks, strict=True)}
    findings, missing_images, missing_masks = [], [], []
    for mask_path, (image_path, dataset) in tqdm(pairs.items(), desc="checking", unit="pair", disable=None):
        image = mask = None
        if image_path.is_file():
            image = _attempt(findings, read_image, image_path)
        else:
            missing_images.append(image_path)
        if mask_path.is_file():
            mask = _attempt(findings, read_mask, mask_path, dataset.num_classes)
        else:
            missing_masks.append(mask_path)
        if image is not None and mask is not None:
            _attempt(findings, require_one_size, image, mask, mask_path)
        if mask is not None and (problem := _emptiness(mask, dataset.class_names[0])):
            findings.append(Finding(str(mask_path), problem, fatal=False))
    findings += _missing("the picture is missing", missing_images, len(pairs))
    return findings + _missing("the mask is missing", missing_masks, len(pairs))


def _attempt(findings: list[Finding], function: Callable, *arguments: object) -> torch.Tensor | None:
    try:
        return function(*arguments)
    except InputError as error:
        findings.append(_finding(error))
        return None


def _emptiness(mask: torch.Tensor, first_class: str) -> str:
    ids = mask.numpy()  # torch's threads cost more than they give on so little
    labelled = ids[ids != VOID]
    if not labelled.size:
        return "all of it is void; annotate it, or take its id off the list"
    if not labelled.any() and first_class.strip("_").lower() in BACKGROUND:
        return f"all that is labelled is {first_class}; annotate it, unless the picture really shows no class"
    return ""


def _missing(problem: str, paths: list[Path], total: int) -> list[Finding]:
    if paths and len(paths) == total:  # one cause, one finding
        return [Finding(str(paths[0]), f"{problem} ({total:,} of {total:,}: none is there); add them", fatal=True)]
    return [Finding(str(path), f"{problem}; add it, or take its id off the list", fatal=True) for path in paths]


def _check_lists(
    opened: dict[str, SegmentationDataset], paths: dict[str, str], leave_out: set[str]
) -> Iterable[Finding]:
    """Ids that are listed twice, and what lists share that must be apart; `leave_out`: pictures known to be bad."""
    for split, dataset in opened.items():
        if dataset.refusal:
            yield _finding(dataset.refusal)
        if twice := [id for id, count in Counter(dataset.ids).items() if count > 1]:
            yield Finding(paths[split], f"{_some(twice)} listed more than once; leave one line each", fatal=False)
    for one, other in _lists_apart(opened):
        shared = sorted(set(opened[one].ids) & set(opened[other].ids))
        if shared and not (opened[one].refusal and other == "val"):  # which the refusal says already
            problem = f"{_some(shared)} in {other} too, so its scores are too good; take them off one list"
            yield Finding(paths[one], problem, fatal=False)
        for copy, original in _same_pictures(opened[one], opened[other], leave_out):
            problem = f"the very picture of {original}, which is in {one}; take one of them off its list"
            yield Finding(copy, problem, fatal=False)


def _lists_apart(names: Iterable[str]) -> list[tuple[str, str]]:
    return [
        (one, one.removesuffix("_aug").replace(word, counterpart))
        for one in names
        for word, counterpart in APART
        if word in one and one.removesuffix("_aug").replace(word, counterpart) in names
    ]


def _same_pictures(
    one: SegmentationDataset, other: SegmentationDataset, leave_out: set[str]
) -> list[tuple[str, str]]:
    """(path in `other`, id in `one`) of pictures that are the same byte for byte under two ids."""
    by_size = defaultdict(lambda: ([], []))  # only files of one length need be read
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
    """Photographs that are not used, where there are no lists and the masks decide what is."""
    divided = [opened[split] for split in ("train", "val") if split in opened and opened[split].made_split]
    if len(divided) == 2:
        folder = divided[0].folder / "JPEGImages"
        pictures = {path.stem for path in folder.glob("*") if path.suffix in IMAGE_SUFFIXES}
        if alone := sorted(pictures - {id for dataset in divided for id in dataset.ids}):
            problem = f"{_some(alone)} without a mask of that name, so not used; annotate them, or take them away"
            yield Finding(str(folder), problem, fatal=False)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _some(ids: list[str]) -> str:
    shown = ", ".join(ids[:5])
    return f"{shown} and {len(ids) - 5:,} more are" if len(ids) > 5 else f"{shown} {'is' if len(ids) == 1 else 'are'}"


def format_findings(findings: list[Finding], checked: dict, *, limit: int = 20) -> list[str]:
    """A report of `check_dataset`: what was checked, the findings (fatal ones first, at most `limit` files of a
    kind), a verdict."""
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
    return [*lines, f"{fatal:,} fatal, {len(findings) - fatal:,} to look at"]
