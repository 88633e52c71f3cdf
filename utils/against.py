"""Stores what an evaluation counted per image, and compares it with another evaluation (`--against`)."""

import logging
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from datasets.files import is_file, is_folder
from utils.bootstrap import cautions, format_differences, paired_differences
from utils.errors import InputError
from utils.files import replacing

log = logging.getLogger("deeplab")


class ImageCounts(NamedTuple):
    """What an evaluation leaves in `counts.npz`: enough to compare it with another one of the same images."""

    ids: list[str]
    class_names: list[str]
    counts: np.ndarray  # int32 [N, 3, C] as from `utils.card.image_counts`

    def sorted(self) -> Self:
        """Returns the same with the images in the order of their ids."""
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        return self._replace(ids=[self.ids[index] for index in order], counts=self.counts[order])

    def save(self, path: Path) -> None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, ids=self.ids, class_names=self.class_names, counts=self.counts)


def read_counts(path: Path, *, flag: str = "") -> ImageCounts:
    """Reads a `counts.npz`, or that of a test's folder, and sorts its images.

    Raises InputError, which begins with `flag` and the path, for anything else.
    """
    file = path / "counts.npz" if is_folder(path) else path
    if not is_file(file):
        raise InputError(
            f"{flag}{path}: has no counts.npz; test that model with --test_only, and give its folder, such as "
            "runs/B/test_val"
        )
    try:
        with np.load(file, allow_pickle=False) as stored:
            ids, names, counts = (stored[name] for name in ImageCounts._fields)
        whole = ids.dtype.kind == names.dtype.kind == "U" and ids.ndim == names.ndim == 1 and counts.dtype == np.int32
        if not whole or counts.shape != (len(ids), 3, len(names)) or not counts.size:
            raise ValueError
    # A file that is cut off or something else fails in many ways, depending on where.
    except Exception:
        raise InputError(f"{flag}{path}: not the counts that --test_only writes; test that model again") from None
    return ImageCounts(ids.tolist(), names.tolist(), counts).sorted()


def read_against(path: str | None, ids: list[str], class_names: list[str]) -> ImageCounts | None:
    """Reads the counts of `--against` before an evaluation; None without the flag.

    Raises InputError if they cannot be read, or are not of these images and classes.
    """
    if path is None:
        return None
    other, flag = read_counts(Path(path), flag="--against "), f"--against {path}"
    if other.class_names != class_names:
        theirs, ours = ", ".join(other.class_names), ", ".join(class_names)
        raise InputError(f"{flag}: its classes ({theirs}) are not those of this data set ({ours}); leave it out")
    if other.ids != sorted(ids):
        alone = sorted(set(ids) ^ set(other.ids))
        example = f" ({alone[0]} is in one of them only)" if alone else ""
        raise InputError(
            f"{flag}: has {len(other.ids)} images, this test {len(ids)}{example}; test both on the same --val_split"
        )
    return other


def log_comparison(mine: ImageCounts, other: ImageCounts, path: str) -> None:
    """Logs how this evaluation compares with that of `--against`. Raises InputError if their masks differ."""
    mine = mine.sorted()
    different = (mine.counts[:, 1] != other.counts[:, 1]).any(axis=1)
    if different.any():
        raise InputError(
            f"--against {path}: was scored on other masks (first {mine.ids[different.argmax()]}); test both on the "
            "same masks, both with --crop_val or both without"
        )
    differences = paired_differences(mine.counts, other.counts, mine.class_names)
    log.info("\n".join(format_differences(differences, path)))
    for caution in cautions(differences):
        log.warning(caution)
