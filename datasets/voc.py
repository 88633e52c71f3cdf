"""Reads semantic segmentation data in PASCAL VOC layout.

    JPEGImages/<id>.jpg   SegmentationClass/<id>.png   ImageSets/Segmentation/<split>.txt

A mask is a palette PNG whose pixel values are class ids. 255 is void: neither trained on nor scored.
The data set owns its class names, their number, its colours and its image ids. No other module repeats them.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from tqdm import tqdm

from datasets.files import (
    CONVERT,
    IMAGE_SUFFIXES,
    existing_folder,
    list_files,
    only_path,
    read_ids,
    read_image,
    read_mask,
    read_size,
)
from utils.errors import InputError, SampleError

VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()


def voc_colormap() -> np.ndarray:
    """Returns the colours of VOC's annotations, `[256, 3]` uint8 RGB. Row 255 is the cream of the void borders.

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
    """Maps class ids, integers in 0..255 of any shape `[...]`, to their colours, a new uint8 RGB array `[..., 3]`.

    Raises TypeError for ids that are not integers, ValueError for ids outside 0..255.
    """
    ids = target.cpu().numpy() if isinstance(target, torch.Tensor) else np.asarray(target)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"class ids must be integers, not {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() <= 255:
        raise ValueError(f"class ids must be in 0..255, found {ids.min()}..{ids.max()}")
    return palette[ids]


def require_one_size(image: torch.Tensor, mask: torch.Tensor, mask_path: Path) -> None:
    """Raises InputError if an image `[3, H, W]` and its mask `[H, W]` differ in size."""
    (height, width), (mask_height, mask_width) = image.shape[1:], mask.shape
    if (height, width) == (mask_height, mask_width):
        return
    turned = (height, width) == (mask_width, mask_height)
    raise InputError(
        f"{mask_path}: the mask is {mask_width}x{mask_height}, its image {width}x{height}; "
        + (
            "one of them is turned by 90 degrees: turn it back"
            if turned
            else "they must have the same size: resize one"
        )
    )


class SegmentationDataset(torch.utils.data.Dataset):
    """The images and masks of one split of a folder in VOC layout.

    `dataset[i]` and `dataset[epoch, i]` give `transform(image, mask, epoch=epoch, index=i)`. The image is a
    `tv_tensors.Image`, uint8 RGB `[3, H, W]`, the mask a `tv_tensors.Mask`, uint8 class ids `[H, W]`, void 255.
    The epoch, 0 by default, varies the augmentation.

    An image is turned upright as its EXIF orientation says, unless the mask fits only the pixels as they are stored.

    convert: the command to convert the masks, for errors.
    Attributes: `class_names`, `num_classes`, `palette` (`[256, 3]` uint8 RGB), `ids`, `images` and `masks` (paths by
    index), `all_masks` (those of other splits too, where they are known), `missing_images`, and `source`, the list or
    the folder that the ids come from.
    """

    split = ""  # the name of the split
    made_split = False  # whether the split was drawn here, because the data set has no lists

    def __init__(
        self,
        folder: Path,
        ids: list[str],
        *,
        images: Iterable[Path],
        masks: Iterable[Path],
        class_names: list[str],
        palette: np.ndarray | None = None,
        transform: Callable | None = None,
        convert: str = CONVERT,
    ) -> None:
        self.folder, self.ids, self.images, self.masks = folder, ids, list(images), list(masks)
        self.class_names, self.palette = list(class_names), voc_colormap() if palette is None else palette
        self.transform, self.convert = transform, convert
        self.all_masks, self.source = self.masks, folder
        self.missing_images = [path for path in self.images if not path.is_file()]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        self.require_images()
        image, mask = self.pair(index)
        image, mask = tv_tensors.Image(image), tv_tensors.Mask(mask)
        if self.transform is not None:
            image, mask = self.transform(image, mask, epoch=epoch, index=index)
        return image, mask

    def pair(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads an image and its mask without the transform; see `image` and `mask`.

        Raises SampleError if one of them cannot be used or their sizes differ.
        """
        try:
            mask = self.mask(index)
            image = read_image(self.images[index], fits=tuple(mask.shape))
            require_one_size(image, mask, self.masks[index])
        except InputError as error:
            raise SampleError(str(error)) from None
        return image, mask

    def bad_samples(self) -> dict[int, str]:
        """Reads every file once and returns the index of each unusable sample with the reason."""

        def problem(index: int) -> str | None:
            try:
                self.pair(index)
            except SampleError as error:
                return str(error)

        # Threads, because Pillow releases Python's lock while it reads.
        with ThreadPoolExecutor() as pool:
            problems = pool.map(problem, range(len(self)))
            bar = tqdm(problems, total=len(self), desc="checking", unit="pair", disable=None)
            return {index: text for index, text in enumerate(bar) if text}

    def leave_out(self, indices: Iterable[int]) -> None:
        """Removes samples from the split. Raises InputError if none is left."""
        kept = sorted(set(range(len(self))) - set(indices))
        if not kept:
            raise InputError(f"{self.folder}: none of the {len(self)} samples of this split can be used; fix them")
        columns = (self.ids, self.images, self.masks)
        self.ids, self.images, self.masks = ([column[index] for index in kept] for column in columns)

    def image(self, index: int) -> torch.Tensor:
        """Reads an image without the transform, uint8 RGB `[3, H, W]`. Looks at the size of the mask."""
        return read_image(self.images[index], fits=read_size(self.masks[index]))

    def mask(self, index: int) -> torch.Tensor:
        """Reads a mask without the transform, uint8 class ids `[H, W]`. Does not need the image."""
        return read_mask(self.masks[index], self.num_classes, convert=self.convert)

    def require_apart(self) -> None:
        """Raises InputError if the split shares an id with one that it must not overlap."""

    def require_masks(self) -> None:
        """Raises InputError if masks are missing, and as `require_apart` does."""
        self.require_apart()
        missing = [path for path in self.masks if not path.is_file()]
        if missing:
            raise InputError(
                f"{missing[0]}: the mask is missing ({len(missing)} of {len(self)} in this split); "
                "add it, or remove its id from the list"
            )

    def require_images(self) -> None:
        """Raises InputError if images are missing. Statistics need only the masks, training needs both."""
        if self.missing_images:
            raise InputError(
                f"{self.missing_images[0]}: the image is missing ({len(self.missing_images)} of {len(self)} "
                "in this split); add the images, masks alone are enough only for statistics"
            )

    def sizes(self) -> list[tuple[int, int]]:
        """Reads (height, width) of every mask from the file headers."""
        return [read_size(path) for path in self.masks]

    def decode_target(self, target: np.ndarray | torch.Tensor | int) -> np.ndarray:
        """Maps class ids `[...]` to the data set's colours, uint8 RGB `[..., 3]`; see `decode_target` above."""
        return decode_target(target, self.palette)


class VOCSegmentation(SegmentationDataset):
    """PASCAL VOC 2012 in `<root>/VOCdevkit/VOC2012`.

    year: "2012" or "2012_aug". In 2012_aug, `train` is the list `train_aug.txt`, beside the other lists or in `root`,
    with the masks in `SegmentationClassAug`. All other splits are those of 2012.
    Raises InputError for missing files, and for an augmented list that shares an id with `val`.
    """

    def __init__(
        self,
        root: str | Path,
        year: str = "2012",
        image_set: str = "train",
        transform: Callable | None = None,
        download: bool = False,
    ) -> None:
        if year not in ("2012", "2012_aug"):
            raise InputError(f"--year {year}: there is no such year; choose 2012 or 2012_aug")
        if download:
            from datasets.prepare.download import download_voc

            download_voc(root, year)
        folder = Path(root) / "VOCdevkit" / "VOC2012"
        if not folder.is_dir():
            raise InputError(
                f"{folder}: there is no such folder; set --data_root to the folder that holds VOCdevkit, "
                "or run main.py --download"
            )
        lists, masks = folder / "ImageSets" / "Segmentation", "SegmentationClass"
        if year == "2012_aug" and image_set in ("train", "train_aug"):
            source, masks = augmented_list(Path(root), lists), "SegmentationClassAug"
            ids = read_ids(source)
            self.shared = sorted(set(ids) & set(read_ids(lists / "val.txt")))
        else:
            source, self.shared = lists / f"{image_set}.txt", []
            ids = read_ids(source)
        images = list_files(folder / "JPEGImages", IMAGE_SUFFIXES)
        super().__init__(
            folder,
            ids,
            images=[only_path(images.get(id) or [folder / "JPEGImages" / f"{id}.jpg"]) for id in ids],
            masks=[existing_folder(folder / masks) / f"{id}.png" for id in ids],
            class_names=VOC_CLASSES,
            transform=transform,
        )
        self.source = source

    def require_apart(self) -> None:
        if self.shared:
            shared = f"{self.shared[0]} is also in val ({len(self.shared)} such ids)"
            raise InputError(f"{self.source}: {shared}; remove them from the list")


def augmented_list(root: Path, lists: Path) -> Path:
    """Finds the list of 2012_aug beside the other lists or in `root`. Raises InputError if it is in neither."""
    path = next((p for p in (lists / "train_aug.txt", root / "train_aug.txt") if p.is_file()), None)
    if path is None:
        file = lists / "train_aug.txt"
        raise InputError(f"{file}: missing, also in {root}; create it with python -m datasets.prepare.sbd")
    return path
