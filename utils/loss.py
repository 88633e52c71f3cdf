"""Losses on logits `[B, C, H, W]` and class ids `[B, H, W]` (any integer dtype, 255 = void) to a scalar.

Each is the mean over the valid pixels, computed in float32, and zero with zero gradients where all is void.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from datasets.files import VOID
from utils.errors import InputError

IGNORE_INDEX = VOID


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p of the target class."""
    return _mean_of_valid(_pixel_cross_entropy(logits, target), target)


def focal_loss(logits: torch.Tensor, target: torch.Tensor, *, gamma: float = 2.0) -> torch.Tensor:
    """-(1 - p)^gamma log p of the target class, per pixel (Lin et al. 2017, arXiv 1708.02002, equation 4).

    Turns down what is already right, so that rare and hard pixels weigh more; gamma 0 is cross-entropy.
    """
    loss = _pixel_cross_entropy(logits, target)  # [B, H, W]
    wrong = -torch.expm1(-loss)  # 1 - p, without cancellation near p = 1
    # Below gamma 1 the power has no finite slope at 0, where void pixels are.
    modulator = wrong.clamp_min(torch.finfo(wrong.dtype).tiny) ** gamma
    return _mean_of_valid(modulator * loss, target)


def build_loss(loss_type: str, *, focal_gamma: float = 2.0) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The criterion `(logits, target) -> scalar` of `--loss_type`; one of `LOSSES`."""
    if loss_type == "cross_entropy":
        return cross_entropy
    if loss_type == "focal_loss":
        if focal_gamma < 0:
            raise InputError(f"--focal_gamma {focal_gamma}: it must be 0 or more")
        return partial(focal_loss, gamma=focal_gamma)
    raise InputError(f"--loss_type {loss_type}: there are {', '.join(LOSSES)}")


LOSSES = ("cross_entropy", "focal_loss")


def _pixel_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target.long(), ignore_index=IGNORE_INDEX, reduction="none")  # [B, H, W], void 0


def _mean_of_valid(loss: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return loss.sum() / (target != IGNORE_INDEX).sum().clamp_min(1)


CLASS_WEIGHTS = ("inverse", "median_frequency")


def class_weights(method: str, pixels: np.ndarray, image_pixels: np.ndarray | None = None) -> torch.Tensor:
    """The weights of `--class_weights`, float32 `[C]`, from counts over the training set, integers `[C]`.

    pixels: labelled pixels of each class. image_pixels: all labelled pixels of the images that show the class.
    "inverse": 1 / frequency, scaled so that the mean weight of a labelled pixel is 1 and a learning rate keeps
    its meaning: all pixels / (classes * pixels of the class).
    "median_frequency": median(f) / f with f = pixels / image_pixels (Eigen and Fergus 2015, arXiv 1411.4734,
    section 6.3.2), not scaled further.
    A class without a pixel has weight 0, for it is no target, and takes no part in the count or the median.
    Raises InputError for another method.
    """
    if method not in CLASS_WEIGHTS:
        raise InputError(f"--class_weights {method}: there are {', '.join(CLASS_WEIGHTS)}")
    weights, present = np.zeros(len(pixels)), pixels > 0
    if method == "inverse":
        weights[present] = pixels.sum() / (present.sum() * pixels[present])
    elif image_pixels is None:
        raise ValueError("median_frequency needs image_pixels")
    elif present.any():
        frequency = pixels[present] / image_pixels[present]
        weights[present] = np.median(frequency) / frequency
    return torch.from_numpy(weights).float()
