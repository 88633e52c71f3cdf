"""The one place that knows the data sets by name."""

from collections.abc import Callable
from pathlib import Path

from datasets.folder import FolderSegmentation
from datasets.voc import SegmentationDataset, VOCSegmentation
from utils.errors import InputError

DATASETS = ("voc", "folder", "shapes")


def build_dataset(
    name: str,
    root: str | Path,
    split: str,
    transform: Callable | None = None,
    *,
    year: str = "2012",
    download: bool = False,
    lists: Path | None = None,
    seed: int = 1,
) -> SegmentationDataset:
    """A split of a data set.

    `year` and `download` are for "voc"; `lists` and `seed` for a "folder" without split lists, see
    `FolderSegmentation`. "shapes" is generated in `<root>/shapes` at its first use.
    Raises InputError for a name that is none of `DATASETS` and for data that cannot be used.
    """
    if name == "voc":
        return VOCSegmentation(root, year, split, transform, download)
    if name == "folder":
        return FolderSegmentation(root, split, transform, lists=lists, seed=seed)
    if name == "shapes":
        from datasets import shapes  # here, for `python -m datasets.shapes` warns if it was imported before

        return FolderSegmentation(shapes.generate(Path(root) / "shapes"), split, transform)
    raise InputError(f"no data set is named {name!r}; there are {', '.join(DATASETS)}")
