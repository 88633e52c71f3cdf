"""Semantic segmentation data in PASCAL VOC layout.

    JPEGImages/<id>.jpg   SegmentationClass/<id>.png   ImageSets/Segmentation/<split>.txt

A mask is a palette PNG whose pixel values are class ids; 255 is void: it is neither trained on nor scored.
The data set owns its class names, their count, its colours and its image ids; nobody else writes them down.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from tqdm import tqdm

from datasets.files import (
    IMAGE_SUFFIXES,
    existing_folder,
    read_ids,
    read_image,
    read_mask,
    read_size,
    require_one_size,
)
from datasets.prepare.download import download_voc
from utils.errors import InputError, SampleError

VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()


def voc_colormap() -> np.ndarray:
    """The colours of VOC's annotations, `[256, 3]` uint8 RGB; row 255 is the cream of its void borders.

    Bit k of the three channels comes from the bits 3k, 3k+1 and 3k+2 of the id, most significant first
    (VOC 2012 development kit, `VOClabelcolormap`).
    """
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def decode_target(target: np.ndarray | torch.Tensor | int, palette: np.ndarray) -> np.ndarray:
    """Colours of class ids: integers of any shape `[...]` in 0..255 to uint8 RGB `[..., 3]`, a new array.

    Raises TypeError for ids that are not integers, ValueError for ids outside 0..255.
    """
    ids = target.cpu().numpy() if isinstance(target, torch.Tensor) else np.asarray(target)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"class ids must be integers, not {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() <= 255:
        raise ValueError(f"class ids must be in 0..255, found {ids.min()}..{ids.max()}")
    return palette[ids]


class SegmentationDataset(torch.utils.data.Dataset):
    """Pictures and masks of one split of a folder in VOC layout.

    `self[i]` and `self[epoch, i]` are (image, mask) = (`tv_tensors.Image` uint8 RGB `[3, H, W]`,
    `tv_tensors.Mask` uint8 class ids `[H, W]`, void 255) through
    `transform(image, mask, epoch=epoch, index=i)`; the epoch (0 if not given) moves the augmentation on.

    Attributes: `class_names`, `num_classes`, `palette` (`[256, 3]` uint8 RGB), `ids`, `images` and `masks`
    (paths by index), `missing_images` (paths; `require_images` refuses when there are any).
    Raises InputError for a missing folder or mask.
    """

    made_split = False  # whether the split was made here, for want of a list

    def __init__(
        self,
        folder: Path,
        ids: list[str],
        *,
        mask_folder: Path,
        class_names: list[str],
        palette: np.ndarray,
        transform: Callable | None = None,
    ) -> None:
        self.folder, self.ids, self.transform = folder, ids, transform
        self.class_names, self.palette = list(class_names), palette
        self.masks = [mask_folder / f"{id}.png" for id in ids]
        self.require_masks()
        self.images = [_find_image(folder / "JPEGImages", id) for id in ids]
        self.missing_images = [path for path in self.images if not path.is_file()]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        self.require_images()
        image, mask = self._pair(index)
        image, mask = tv_tensors.Image(image), tv_tensors.Mask(mask)
        if self.transform is not None:
            image, mask = self.transform(image, mask, epoch=epoch, index=index)
        return image, mask

    def _pair(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            image, mask = self.image(index), self.mask(index)
            require_one_size(image, mask, self.masks[index])
        except InputError as error:
            raise SampleError(str(error)) from None
        return image, mask

    def bad_samples(self) -> dict[int, str]:
        """The indices of the samples that cannot be used, and why: each file is read once."""

        def problem(index: int) -> str | None:
            try:
                self._pair(index)
            except SampleError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:  # Pillow reads outside Python's lock
            problems = pool.map(problem, range(len(self)))
            bar = tqdm(problems, total=len(self), desc="checking", unit="pair", disable=None)
            return {index: text for index, text in enumerate(bar) if text}

    def leave_out(self, indices: Iterable[int]) -> None:
        """Takes samples off the split. Raises InputError if that leaves none."""
        kept = sorted(set(range(len(self))) - set(indices))
        if not kept:
            raise InputError(f"{self.folder}: not one of the {len(self)} samples of this split can be used; mend it")
        for name in ("ids", "images", "masks"):
            values = getattr(self, name)
            setattr(self, name, [values[index] for index in kept])

    def image(self, index: int) -> torch.Tensor:
        """The picture as it is, uint8 RGB `[3, H, W]`."""
        return read_image(self.images[index])

    def mask(self, index: int) -> torch.Tensor:
        """The annotation as it is, uint8 class ids `[H, W]`; it is there even where the photographs are missing."""
        return read_mask(self.masks[index], self.num_classes)

    def require_masks(self) -> None:
        """Raises InputError if masks are missing."""
        missing = [path for path in self.masks if not path.is_file()]
        if missing:
            raise InputError(
                f"{missing[0]}: the mask is missing ({len(missing)} of {len(self)} in this split); "
                "add it, or take its id off the list"
            )

    def require_images(self) -> None:
        """Raises InputError if pictures are missing: annotations alone serve statistics, not training."""
        if self.missing_images:
            raise InputError(
                f"{self.missing_images[0]}: the picture is missing ({len(self.missing_images)} of {len(self)} "
                "in this split); annotations alone serve statistics only, add the pictures"
            )

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each mask, from its file's header."""
        return [read_size(path) for path in self.masks]

    def decode_target(self, target: np.ndarray | torch.Tensor | int) -> np.ndarray:
        """Class ids `[...]` to the data set's colours, uint8 RGB `[..., 3]`; see `decode_target` above."""
        return decode_target(target, self.palette)


class VOCSegmentation(SegmentationDataset):
    """PASCAL VOC 2012 under `<root>/VOCdevkit/VOC2012`.

    year: "2012", or "2012_aug": its `train` is the list `train_aug.txt` (beside the other splits or in root)
    with the masks in `SegmentationClassAug`; its other splits are those of 2012.
    Raises InputError for what is missing, and for an augmented list that shares an id with `val`.
    """

    class_names = VOC_CLASSES
    palette = voc_colormap()

    def __init__(
        self,
        root: str | Path,
        year: str = "2012",
        image_set: str = "train",
        transform: Callable | None = None,
        download: bool = False,
    ) -> None:
        if year not in ("2012", "2012_aug"):
            raise InputError(f"--year {year}: there are 2012 and 2012_aug")
        if download:
            download_voc(root, year)
        folder = Path(root) / "VOCdevkit" / "VOC2012"
        if not folder.is_dir():
            raise InputError(
                f"{folder}: there is no such folder; give --data_root what holds VOCdevkit, or main.py --download"
            )
        lists, masks = folder / "ImageSets" / "Segmentation", "SegmentationClass"
        if year == "2012_aug" and image_set in ("train", "train_aug"):
            path, masks = augmented_list(Path(root), lists), "SegmentationClassAug"
            ids = read_ids(path)
            self.require_apart(path, ids, read_ids(lists / "val.txt"))
        else:
            ids = read_ids(lists / f"{image_set}.txt")
        super().__init__(
            folder,
            ids,
            mask_folder=existing_folder(folder / masks),
            class_names=VOC_CLASSES,
            palette=self.palette,
            transform=transform,
        )

    def require_apart(self, path: Path, ids: list[str], val_ids: list[str]) -> None:
        """Raises InputError if the training list at `path` shares an id with `val`."""
        shared = sorted(set(ids) & set(val_ids))
        if shared:
            raise InputError(f"{path}: {shared[0]} is in val too ({len(shared)} such ids); take them off the list")


def _find_image(folder: Path, id: str) -> Path:
    candidates = [folder / f"{id}{suffix}" for suffix in IMAGE_SUFFIXES]
    return next((path for path in candidates if path.is_file()), candidates[0])


def augmented_list(root: Path, lists: Path) -> Path:
    """Where the list of 2012_aug lies: beside the other lists or in root. Raises InputError if nowhere."""
    path = next((p for p in (lists / "train_aug.txt", root / "train_aug.txt") if p.is_file()), None)
    if path is None:
        file = lists / "train_aug.txt"
        raise InputError(f"{file}: missing, and not in {root} either; python -m datasets.prepare.sbd makes it")
    return path
