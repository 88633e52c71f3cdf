"""Opens your own data: a folder in VOC layout, with or without split lists."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.files import UNREADABLE, VOID, existing_folder, read_class_names, read_ids
from datasets.voc import SegmentationDataset, voc_colormap
from utils.errors import InputError


class FolderSegmentation(SegmentationDataset):
    """Any folder in VOC layout with a `class_names.txt`, as labelme2voc writes it.

    Masks are in `SegmentationClass/*.png` or `SegmentationClassPNG/*.png`. Colours come from the masks' own palette.
    Without split lists, the ids are divided at random, by `seed`, into 80% `train` and 20% `val`, and `made_split`
    is True. If `lists` is an existing folder, the lists of an earlier division are read from there instead.
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
            palette=_palette_of(masks / f"{ids[0]}.png", len(class_names)),
            transform=transform,
        )


def _divide(masks: Path, image_set: str, seed: int) -> list[str]:
    if image_set not in ("train", "val"):
        lists = masks.parent / "ImageSets" / "Segmentation"
        raise InputError(f"{lists}: has no list {image_set!r}; without lists there are only train and val")
    ids = sorted(path.stem for path in masks.glob("*.png"))
    if len(ids) < 2:
        raise InputError(f"{masks}: has {len(ids)} masks; at least 2 are needed for train and val")
    order = np.random.default_rng(seed).permutation(len(ids))
    num_val = max(1, round(0.2 * len(ids)))
    chosen = order[:num_val] if image_set == "val" else order[num_val:]
    return [ids[i] for i in sorted(chosen)]


def _palette_of(mask: Path, num_classes: int) -> np.ndarray:
    """Returns the palette of a mask file if its colours tell the classes apart, otherwise VOC's."""
    palette = voc_colormap()
    try:
        with Image.open(mask) as image:
            own = image.getpalette("RGB") if image.mode == "P" else None
    except UNREADABLE:
        # The problem is reported when the mask itself is read.
        return palette
    if not own:
        return palette
    own = np.array(own, np.uint8).reshape(-1, 3)
    grey_ramp = (own == np.arange(len(own))[:, None]).all()  # the palette that a grey PNG gets in mode P
    if grey_ramp or len(np.unique(own[:num_classes], axis=0)) < num_classes:
        return palette
    palette[:num_classes] = own[:num_classes]
    if len(own) > VOID:
        palette[VOID] = own[VOID]
    return palette
