"""Opens data sets by name. No other module knows the names."""

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
    """Opens one split of a data set.

    `year` and `download` apply to "voc". `lists` and `seed` apply to a "folder" without split lists, see
    `FolderSegmentation`. "shapes" is generated in `<root>/shapes` on first use.
    Raises InputError for a name that is not in `DATASETS` and for data that cannot be used.
    """
    if name == "voc":
        return VOCSegmentation(root, year, split, transform, download)
    if name == "folder":
        return FolderSegmentation(root, split, transform, lists=lists, seed=seed)
    if name == "shapes":
        # Imported late: `python -m datasets.shapes` warns if the package has imported it before.
        from datasets import shapes

        return FolderSegmentation(shapes.generate(Path(root) / "shapes"), split, transform)
    raise InputError(f"--dataset {name}: there is no such data set; choose one of {', '.join(DATASETS)}")
