"""Opens your own data: a folder of images and masks with a list of class names."""

import shlex
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.files import (
    VOID,
    existing_folder,
    find_class_names,
    format_shares,
    read_class_names,
    read_mask,
    read_palette,
)
from datasets.layout import Layout, Splits
from datasets.voc import SegmentationDataset, voc_colormap
from utils.errors import InputError


class FolderSegmentation(SegmentationDataset):
    """One split of a folder in one of the layouts of `datasets.layout`, with its class names in `class_names.txt`.

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
    if last == 0 or last > 3 * len(ids):
        fix = f"these are not ids from 0 on; convert the masks: {layout.convert}"
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
