"""Transforms an image and its mask together: random scale, crop and flip for training, none for evaluation.

A centre crop for validation is there only to compare with codebases that score one.
A sample's augmentation depends on (seed, epoch, index) alone, not on the number of workers or processes. The classes
in `torchvision.transforms.v2` draw from the global generator, which differs between workers. So the parameters are
drawn here, from a separate generator for each sample, and the functions of v2 apply them.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datasets.files import VOID
from utils.errors import InputError

MAX_CROP = 2**14  # pixels; such a crop takes 800 MB
MAX_SCALE = 16
MAX_ASPECT = 16  # longer side over shorter side
MEAN_COLOUR = (124, 116, 104)  # RGB, over ImageNet


class TrainTransform:
    """Scales, crops and flips at random. The result is always `crop_size` x `crop_size`.

    The scale is uniform in `scale`. The crop lies uniformly within the scaled image; along a side that is shorter
    than the crop, the image lies uniformly within the crop. `flip` is the probability of a horizontal flip.
    `color_jitter` x multiplies brightness, contrast and saturation, in this order, by factors uniform in 1 - x to
    1 + x. Padding is the mean colour in the image and void in the mask.
    Only the part of the image that ends up in the crop is resized: the same distribution at a fraction of the work.
    """

    def __init__(
        self, crop_size: int, *, scale: tuple[float, float], flip: float, color_jitter: float, seed: int
    ) -> None:
        self.crop_size, self.scale, self.flip, self.color_jitter, self.seed = (
            crop_size,
            scale,
            flip,
            color_jitter,
            seed,
        )
        colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)
        self.blank = colour.repeat(crop_size, crop_size, 1).permute(2, 0, 1)  # [3, crop_size, crop_size]

    def __call__(
        self, image: tv_tensors.Image, mask: tv_tensors.Mask, *, epoch: int = 0, index: int = 0
    ) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch, index)))
        scale = rng.uniform(*self.scale)
        top, height, before_y, size_y = self._window(image.shape[-2], scale, rng)
        left, width, before_x, size_x = self._window(image.shape[-1], scale, rng)
        box, size = [top, left, height, width], [size_y, size_x]
        # Channels last, as PIL stores pixels. F.resize would copy a mere view into planes and take twice as long.
        window = F.crop(image, *box).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # [3, height, width]
        pixels = F.resize(window, size, InterpolationMode.BILINEAR, antialias=True)  # [3, size_y, size_x]
        # NEAREST rounds down, which shifts a mask by up to half a pixel against its image; NEAREST_EXACT does not.
        # The mask must be a plain tensor, because v2 always resizes a tv_tensors.Mask with NEAREST.
        plain = mask.as_subclass(torch.Tensor)[None]  # [1, H, W]
        ids = F.resized_crop(plain, *box, size, InterpolationMode.NEAREST_EXACT)[0]  # [size_y, size_x]
        is_flipped = rng.random() < self.flip
        if self.color_jitter:
            for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
                pixels = adjust(pixels, rng.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        if size != [self.crop_size, self.crop_size]:
            rows, columns = slice(before_y, before_y + size_y), slice(before_x, before_x + size_x)
            padded, padded_ids = self.blank.clone(), ids.new_full(self.blank.shape[-2:], VOID)
            padded[:, rows, columns], padded_ids[rows, columns] = pixels, ids
            pixels, ids = padded, padded_ids  # [3, crop_size, crop_size] and [crop_size, crop_size]
        if is_flipped:
            pixels, ids = pixels.flip(-1), ids.flip(-1)
        return tv_tensors.wrap(pixels, like=image), tv_tensors.wrap(ids, like=mask)

    def _window(self, length: int, scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Places the crop along one side.

        Returns start and length of the visible part, in pixels of the image, then the padding before it and its
        length, in pixels of the crop.
        """
        scaled = max(1, round(length * scale))
        slack = scaled - self.crop_size
        offset = int(rng.integers(min(slack, 0), max(slack, 0) + 1))  # below 0: padding before the image
        start, stop = max(offset, 0), min(offset + self.crop_size, scaled)
        first = min(round(start / scaled * length), length - 1)
        last = max(round(stop / scaled * length), first + 1)
        return first, last - first, max(-offset, 0), stop - start


def train_transform(
    crop_size: int,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    flip: float = 0.5,
    color_jitter: float = 0.0,
    seed: int = 1,
) -> TrainTransform:
    """Builds the training transform; `crop_size` in pixels. Raises InputError for an impossible crop or scale."""
    _require_crop_size(crop_size)
    if not 0 < scale[0] <= scale[1]:
        raise InputError(f"scale {scale}: must be (smallest, largest), both above 0")
    return TrainTransform(crop_size, scale=scale, flip=flip, color_jitter=color_jitter, seed=seed)


def parse_scales(text: str) -> tuple[float, float]:
    """Reads `--train_scale`, such as "0.5,2.0". Raises InputError unless it is two numbers from 1/16 to 16."""
    try:
        low, high = (float(item) for item in text.split(","))
    except ValueError:
        raise InputError(f"--train_scale {text}: give the smallest and the largest scale, such as 0.5,2.0") from None
    if not 1 / MAX_SCALE <= low <= high <= MAX_SCALE:
        raise InputError(f"--train_scale {text}: give two numbers from 1/16 to 16, the smaller one first")
    return low, high


def eval_transform() -> Callable:
    """Returns the transform of validation and test, which changes nothing: whole images at native size are scored."""
    return _unchanged


def crop_val_transform(crop_size: int) -> Callable:
    """Builds the transform for `--crop_val`; `crop_size` in pixels. Raises InputError for an impossible crop.

    The shorter side is resized to `crop_size` and the middle `crop_size` x `crop_size` is cut out, as `--crop_val` of
    VainF/DeepLabV3Plus-Pytorch does. Scores on such crops compare with each other but not with scores on whole
    images: objects have other sizes, and nothing outside the crop is scored.
    """
    _require_crop_size(crop_size)
    return partial(_centre_crop, crop_size)


def _require_crop_size(crop_size: int) -> None:
    if not 1 <= crop_size <= MAX_CROP:
        raise InputError(f"--crop_size {crop_size}: give 1 to {MAX_CROP} pixels")


def _unchanged(
    image: tv_tensors.Image, mask: tv_tensors.Mask, *, epoch: int = 0, index: int = 0
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    return image, mask


def _centre_crop(
    crop_size: int, image: tv_tensors.Image, mask: tv_tensors.Mask, *, epoch: int = 0, index: int = 0
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    size, longest = [crop_size], MAX_ASPECT * min(image.shape[-2:])
    if max(image.shape[-2:]) > longest:
        # A line of pixels would grow to gigabytes, most of them cut off again.
        middle = [min(side, longest) for side in image.shape[-2:]]
        image, mask = F.center_crop(image, middle), F.center_crop(mask, middle)
    image = F.resize(image, size, InterpolationMode.BILINEAR, antialias=True)  # shorter side crop_size
    plain = mask.as_subclass(torch.Tensor)[None]  # [1, H, W]; a plain tensor and exact as in TrainTransform
    plain = F.resize(plain, size, InterpolationMode.NEAREST_EXACT)
    image, plain = F.center_crop(image, size), F.center_crop(plain, size)  # [3 and 1, crop_size, crop_size]
    return image, tv_tensors.wrap(plain[0], like=mask)
