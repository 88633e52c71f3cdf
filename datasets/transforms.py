"""Joint transforms of a picture and its mask: random scale, crop and flip to train, nothing to evaluate (or, to
compare with codebases that do so, a centre crop).

A sample's augmentation depends on (seed, epoch, index) alone, whatever the number of workers or processes.
The classes in `torchvision.transforms.v2` draw from the global generator, which differs per worker; so the
parameters are drawn here, from a generator of the sample's own, and v2's functions apply them.
"""

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datasets.files import VOID
from utils.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_CROP = 2**14  # pixels; such a crop takes 800 MB
LONGEST = 16  # times the shorter side
MEAN_COLOUR = [round(255 * channel) for channel in IMAGENET_MEAN]


class TrainTransform:
    """Random scale, crop and flip; the result is always `crop_size` x `crop_size`.

    The picture is scaled by a factor drawn uniformly from `scale`, the crop is placed uniformly over it (or,
    along a side that is shorter than the crop, the picture uniformly inside the crop), and flipped with
    probability `flip`. Invented pixels are of the mean colour in the picture and void in the mask.
    The window of the crop is worked out first and only that part of the picture is resized: the same
    distribution at a fraction of the work.
    """

    def __init__(self, crop_size: int, scale: tuple[float, float], flip: float, seed: int) -> None:
        self.crop_size, self.scale, self.flip, self.seed = crop_size, scale, flip, seed
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
        # Channels last, as PIL has them in memory: twice as fast as the planes that F.resize makes of a mere view.
        window = F.crop(image, *box).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # [3, height, width]
        pixels = F.resize(window, size, InterpolationMode.BILINEAR, antialias=True)  # [3, size_y, size_x]
        # Exact, for NEAREST rounds down, which shifts a mask by up to half a pixel against its picture; and through
        # a plain tensor, for a tv_tensors.Mask is always resized with NEAREST.
        plain = mask.as_subclass(torch.Tensor)[None]  # [1, H, W]
        ids = F.resized_crop(plain, *box, size, InterpolationMode.NEAREST_EXACT)[0]  # [size_y, size_x]
        if size != [self.crop_size, self.crop_size]:
            rows, columns = slice(before_y, before_y + size_y), slice(before_x, before_x + size_x)
            padded, padded_ids = self.blank.clone(), ids.new_full(self.blank.shape[-2:], VOID)
            padded[:, rows, columns], padded_ids[rows, columns] = pixels, ids
            pixels, ids = padded, padded_ids  # [3, crop_size, crop_size] and [crop_size, crop_size]
        if rng.random() < self.flip:
            pixels, ids = pixels.flip(-1), ids.flip(-1)
        return tv_tensors.wrap(pixels, like=image), tv_tensors.wrap(ids, like=mask)

    def _window(self, length: int, scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Along one side: where the crop's part of the picture starts and how long it is, in pixels of the
        picture; then the padding before it and its length, in pixels of the crop."""
        scaled = max(1, round(length * scale))
        slack = scaled - self.crop_size
        offset = int(rng.integers(min(slack, 0), max(slack, 0) + 1))  # below 0: padding before the picture
        start, stop = max(offset, 0), min(offset + self.crop_size, scaled)
        first = min(round(start / scaled * length), length - 1)
        last = max(round(stop / scaled * length), first + 1)
        return first, last - first, max(-offset, 0), stop - start


class EvalTransform:
    """The picture and its mask as they are, at native size."""

    def __call__(
        self, image: tv_tensors.Image, mask: tv_tensors.Mask, *, epoch: int = 0, index: int = 0
    ) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return image, mask


class CropValTransform:
    """The shorter side resized to `crop_size` and the middle `crop_size` x `crop_size` cut out, as `--crop_val` of
    VainF/DeepLabV3Plus-Pytorch does it. Scores of such crops compare with each other, not with those of whole
    pictures: the objects' sizes are others, and what lies outside is never scored."""

    def __init__(self, crop_size: int) -> None:
        self.crop_size = crop_size

    def __call__(
        self, image: tv_tensors.Image, mask: tv_tensors.Mask, *, epoch: int = 0, index: int = 0
    ) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        size = [self.crop_size]
        shorter = min(image.shape[-2:])
        if max(image.shape[-2:]) > LONGEST * shorter:  # a line of pixels would grow to gigabytes, most of it cut off
            middle = [min(side, LONGEST * shorter) for side in image.shape[-2:]]
            image, mask = F.center_crop(image, middle), F.center_crop(mask, middle)
        image = F.resize(
            image, size, InterpolationMode.BILINEAR, antialias=True
        )  # [3, crop_size, w] or [3, h, crop_size]
        plain = mask.as_subclass(torch.Tensor)[None]  # [1, H, W]; why plain and exact: see TrainTransform
        plain = F.resize(plain, size, InterpolationMode.NEAREST_EXACT)
        image, plain = F.center_crop(image, size), F.center_crop(plain, size)  # [3 and 1, crop_size, crop_size]
        return image, tv_tensors.wrap(plain[0], like=mask)


def train_transform(
    crop_size: int, *, scale: tuple[float, float] = (0.5, 2.0), flip: float = 0.5, seed: int = 1
) -> TrainTransform:
    """The training transform; `crop_size` in pixels. Raises InputError for what cannot be a crop or scale."""
    _require_crop_size(crop_size)
    if not 0 < scale[0] <= scale[1]:
        raise InputError(f"scale {scale}: it must be (smallest, largest), both above 0")
    return TrainTransform(crop_size, scale, flip, seed)


def eval_transform() -> EvalTransform:
    """The transform of validation and test: none, for scores are of the whole picture at its native size."""
    return EvalTransform()


def crop_val_transform(crop_size: int) -> CropValTransform:
    """The transform of `--crop_val`; `crop_size` in pixels. Raises InputError for what cannot be a crop."""
    _require_crop_size(crop_size)
    return CropValTransform(crop_size)


def _require_crop_size(crop_size: int) -> None:
    if not 1 <= crop_size <= MAX_CROP:
        raise InputError(f"--crop_size {crop_size}: give 1 to {MAX_CROP} pixels")
