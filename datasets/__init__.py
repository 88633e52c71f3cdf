"""Opens data sets by name. No other module knows the names."""

from collections.abc import Callable, Collection
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
    named: Collection[str] = ("train", "val"),
    lists: Path | None = None,
    seed: int = 1,
) -> SegmentationDataset:
    """Opens one split of a data set. Its masks and images may still be missing, see `require_masks`.

    `year` and `download` apply to "voc"; `named`, `lists` and `seed` to "folder", see `FolderSegmentation`.
    "shapes" is generated in `<root>/shapes` on first use.
    Raises InputError for a name that is not in `DATASETS` and for data that cannot be used.
    """
    if name == "voc":
        dataset = VOCSegmentation(root, year, split, transform, download)
    elif name == "folder":
        dataset = FolderSegmentation(root, split, transform, named=named, lists=lists, seed=seed)
    elif name == "shapes":
        # Imported late: `python -m datasets.shapes` warns if the package has imported it before.
        from datasets import shapes

        dataset = FolderSegmentation(shapes.generate(Path(root) / "shapes"), split, transform)
    else:
        raise InputError(f"--dataset {name}: there is no such data set; choose one of {', '.join(DATASETS)}")
    dataset.split = split
    return dataset
