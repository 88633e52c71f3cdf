"""Implements the references of `utils.benchmark` as one writes them with PIL, torchvision and torch alone."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import functional as F

from datasets import build_dataset
from datasets.files import VOID
from datasets.transforms import MEAN_COLOUR
from datasets.voc import VOC_CLASSES
from network import build_model
from network._deeplab import DeepLab
from network.backbone import IMAGENET_MEAN, IMAGENET_STD


class PlainDataset(Dataset):
    """The usual pipeline: each whole image is resized, padded, cropped, flipped and normalised to float32."""

    def __init__(self, images: list[Path], masks: list[Path], crop_size: int | None) -> None:
        self.images, self.masks, self.crop_size = images, masks, crop_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = Image.open(self.images[index]).convert("RGB"), Image.open(self.masks[index])
        if self.crop_size:
            image, mask = augment(image, mask, self.crop_size)
        image = F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)  # [3, H, W]
        return image, torch.from_numpy(np.array(mask))  # [H, W]


def augment(image: Image.Image, mask: Image.Image, crop_size: int) -> tuple[Image.Image, Image.Image]:
    """Scales, pads, crops and flips at random."""
    scale = float(torch.empty(1).uniform_(0.5, 2.0))
    size = [round(side * scale) for side in (image.height, image.width)]
    image, mask = F.resize(image, size), F.resize(mask, size, F.InterpolationMode.NEAREST)
    padding = [0, 0, max(0, crop_size - size[1]), max(0, crop_size - size[0])]
    image, mask = F.pad(image, padding, tuple(MEAN_COLOUR)), F.pad(mask, padding, VOID)
    top, left = (int(torch.randint(side - crop_size + 1, ())) for side in (image.height, image.width))
    image, mask = (F.crop(whole, top, left, crop_size, crop_size) for whole in (image, mask))
    return (F.hflip(image), F.hflip(mask)) if torch.rand(()) < 0.5 else (image, mask)


def plain_loader(opts: argparse.Namespace, *, itrs: int, workers: int) -> DataLoader:
    """Loads training batches of `--batch_size` random crops: float32 `[B, 3, H, W]` and masks uint8 `[B, H, W]`."""
    split = build_dataset("folder", opts.folder, "train")
    dataset = PlainDataset(split.images, split.masks, opts.crop_size)
    sampler = RandomSampler(dataset, num_samples=itrs * opts.batch_size)
    keep, pin = workers > 0, opts.device.type == "cuda"
    return DataLoader(
        dataset, opts.batch_size, sampler=sampler, num_workers=workers, persistent_workers=keep, pin_memory=pin
    )


def plain_confusion(target: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the confusion matrix `[C, C]` (rows = target) of two label maps of any shape."""
    valid = (target >= 0) & (target < num_classes)
    index = num_classes * target[valid].astype(int) + prediction[valid]
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def plain_model(opts: argparse.Namespace) -> DeepLab:
    """Builds the same network from torch's own layers alone, float32 and NCHW, in evaluation mode."""
    model = build_model(opts.model, num_classes=len(VOC_CLASSES), output_stride=opts.output_stride)
    return model.to(opts.device).eval()


@torch.no_grad()
def plain_predict(model: DeepLab, images: torch.Tensor) -> torch.Tensor:
    """Predicts class ids `[B, H, W]`, on the CPU, for normalised float32 `[B, 3, H, W]`."""
    return model(images).argmax(1).cpu()
