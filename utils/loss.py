"""Computes losses of logits `[B, C, H, W]` against class ids `[B, H, W]` (any integer dtype, 255 = void).

Every loss is a scalar in float32 (float64 stays float64), ignores void, and is zero with zero gradients if everything
is void. None makes the host wait for the device. Cross-entropy and focal loss are means over the valid pixels, so
the losses of a batch's parts add up. The other losses rank or sum all pixels of a batch, so theirs do not.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from datasets.files import VOID
from utils.errors import InputError

IGNORE_INDEX = VOID
ADDITIVE_LOSSES = ("cross_entropy", "focal_loss")  # the losses of a batch's parts add up to that of the batch
LOSSES = ("cross_entropy", "focal_loss", "ohem_cross_entropy", "dice_cross_entropy", "lovasz_softmax")
PIECE = 2**25  # bytes of logits; smaller pieces save little memory and cost time


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, *, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Averages -w log p of the target class. This maximises the likelihood, so it is the first choice.

    weights: float `[C]`, preferably on the device of the logits (otherwise each step copies it); None means 1. The
    mean divides by the number of valid pixels. `torch.nn.CrossEntropyLoss(weight=...)` divides by the sum of their
    weights, which cancels the weight in a batch of one class. The scale of `class_weights` keeps the step size.
    """
    return _mean(_pixel_cross_entropy(logits, target), target, weights=weights, counted=target != IGNORE_INDEX)


def summed_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sums -log p of the target class over the valid pixels, without weights: what an evaluation adds up.

    logits: float32 `[B, C, H, W]`. target: class ids `[B, H, W]`. Returns a scalar on their device.
    """
    # Pixels first, because that is how logits lie in memory when a CPU evaluates. One image at a time, because the
    # intermediate result is as large as the logits. Both together are 7 times as fast there as a single call.
    pairs = zip(logits.flatten(2).mT, target.flatten(1).long(), strict=True)  # [H * W, C] and [H * W], B times
    losses = [F.cross_entropy(x, y, ignore_index=IGNORE_INDEX, reduction="none").sum() for x, y in pairs]
    return torch.stack(losses).sum()


def focal_loss(
    logits: torch.Tensor, target: torch.Tensor, *, gamma: float = 2.0, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Averages -w (1 - p)^gamma log p of the target class (Lin et al. 2017, arXiv 1708.02002, equations 4 and 5).

    Reduces the weight of pixels that are already right, so that rare and hard pixels count more. gamma 0 is
    cross-entropy. weights: the paper's alpha, as in `cross_entropy`.
    """
    loss = _pixel_cross_entropy(logits, target)  # [B, H, W]
    wrong = -torch.expm1(-loss)  # 1 - p, without cancellation near p = 1
    # Below gamma 1 the power has no finite slope at 0, the value of void pixels.
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
    """Averages the cross-entropy over the hard pixels only: online hard example mining.

    A valid pixel of the batch is hard if its target class has a probability of `threshold` or less. The hardest share
    `keep` of them always counts (rounded up, at least one pixel, with all ties of the last). Helps if easy pixels,
    such as the interior of large regions, outnumber the borders and small objects that are still wrong. Wrong labels
    are hard too. Threshold 1 or keep 1 is cross-entropy. Shrivastava et al. 2016, arXiv 1604.03540, mine regions. For
    pixels, with a threshold and a minimum number, it is the online bootstrapping of Wu et al. 2016, arXiv 1604.04339.
    weights: as in `cross_entropy`; they do not affect which pixels are hard.
    """
    loss, valid = _pixel_cross_entropy(logits, target), target != IGNORE_INDEX  # [B, H, W]
    hardest_first = loss.detach().flatten().sort(descending=True).values  # [B * H * W]; void is 0 and comes last
    # Double, because float32 cannot count beyond 2^24. `take`, because indexing would wait for the device.
    least = (valid.sum().double() * keep).ceil().long().clamp_min(1)
    limit = hardest_first.take(least - 1).clamp_max(-math.log(threshold))
    return _mean(loss, target, weights=weights, counted=valid & (loss.detach() >= limit))


def dice_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, *, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Adds cross-entropy and the mean over classes of 1 - 2 sum(p g) / (sum(p^2) + sum(g^2)); g is 1 at the class.

    Elsewhere g is 0. The second part is the soft Dice of Milletari et al. 2016, arXiv 1606.04797, section 3, with its
    squares in the denominator. Sums run over all valid pixels of the batch, the mean over the classes in its target.
    Dice scores the overlap of a class independently of its size, so it helps small classes. Cross-entropy gives
    gradients while the overlap is still 0. weights: as in `cross_entropy`, for that part only.
    """
    p, is_class = _probabilities(logits, target)  # [B, C, H, W]
    sizes = is_class.sum((0, 2, 3))  # [C]
    overlap = p.where(is_class, 0).sum((0, 2, 3))  # [C]
    dice = 1 - 2 * overlap / (p.square().sum((0, 2, 3)) + sizes).clamp_min(1)  # [C]; absent classes may be 0 / 0
    present = sizes > 0
    return cross_entropy(logits, target, weights=weights) + dice.where(present, 0).sum() / present.sum().clamp_min(1)


def lovasz_softmax(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Averages the Lovász extension of 1 - Jaccard over classes, at the errors |g - p|; g is 1 at the class, else 0.

    Berman et al. 2018, arXiv 1705.08790, definition 2 and section 3: the sum over i of error_i * (J_i - J_(i-1)) with
    errors in falling order. J_i is the Jaccard loss if the first i pixels are wrong and all others right. For
    errors of 0 and 1 it is 1 - IoU itself. It covers all valid pixels of the batch and the classes in its target. It
    trains what mIoU measures and gives every class the same weight. A prediction that is certain and wrong gets no
    gradient, so it suits fine-tuning.
    """
    p, is_class = _probabilities(logits, target)  # [B, C, H, W]
    errors = torch.where(is_class, 1 - p, p).transpose(0, 1).flatten(1)  # [C, B * H * W], 0 at void
    is_class = is_class.transpose(0, 1).flatten(1)  # [C, B * H * W]
    # While the order of the errors stays the same, the loss is linear in them, with the steps as constants.
    with torch.no_grad():
        # Class by class, because sorting takes twice the memory of the errors, and the order is not needed again.
        steps = torch.stack([_jaccard_steps(e, g) for e, g in zip(errors, is_class, strict=True)])
    return (errors * steps).sum() / is_class.any(1).sum().clamp_min(1)


def _jaccard_steps(errors: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Returns how much each of `[P]` pixels adds to the 1 - Jaccard of a class as they turn wrong, worst first.

    inside: bool `[P]`, whether the pixel belongs to the class. All zeros if none does. Pixels with error 0 may be
    void: they come last and change no step before them.
    """
    order = errors.argsort(descending=True)
    inside = inside[order]
    # Integers, because float32 cannot count beyond 2^24. Steps in closed form, because among millions of pixels
    # float32 loses the difference of neighbours: (I + 1) / U - I / U = 1 / U, I / (U - 1) - I / U = I / U / (U - 1).
    size = inside.sum()
    intersection = size - inside.cumsum(0, dtype=torch.int32)
    union = (size + (~inside).cumsum(0, dtype=torch.int32)).to(errors.dtype)
    steps = torch.where(inside, 1 / union, intersection / union / (union - 1).clamp_min(1))
    return torch.empty_like(errors).index_copy_(0, order, steps)


def build_loss(
    loss_type: str,
    *,
    gamma: float = 2.0,
    threshold: float = 0.7,
    keep: float = 0.25,
    weights: torch.Tensor | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Builds the criterion `(logits, target) -> scalar` for `--loss_type`, one of `LOSSES`.

    gamma is for focal_loss, threshold and keep are for ohem_cross_entropy. weights: float `[C]` on the device of the
    logits, from `datasets.stats.class_weights`.
    Raises InputError for an unknown name or a value out of range, ValueError for lovasz_softmax with weights.
    """
    if loss_type == "cross_entropy":
        return partial(cross_entropy, weights=weights)
    if loss_type == "focal_loss":
        if not gamma >= 0:
            raise InputError(f"--focal_gamma {gamma}: must be 0 or more")
        return partial(focal_loss, gamma=gamma, weights=weights)
    if loss_type == "ohem_cross_entropy":
        if not 0 < threshold <= 1:
            raise InputError(f"--ohem_threshold {threshold}: must be above 0 and at most 1")
        if not 0 <= keep <= 1:
            raise InputError(f"--ohem_keep {keep}: must be 0 to 1")
        return partial(ohem_cross_entropy, threshold=threshold, keep=keep, weights=weights)
    if loss_type == "dice_cross_entropy":
        return partial(dice_cross_entropy, weights=weights)
    if loss_type == "lovasz_softmax":
        if weights is not None:
            raise ValueError("lovasz_softmax already gives all classes the same weight: it takes no class weights")
        return lovasz_softmax
    raise InputError(f"--loss_type {loss_type}: there is no such loss; choose one of {', '.join(LOSSES)}")


def _pixel_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of each pixel `[B, H, W]`, 0 at void.

    Computed in pieces of whole images, because its gradient takes twice the memory of the logits.
    """
    if (len(logits), *logits.shape[2:]) != target.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} do not match")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    images = max(1, PIECE // max(1, logits.element_size() * math.prod(logits.shape[1:])))
    pieces = [
        F.cross_entropy(part, ids, ignore_index=IGNORE_INDEX, reduction="none")
        for part, ids in zip(logits.split(images), target.long().split(images), strict=True)
    ]
    return torch.cat(pieces)  # [B, H, W]


def _probabilities(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns probabilities, 0 at void, and bool masks of where the target is each class. Both `[B, C, H, W]`."""
    p = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    p = p.where((target != IGNORE_INDEX)[:, None], 0)  # [B, C, H, W]
    return p, target[:, None] == torch.arange(p.shape[1], device=target.device).view(1, -1, 1, 1)


def _mean(
    loss: torch.Tensor, target: torch.Tensor, *, weights: torch.Tensor | None, counted: torch.Tensor
) -> torch.Tensor:
    """Averages `loss` `[B, H, W]`, times the class weights, over the `counted` pixels, none of which is void."""
    if weights is not None:
        loss = loss * weights.to(loss)[target.long().where(counted, 0)]
    return loss.where(counted, 0).sum() / counted.sum().clamp_min(1)
