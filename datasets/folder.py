"""A folder of one's own in VOC layout, with or without split lists."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.files import UNREADABLE, VOID, existing_folder, read_class_names, read_ids
from datasets.voc import SegmentationDataset, voc_colormap
from utils.errors import InputError


class FolderSegmentation(SegmentationDataset):
    """Any folder in VOC layout with a `class_names.txt`, as labelme2voc writes it.

    Masks are in `SegmentationClass/*.png`, or in `SegmentationClassPNG/`. Without split lists the ids are
    divided into `train` and `val`, 80 to 20, by the seed (`made_split` is then True), unless `lists` is a
    folder that holds the lists of an earlier division. Colours are those of the masks' own palette.
    """

    def __init__(
        self,
        root: str | Path,
        image_set: str = "train",
        transform: Callable | None = None,
        *,
        lists: Path | None = None,
        seed: int = 1,
    ) -> None:
        folder = existing_folder(Path(root))
        class_names = read_class_names(folder / "class_names.txt")
        masks = folder / "SegmentationClass"
        if (folder / "SegmentationClassPNG").is_dir() and not any(masks.glob("*.png")):
            masks = folder / "SegmentationClassPNG"
        existing_folder(masks)
        own_lists = folder / "ImageSets" / "Segmentation"
        self.made_split = not any(own_lists.glob("*.txt"))
        if not self.made_split:
            ids = read_ids(own_lists / f"{image_set}.txt")
        elif lists is not None and lists.is_dir():
            ids = read_ids(lists / f"{image_set}.txt")
        else:
            ids = _divide(masks, image_set, seed)
        super().__init__(
            folder,
            ids,
            mask_folder=masks,
            class_names=class_names,
            palette=_own_palette(masks / f"{ids[0]}.png", len(class_names)),
            transform=transform,
        )


def _divide(masks: Path, image_set: str, seed: int) -> list[str]:
    if image_set not in ("train", "val"):
        raise InputError(f"split {image_set!r}: without ImageSets/Segmentation/*.txt there are train and val only")
    ids = sorted(path.stem for path in masks.glob("*.png"))
    if len(ids) < 2:
        raise InputError(f"{masks}: {len(ids)} masks; it takes 2 at least to divide them into train and val")
    order = np.random.default_rng(seed).permutation(len(ids))
    num_val = max(1, round(0.2 * len(ids)))
    chosen = order[:num_val] if image_set == "val" else order[num_val:]
    return [ids[i] for i in sorted(chosen)]


def _own_palette(mask: Path, num_classes: int) -> np.ndarray:
    """The palette of a mask file where it tells the classes apart by colour, otherwise VOC's."""
    palette = voc_colormap()
    try:
        with Image.open(mask) as picture:
            own = picture.getpalette("RGB") if picture.mode == "P" else None
    except UNREADABLE:
        return palette  # reading this mask as a mask names the fault
    if not own:
        return palette
    own = np.array(own, np.uint8).reshape(-1, 3)
    grey_ramp = (own == np.arange(len(own))[:, None]).all()  # what a grey PNG becomes in mode P
    if grey_ramp or len(np.unique(own[:num_classes], axis=0)) < num_classes:
        return palette
    palette[:num_classes] = own[:num_classes]
    if len(own) > VOID:
        palette[VOID] = own[VOID]
    return palette
