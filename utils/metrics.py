"""Scores of semantic segmentation, from one confusion matrix; boundary IoU."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from datasets.files import VOID
from utils.errors import InputError

LABELS = 256  # a mask is uint8
LANES = 4  # of counting on the CPU


class ConfusionMatrix:
    """Counts of (target class, predicted class) over any number of pictures, kept on the device.

    No picture, logit or label map is copied to the host.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # A row per possible label, so that void needs no masking and a stray label is found, not miscounted.
        self._counts = torch.zeros(LABELS * num_classes, dtype=torch.int64, device=device)
        self._highest = torch.zeros((), dtype=torch.uint8, device=device)

    def update(self, target: torch.Tensor, prediction: torch.Tensor) -> None:
        """Adds the pixels of `[B, H, W]` (any equal shapes) class ids; a target of 255 is void, not counted.

        Both uint8, or any integers in 0..255. Raises ValueError for other shapes or dtypes.
        """
        if target.shape != prediction.shape:
            raise ValueError(f"target {tuple(target.shape)} and prediction {tuple(prediction.shape)} differ in shape")
        target, prediction = as_uint8(target), as_uint8(prediction)
        if not target.numel():
            return
        self._highest = torch.maximum(self._highest, prediction.amax())
        # 16 bits hold 256 x 127: half the bytes of the smallest type that always does.
        dtype = torch.int16 if LABELS * self.num_classes < 2**15 else torch.int32
        index = target.to(dtype).mul_(self.num_classes).add_(prediction)
        self._counts += occurrences(index.flatten(), len(self._counts))

    def matrix(self) -> torch.Tensor:
        """`[C, C]` int64 on the device, rows = target, columns = prediction.

        Raises InputError for a label or prediction that is neither a class nor (for a label) 255.
        """
        counts = self._counts.view(LABELS, self.num_classes)
        if int(self._highest) >= self.num_classes:
            raise InputError(f"a prediction of {int(self._highest)}, but the classes are 0..{self.num_classes - 1}")
        stray = counts[self.num_classes : VOID].sum(dim=1).nonzero()
        if len(stray):
            label = self.num_classes + int(stray[0])
            raise InputError(f"a label of {label} is neither a class (0..{self.num_classes - 1}) nor void (255)")
        return counts[: self.num_classes]

    def compute(self) -> dict:
        """The scores of `matrix()`, see `scores`."""
        return scores(self.matrix())


def occurrences(index: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of 0..`size` - 1 occurs in `[N]`, int64 `[size]`; what is higher counts anywhere or nowhere."""
    if index.device.type != "cpu":
        return scattered_occurrences(index, size)  # bincount would make the host wait, to learn the highest index
    # Neighbouring pixels are mostly alike, and an addition to a count waits for the one before to the same count. So
    # four counts take turns, which is 1.5 times as fast.
    counts = torch.bincount(_turns(len(index), size) + index, minlength=LANES * size)[: LANES * size]
    return counts.view(LANES, size).sum(dim=0)


@lru_cache(maxsize=4)  # a data set has few sizes of pictures
def _turns(length: int, size: int) -> torch.Tensor:
    """0, `size`, 2 `size`, 3 `size` and so on, `[length]`, in the smallest type that holds an index beyond them."""
    dtype = torch.int16 if LANES * size < 2**15 else torch.int32
    return (torch.arange(LANES) * size).to(dtype).repeat(-(-length // LANES))[:length]


def scattered_occurrences(index: torch.Tensor, size: int) -> torch.Tensor:
    ones = torch.ones(1, dtype=torch.int64, device=index.device).expand(len(index))
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index.long().clamp_max_(size - 1), ones)


def as_uint8(ids: torch.Tensor) -> torch.Tensor:
    if ids.dtype == torch.uint8:
        return ids
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"class ids must be integers, not {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < LABELS:
        raise InputError(f"class ids must be in 0..255, found {int(ids.min())}..{int(ids.max())}")
    return ids.to(torch.uint8)


def scores(matrix: torch.Tensor) -> dict:
    """Scores of a confusion matrix `[C, C]` (rows = target), as floats in 0..1 (Long et al. 2015, section 5).

    "Overall Acc": share of pixels that are right. "Mean Acc": mean over the classes of the target of the share
    of a class's pixels that are right. "FreqW Acc": IoU weighted by the class's share of the target. "Mean
    IoU": mean of "Class IoU", a list of C values. A class in neither target nor prediction has no IoU (NaN)
    and is left out of the mean; one that is predicted but never in the target counts 0. No pixels: all NaN.
    """
    matrix = matrix.double().cpu()
    right, target, predicted = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    class_iou = right / (target + predicted - right)  # 0 / 0 = NaN: in neither
    frequency = target / target.sum()
    return {
        "Overall Acc": (right.sum() / target.sum()).item(),
        "Mean Acc": (right / target).nanmean().item(),
        "FreqW Acc": (frequency * class_iou)[target > 0].sum().item() if target.sum() else float("nan"),
        "Mean IoU": class_iou.nanmean().item(),
        "Class IoU": class_iou.tolist(),
    }


def image_iou(target: torch.Tensor, prediction: torch.Tensor, num_classes: int) -> float:
    """mIoU of one picture, class ids `[H, W]` each on the same device; NaN where nothing is labelled."""
    confusion = ConfusionMatrix(num_classes, target.device)
    confusion.update(target, prediction)
    return confusion.compute()["Mean IoU"]


def format_scores(result: dict) -> list[str]:
    """The four scores, one a line."""
    return [f"{name}: {result[name]:.6f}" for name in ("Overall Acc", "Mean Acc", "FreqW Acc", "Mean IoU")]


def format_class_table(
    result: dict, class_names: list[str], class_boundary_iou: list[float] | None = None
) -> list[str]:
    """A line per class: its IoU and, if given, boundary IoU; "-" for one in neither target nor prediction."""
    columns = {f"{'IoU':>6}": result["Class IoU"]}  # by heading, as wide as the column
    if class_boundary_iou:
        columns["boundary IoU"] = class_boundary_iou
    width = max(len(name) for name in [*class_names, "class"])
    lines = ["  ".join([f"{'class':<{width}}", *columns])]
    for name, *ious in zip(class_names, *columns.values(), strict=True):
        cells = ("-" if iou != iou else f"{iou:.4f}" for iou in ious)
        cells = (f"{cell:>{len(heading)}}" for cell, heading in zip(cells, columns, strict=True))
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return lines


def boundary(ids: torch.Tensor, dilation_ratio: float = 0.02) -> torch.Tensor:
    """The pixels of uint8 class ids `[..., H, W]` that lie within d of another class, of void (255, itself not among
    them) or of the picture's edge; of a bool mask, whose outside counts as void, those of the mask. d, in whole
    pixels and 1 at least, is `dilation_ratio` of the diagonal (Cheng et al. 2021, arXiv 2103.16562, section 4 and
    its published code: d erosions of each class by a 3x3 square)."""
    if ids.dtype == torch.bool:
        ids = (~ids).to(torch.uint8) * VOID
    reach = max(1, round(dilation_ratio * math.hypot(*ids.shape[-2:])))
    # d erosions by 3x3 are one by this square, which a pixel survives where highest and lowest id in it are its own:
    # all classes at once.
    side, padded = 2 * reach + 1, F.pad(ids, [reach] * 4, value=VOID)  # [..., H + 2d, W + 2d]
    highest, lowest = (_over_squares(choose, padded, side) for choose in (torch.maximum, torch.minimum))
    return ((highest != ids) | (lowest != ids)) & (ids != VOID)


def _over_squares(choose: Callable, ids: torch.Tensor, side: int) -> torch.Tensor:
    """`torch.maximum` or `torch.minimum` over each square of that side: `[..., H, W]`, both sides `side` - 1 less."""
    for dim in (-2, -1):  # a square is a row after a column
        reached = 1
        while reached < side:  # the window doubles: two that overlap or touch make one
            step = min(reached, side - reached)
            rest = ids.shape[dim] - step
            ids, reached = choose(ids.narrow(dim, 0, rest), ids.narrow(dim, step, rest)), reached + step
    return ids


class BoundaryIoU:
    """IoU of the pixels near the outlines, per class, summed over any number of pictures (Cheng et al. 2021, eq. 2).

    Void pixels of the target belong to no class in either map: a class ends where void begins in the prediction
    as in the target, so a perfect prediction scores 1 whatever it says on void, and no void pixel is counted.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", dilation_ratio: float = 0.02) -> None:
        self.num_classes, self.dilation_ratio = num_classes, dilation_ratio
        # Pixels near an outline of both, of the target, of the prediction.
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)

    def update(self, target: torch.Tensor, prediction: torch.Tensor) -> None:
        """Adds pictures of one size, class ids `[..., H, W]`, uint8 or any integers in 0..255; target 255 is void.

        Raises ValueError for other shapes or dtypes, InputError for ids outside 0..255.
        """
        if target.shape != prediction.shape or target.ndim < 2:
            raise ValueError(
                f"target {tuple(target.shape)} and prediction {tuple(prediction.shape)} are not [..., H, W]"
            )
        target, prediction = as_uint8(target), as_uint8(prediction)
        prediction = torch.where(target == VOID, VOID, prediction)
        near = [torch.where(boundary(ids, self.dilation_ratio), ids, VOID) for ids in (target, prediction)]
        near = [torch.where(near[0] == near[1], near[0], VOID), *near]
        counts = torch.stack([occurrences(ids.flatten(), LABELS) for ids in near])  # [3, 256]
        self.counts += counts[:, : self.num_classes]

    def compute(self) -> dict:
        """ "Mean Boundary IoU" and "Class Boundary IoU" in 0..1; absent classes as in `scores`."""
        both, target, prediction = self.counts.double().cpu()
        class_iou = both / (target + prediction - both)  # 0 / 0 = NaN: in neither
        return {"Mean Boundary IoU": class_iou.nanmean().item(), "Class Boundary IoU": class_iou.tolist()}


class RunningMean:
    """Mean of scalars that stay on the device until it is asked for."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count = 0

    def add(self, value: torch.Tensor) -> None:
        self.total = self.total + value.detach()
        self.count += 1

    def mean(self) -> float:
        """NaN if there was nothing. Waits for the device."""
        return float(self.total) / self.count if self.count else float("nan")

    def pop(self) -> float:
        """The mean since the last call, as `mean`."""
        mean = self.mean()
        self.total, self.count = 0.0, 0
        return mean
