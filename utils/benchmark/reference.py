"""The plain references of `utils.benchmark`: what one writes with PIL, torchvision and torch alone."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import functional as F

from datasets import build_dataset
from datasets.files import VOID
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, MEAN_COLOUR
from datasets.voc import VOC_CLASSES
from network import build_model
from network.upsample import DecoderConv2d


class PlainDataset(Dataset):
    """The usual pipeline: the whole picture is scaled, padded, cropped, flipped, and made float32 one by one."""

    def __init__(self, images: list[Path], masks: list[Path], crop_size: int | None) -> None:
        self.images, self.masks, self.crop_size = images, masks, crop_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = Image.open(self.images[index]).convert("RGB"), Image.open(self.masks[index])
        if self.crop_size:
            image, mask = self._augment(image, mask, self.crop_size)
        image = F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)  # [3, H, W]
        return image, torch.from_numpy(np.array(mask))  # [H, W]

    def _augment(self, image: Image.Image, mask: Image.Image, crop_size: int) -> tuple[Image.Image, Image.Image]:
        scale = float(torch.empty(1).uniform_(0.5, 2.0))
        size = [round(side * scale) for side in (image.height, image.width)]
        image, mask = F.resize(image, size), F.resize(mask, size, F.InterpolationMode.NEAREST)
        padding = [0, 0, max(0, crop_size - size[1]), max(0, crop_size - size[0])]
        image, mask = F.pad(image, padding, tuple(MEAN_COLOUR)), F.pad(mask, padding, VOID)
        top, left = (int(torch.randint(side - crop_size + 1, ())) for side in (image.height, image.width))
        image, mask = (F.crop(picture, top, left, crop_size, crop_size) for picture in (image, mask))
        return (F.hflip(image), F.hflip(mask)) if torch.rand(()) < 0.5 else (image, mask)


def plain_loader(opts: argparse.Namespace, *, batches: int, workers: int) -> DataLoader:
    split = build_dataset("folder", opts.folder, "train")
    dataset = PlainDataset(split.images, split.masks, opts.crop_size)
    sampler = RandomSampler(dataset, num_samples=batches * opts.batch_size)
    pin = opts.device.type == "cuda"
    return DataLoader(
        dataset, opts.batch_size, sampler=sampler, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin
    )


def plain_confusion(target: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """The usual confusion matrix `[C, C]` of two label maps."""
    valid = (target >= 0) & (target < num_classes)
    index = num_classes * target[valid].astype(int) + prediction[valid]
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


class PlainDecoderConv2d(nn.Conv2d):
    """The decoder's convolution as the paper has it: upsampled, concatenated, convolved."""

    def forward(self, maps: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        low_level, x = maps
        x = nn.functional.interpolate(x, size=low_level.shape[-2:], mode="bilinear", align_corners=False)
        return super().forward(torch.cat([low_level, x], dim=1))


def with_plain_layers(model: nn.Module) -> nn.Module:
    """The same model, of torch's own layers alone."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):  # a faster kind has the same attributes
            layer.__class__ = PlainDecoderConv2d if isinstance(layer, DecoderConv2d) else nn.Conv2d
    return model


def plain_model(opts: argparse.Namespace, state: dict | None = None) -> nn.Module:
    """The same architecture and weights out of torch's own layers alone, float32, NCHW, in evaluation mode."""
    model = with_plain_layers(build_model(opts.model, num_classes=len(VOC_CLASSES), output_stride=opts.output_stride))
    if state is not None:
        model.load_state_dict(state)
    return model.to(opts.device).eval()


@torch.no_grad()
def plain_predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Class ids `[B, H, W]` on the CPU, of normalised float32 `[B, 3, H, W]`."""
    return model(images).argmax(1).cpu()
