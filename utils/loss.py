"""Losses on logits `[B, C, H, W]` and class ids `[B, H, W]` (any integer dtype, 255 = void) to a scalar.

Each is computed in float32 (float64 stays float64), leaves void out, is zero with zero gradients where all is void,
and never makes the host wait for the device. Cross-entropy and focal loss are means over the valid pixels, so that
parts of a batch add up; the other losses rank or sum all pixels of the batch, and those of its parts differ.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from datasets.files import VOID
from utils.errors import InputError

IGNORE_INDEX = VOID
ADDITIVE_LOSSES = ("cross_entropy", "focal_loss")  # those of a batch's parts add up to that of the batch
LOSSES = ("cross_entropy", "focal_loss", "ohem_cross_entropy", "dice_cross_entropy", "lovasz_softmax")
CLASS_WEIGHTS = ("inverse", "median_frequency", "effective_number")
PIECE = 2**25  # bytes of logits; smaller pieces save little memory, and cost time
BETA = 0.999  # (N - 1) / N of N = 1,000 images that differ, of the values that Cui et al. 2019 compare in section 5


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, *, weights: torch.Tensor | None = None) -> torch.Tensor:
    """-w log p of the target class: the likelihood, and so the first choice.

    weights: float `[C]`, on the device of the logits, or each step copies it there; None is 1 for all. The mean
    divides by the valid pixels, not by the sum of their weights as `torch.nn.CrossEntropyLoss(weight=...)` does,
    which takes a weight away again from a batch of one class. `class_weights` keeps the size of a step by its scale.
    """
    return _mean(_pixel_cross_entropy(logits, target), target, weights=weights, counted=target != IGNORE_INDEX)


def focal_loss(
    logits: torch.Tensor, target: torch.Tensor, *, gamma: float = 2.0, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """-w (1 - p)^gamma log p of the target class, per pixel (Lin et al. 2017, arXiv 1708.02002, equations 4 and 5).

    Turns down what is already right, so that rare and hard pixels weigh more; gamma 0 is cross-entropy.
    weights: as in `cross_entropy`, the paper's alpha.
    """
    loss = _pixel_cross_entropy(logits, target)  # [B, H, W]
    wrong = -torch.expm1(-loss)  # 1 - p, without cancellation near p = 1
    # Below gamma 1 the power has no finite slope at 0, where void pixels are.
    modulator = wrong.clamp_min(torch.finfo(wrong.dtype).tiny) ** gamma
    return _mean(modulator * loss, target, weights=weights, counted=target != IGNORE_INDEX)


def ohem_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    threshold: float = 0.7,
    keep: float = 0.25,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy, its mean taken over the hard pixels alone: online hard example mining.

    Of the batch's valid pixels those whose target class has a probability of `threshold` or less, but at least the
    hardest `keep` of them (rounded up, one or more, and all that equal the last). Helps where easy pixels, such as
    the inside of large regions, outnumber the borders and small objects that are still wrong; wrong labels are hard
    too. Threshold 1 or keep 1 is cross-entropy. Shrivastava et al. 2016, arXiv 1604.03540, mine regions; for pixels,
    with a threshold and a least number, it is the online bootstrapping of Wu et al. 2016, arXiv 1604.04339.
    weights: as in `cross_entropy`; they do not change which pixels are hard.
    """
    loss, valid = _pixel_cross_entropy(logits, target), target != IGNORE_INDEX  # [B, H, W]
    hardest_first = loss.detach().flatten().sort(descending=True).values  # [B * H * W]; void, at 0, comes last
    least = (valid.sum().double() * keep).ceil().long().clamp_min(1)  # float32 cannot count beyond 2^24
    limit = hardest_first.take(least - 1).clamp_max(-math.log(threshold))  # [least - 1] would wait for the device
    return _mean(loss, target, weights=weights, counted=valid & (loss.detach() >= limit))


def dice_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, *, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy + mean over classes of 1 - 2 sum(p g) / (sum(p^2) + sum(g^2)), g 1 at the class and else 0.

    The soft Dice of Milletari et al. 2016, arXiv 1606.04797, section 3, with its squares in the denominator. Sums run
    over all valid pixels of the batch, the mean over the classes that its target shows. Dice scores a class by its
    overlap whatever its size, so it helps small classes; cross-entropy gives gradients where an overlap is still 0.
    weights: as in `cross_entropy`, for that part alone.
    """
    p, is_class = _probabilities(logits, target)  # [B, C, H, W]
    sizes = is_class.sum((0, 2, 3))  # [C]
    overlap = p.where(is_class, 0).sum((0, 2, 3))  # [C]
    dice = 1 - 2 * overlap / (p.square().sum((0, 2, 3)) + sizes).clamp_min(1)  # [C]; 0 / 0 may be at absent ones
    present = sizes > 0
    return cross_entropy(logits, target, weights=weights) + dice.where(present, 0).sum() / present.sum().clamp_min(1)


def lovasz_softmax(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over classes of the Lovász extension of 1 - Jaccard, at the errors |g - p|, g 1 at the class and else 0.

    Berman et al. 2018, arXiv 1705.08790, definition 2 and section 3: sum over i of error_i * (J_i - J_(i-1)), errors
    in falling order, J_i the Jaccard loss were the first i pixels wrong and the others right; for errors of 0 and 1,
    1 - IoU itself. Over all valid pixels of the batch and the classes that its target shows. Trains what mIoU
    measures, each class alike; where a prediction is certain and wrong no gradient is left, so it suits fine-tuning.
    """
    p, is_class = _probabilities(logits, target)  # [B, C, H, W]
    errors = torch.where(is_class, 1 - p, p).transpose(0, 1).flatten(1)  # [C, B * H * W], 0 at void
    is_class = is_class.transpose(0, 1).flatten(1)  # [C, B * H * W]
    with torch.no_grad():  # the sum is linear in the errors as long as their order stays, with these as constants
        # Class by class, for the order of a class takes twice the memory of its errors and is not needed again.
        steps = torch.stack([_jaccard_steps(e, g) for e, g in zip(errors, is_class, strict=True)])
    return (errors * steps).sum() / is_class.any(1).sum().clamp_min(1)


def _jaccard_steps(errors: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """What each of `[P]` pixels, inside a class or not, adds to its 1 - Jaccard as they turn wrong, worst first.

    Zeros for a class that has no pixel. Pixels of error 0 may be void: those come last and change no step before.
    """
    order = errors.argsort(descending=True)
    inside = inside[order]
    # Integers, for float32 cannot count beyond 2^24, and steps in closed form, for the difference of neighbours among
    # millions is lost in float32: (I + 1) / U - I / U is 1 / U, and I / (U - 1) - I / U is I / U / (U - 1).
    size = inside.sum()
    intersection = size - inside.cumsum(0, dtype=torch.int32)
    union = (size + (~inside).cumsum(0, dtype=torch.int32)).to(errors.dtype)
    steps = torch.where(inside, 1 / union, intersection / union / (union - 1).clamp_min(1))
    return torch.empty_like(errors).index_copy_(0, order, steps)


def build_loss(
    loss_type: str,
    *,
    focal_gamma: float = 2.0,
    ohem_threshold: float = 0.7,
    ohem_keep: float = 0.25,
    class_weights: torch.Tensor | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The criterion `(logits, target) -> scalar` of `--loss_type`; one of `LOSSES`.

    class_weights: float `[C]` on the device of the logits, as from `class_weights`. Raises InputError for a name or
    value that is out of range, ValueError for weights of lovasz_softmax.
    """
    if loss_type == "cross_entropy":
        return partial(cross_entropy, weights=class_weights)
    if loss_type == "focal_loss":
        if not focal_gamma >= 0:
            raise InputError(f"--focal_gamma {focal_gamma}: it must be 0 or more")
        return partial(focal_loss, gamma=focal_gamma, weights=class_weights)
    if loss_type == "ohem_cross_entropy":
        if not 0 < ohem_threshold <= 1:
            raise InputError(f"--ohem_threshold {ohem_threshold}: it must be above 0 and at most 1")
        if not 0 <= ohem_keep <= 1:
            raise InputError(f"--ohem_keep {ohem_keep}: it must be 0 to 1")
        return partial(ohem_cross_entropy, threshold=ohem_threshold, keep=ohem_keep, weights=class_weights)
    if loss_type == "dice_cross_entropy":
        return partial(dice_cross_entropy, weights=class_weights)
    if loss_type == "lovasz_softmax":
        if class_weights is not None:
            raise ValueError("lovasz_softmax weighs classes alike by itself: it takes no class weights")
        return lovasz_softmax
    raise InputError(f"--loss_type {loss_type}: there are {', '.join(LOSSES)}")


def _pixel_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[B, H, W]`, 0 at void. In pieces of whole images, for its gradient takes twice the memory of the logits."""
    if (len(logits), *logits.shape[2:]) != target.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} do not go together")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    images = max(1, PIECE // max(1, logits.element_size() * math.prod(logits.shape[1:])))
    pieces = [
        F.cross_entropy(some, ids, ignore_index=IGNORE_INDEX, reduction="none")
        for some, ids in zip(logits.split(images), target.long().split(images), strict=True)
    ]
    return torch.cat(pieces)


def _probabilities(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, 0 at void, and whether the target is that class: bool. Both `[B, C, H, W]`."""
    p = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    p = p.where((target != IGNORE_INDEX)[:, None], 0)
    return p, target[:, None] == torch.arange(p.shape[1], device=target.device).view(1, -1, 1, 1)


def _mean(
    loss: torch.Tensor, target: torch.Tensor, *, weights: torch.Tensor | None, counted: torch.Tensor
) -> torch.Tensor:
    """Mean of `[B, H, W]`, times the weight of the class, over the pixels that are counted; none of them is void."""
    if weights is not None:
        loss = loss * weights.to(loss)[target.long().where(counted, 0)]
    return loss.where(counted, 0).sum() / counted.sum().clamp_min(1)


def class_weights(
    method: str, pixels: np.ndarray, image_pixels: np.ndarray | None = None, *, images: np.ndarray | None = None
) -> torch.Tensor:
    """The weights of `--class_weights`, float32 `[C]`, from counts over the training set, integers `[C]`.

    pixels: labelled pixels of each class. image_pixels: all labelled pixels of the images that show the class.
    images: how many those are. All are scaled so that the mean weight of a labelled pixel is 1 and a learning rate
    keeps its meaning.
    "inverse": 1 / pixels. The strongest: a class counts as much as any other, however few its pixels.
    "median_frequency": 1 / f with f = pixels / image_pixels (Eigen and Fergus 2015, arXiv 1411.4734, section 6.3.2;
    their median over classes is a factor that the scale replaces). Does not mind how few images show a class.
    "effective_number": 1 / (1 - beta^images) (Cui et al. 2019, arXiv 1901.05555, equation 2 and section 4; the scale
    replaces 1 - beta). Their n counts samples that overlap only by chance, so images, not neighbouring pixels: by
    pixels beta 0.9999 saturates for every class, and (N - 1) / N of N pixels in all is nearly "inverse". The ratio of
    two weights is 1 / (1 - beta) at most, and 1 for classes that thousands of images show, or that all show.
    A class without a pixel has weight 0, for it is no target. Raises InputError for another method.
    """
    if method not in CLASS_WEIGHTS:
        raise InputError(f"--class_weights {method}: there are {', '.join(CLASS_WEIGHTS)}")
    weights, present = np.zeros(len(pixels)), pixels > 0
    if method == "inverse":
        weights[present] = 1 / pixels[present]
    elif method == "median_frequency":
        if image_pixels is None:
            raise ValueError("median_frequency needs image_pixels")
        weights[present] = image_pixels[present] / pixels[present]
    else:
        if images is None:
            raise ValueError("effective_number needs images")
        weights[present] = 1 / -np.expm1(images[present] * np.log(BETA))
    if present.any():
        weights *= pixels.sum() / (weights * pixels).sum()
    return torch.from_numpy(weights).float()
