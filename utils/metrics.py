"""Scores semantic segmentation from one confusion matrix, and measures boundary IoU."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from datasets.files import VOID
from utils.errors import InputError

SCORE_COLUMNS = {  # in history.csv and card.json
    "overall_acc": "Overall Acc",
    "mean_acc": "Mean Acc",
    "freqw_acc": "FreqW Acc",
    "mean_iou": "Mean IoU",
}
CLASS_SCORES = {  # columns of class_iou.csv and card.json
    "iou": "Class IoU",
    "precision": "Class Precision",
    "recall": "Class Recall",
    "f1": "Class F1",
}
LABELS = 256  # a mask is uint8
LANES = 4  # counters that take turns on the CPU


class ConfusionMatrix:
    """Counts (target class, predicted class) over any number of images.

    The counts stay on the device. No image, logit or label map is copied to the host.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # One row per possible label, so that void needs no masking and a stray label is found, not miscounted.
        self._counts = torch.zeros(LABELS * num_classes, dtype=torch.int64, device=device)
        self._highest = torch.zeros((), dtype=torch.uint8, device=device)

    def update(self, target: torch.Tensor, prediction: torch.Tensor) -> None:
        """Counts the pixels of class ids `[B, H, W]` (or any other equal shapes). Target 255 is void: not counted.

        Both are uint8, or any integers in 0..255. Raises ValueError for other shapes or dtypes.
        """
        if target.shape != prediction.shape:
            raise ValueError(f"target {tuple(target.shape)} and prediction {tuple(prediction.shape)} differ in shape")
        target, prediction = as_uint8(target), as_uint8(prediction)
        if not target.numel():
            return
        self._highest = torch.maximum(self._highest, prediction.amax())
        # 16 bits are enough for up to 127 classes and take half the memory of 32, which are always enough.
        dtype = torch.int16 if LABELS * self.num_classes < 2**15 else torch.int32
        index = target.to(dtype).mul_(self.num_classes).add_(prediction)
        self._counts += occurrences(index.flatten(), len(self._counts))

    def matrix(self) -> torch.Tensor:
        """Returns the counts `[C, C]`, int64 on the device, rows = target, columns = prediction.

        Raises InputError for a label that is neither a class nor 255, and for a prediction that is not a class.
        """
        counts = self._counts.view(LABELS, self.num_classes)  # [256, C]
        if int(self._highest) >= self.num_classes:
            raise InputError(f"a prediction of {int(self._highest)} is not a class (0..{self.num_classes - 1})")
        stray = counts[self.num_classes : VOID].sum(dim=1).nonzero()
        if len(stray):
            label = self.num_classes + int(stray[0])
            raise InputError(f"a label of {label} is neither a class (0..{self.num_classes - 1}) nor void (255)")
        return counts[: self.num_classes]

    def compute(self) -> dict:
        """Returns the `scores` of `matrix()`."""
        return scores(self.matrix())


def occurrences(index: torch.Tensor, size: int) -> torch.Tensor:
    """Counts each of 0..`size` - 1 in `[N]`, as int64 `[size]`. Higher indices count anywhere or nowhere."""
    if index.device.type != "cpu":
        # bincount would make the host wait for the highest index.
        return scattered_occurrences(index, size)
    # Neighbouring pixels are mostly equal, and adding to a counter waits for the previous addition to it. So four
    # sets of counters take turns, which is 1.5 times as fast.
    counts = torch.bincount(_turns(len(index), size) + index, minlength=LANES * size)[: LANES * size]
    return counts.view(LANES, size).sum(dim=0)  # [size]


@lru_cache(maxsize=4)  # a data set has few image sizes
def _turns(length: int, size: int) -> torch.Tensor:
    """Returns 0, `size`, 2 `size`, 3 `size`, 0, ... `[length]` in the smallest dtype that fits LANES * `size`."""
    dtype = torch.int16 if LANES * size < 2**15 else torch.int32
    return (torch.arange(LANES) * size).to(dtype).repeat(-(-length // LANES))[:length]


def scattered_occurrences(index: torch.Tensor, size: int) -> torch.Tensor:
    """Does the same as `occurrences`, without making the host wait for the device."""
    ones = torch.ones(1, dtype=torch.int64, device=index.device).expand(len(index))
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index.long().clamp_max_(size - 1), ones)


def as_uint8(ids: torch.Tensor) -> torch.Tensor:
    """Converts class ids to uint8. Raises InputError for ids outside 0..255, ValueError for other dtypes."""
    if ids.dtype == torch.uint8:
        return ids
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"class ids must be integers, not {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < LABELS:
        raise InputError(f"class ids must be in 0..255, found {int(ids.min())}..{int(ids.max())}")
    return ids.to(torch.uint8)


def scores(matrix: torch.Tensor) -> dict:
    """Scores a confusion matrix `[C, C]` (rows = target) with floats in 0..1 (Long et al. 2015, section 5).

    "Overall Acc": share of pixels that are right. "Mean Acc": share of a class's pixels that are right, averaged over
    the classes in the target. "FreqW Acc": IoU weighted by the class's share of the target. "Mean IoU": mean of
    "Class IoU", a list of C values. A class in neither target nor prediction has IoU NaN and is left out of the mean.
    A class that is predicted but never in the target counts 0. Without any pixels, all scores are NaN.
    "Class Precision", "Class Recall" and "Class F1" (Dice) are lists of C values too; "Mean Precision", "Mean Recall"
    and "Mean F1" are over the same classes as the mean IoU. There 0 / 0 counts 0: the precision of a class that is
    never predicted, and the recall of one that is never in the target.
    """
    matrix = matrix.double().cpu()
    right, target, predicted = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    class_iou = right / (target + predicted - right)  # 0 / 0 = NaN for a class in neither
    absent = class_iou.isnan()
    precision, recall = ((right / total.clamp(min=1)).masked_fill(absent, math.nan) for total in (predicted, target))
    f1 = 2 * right / (target + predicted)
    frequency = target / target.sum()
    return {
        "Overall Acc": (right.sum() / target.sum()).item(),
        "Mean Acc": (right / target).nanmean().item(),
        "FreqW Acc": (frequency * class_iou)[target > 0].sum().item() if target.sum() else float("nan"),
        "Mean IoU": class_iou.nanmean().item(),
        "Class IoU": class_iou.tolist(),
        "Mean Precision": precision.nanmean().item(),
        "Mean Recall": recall.nanmean().item(),
        "Mean F1": f1.nanmean().item(),
        "Class Precision": precision.tolist(),
        "Class Recall": recall.tolist(),
        "Class F1": f1.tolist(),
    }


def image_iou(target: torch.Tensor, prediction: torch.Tensor, num_classes: int) -> float:
    """Computes the mIoU of one image from class ids `[H, W]` on one device; NaN if nothing is labelled."""
    confusion = ConfusionMatrix(num_classes, target.device)
    confusion.update(target, prediction)
    return confusion.compute()["Mean IoU"]


def format_scores(result: dict) -> list[str]:
    """Formats the four scores, one per line, and a line with the classes in the mean if these are not all."""
    lines = [f"{name}: {result[name]:.6f}" for name in ("Overall Acc", "Mean Acc", "FreqW Acc", "Mean IoU")]
    in_mean, total = classes_in_mean(result["Class IoU"]), len(result["Class IoU"])
    return lines if in_mean == total else [*lines, f"Classes in the mean: {in_mean} of {total}"]


def classes_in_mean(class_iou: list[float]) -> int:
    """Counts the classes in a mean IoU: a class in neither target nor prediction has IoU NaN and is not in it."""
    return sum(iou == iou for iou in class_iou)


def format_class_table(
    result: dict, class_names: list[str], class_boundary_iou: list[float] | None = None
) -> list[str]:
    """Formats one line per class, and one with the means: the `CLASS_SCORES` and, if given, boundary IoU.

    "-" is a class in neither map. Scores that `result` lacks, as from an older checkpoint, are left out.
    """
    columns = {name.removeprefix("Class "): result[name] for name in CLASS_SCORES.values() if name in result}
    if class_boundary_iou:
        columns["boundary IoU"] = class_boundary_iou
    rows = [*zip(class_names, *columns.values(), strict=True), ("mean", *map(nan_mean, columns.values()))]
    width = max(len(name) for name in [*class_names, "class"])
    lines = ["  ".join([f"{'class':<{width}}", *(f"{heading:>6}" for heading in columns)])]
    for name, *values in rows:
        cells = ("-" if value != value else f"{value:.4f}" for value in values)
        cells = (f"{cell:>{max(6, len(heading))}}" for cell, heading in zip(cells, columns, strict=True))
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return lines


def nan_mean(values: list[float]) -> float:
    """Averages the values that are not NaN; NaN without any."""
    return torch.tensor(values, dtype=torch.float64).nanmean().item()


def boundary(ids: torch.Tensor, dilation_ratio: float = 0.02) -> torch.Tensor:
    """Finds the boundary pixels of uint8 class ids `[..., H, W]`, as bool of the same shape.

    These lie within d of another class, of void (255, itself never a boundary) or of the image edge. For a bool mask,
    they are those of the mask; outside counts as void. d is `dilation_ratio` of the diagonal, in whole pixels, at
    least 1 (Cheng et al. 2021, arXiv 2103.16562, section 4 and its code: d erosions of each class by a 3x3 square).
    """
    if ids.dtype == torch.bool:
        ids = (~ids).to(torch.uint8) * VOID
    reach = max(1, round(dilation_ratio * math.hypot(*ids.shape[-2:])))
    # d erosions by 3x3 equal one by this square. A pixel survives it if the highest and the lowest id in the square
    # are its own, which settles all classes at once.
    side, padded = 2 * reach + 1, F.pad(ids, [reach] * 4, value=VOID)  # [..., H + 2d, W + 2d]
    highest, lowest = (_over_squares(choose, padded, side) for choose in (torch.maximum, torch.minimum))
    return ((highest != ids) | (lowest != ids)) & (ids != VOID)


def _over_squares(choose: Callable, ids: torch.Tensor, side: int) -> torch.Tensor:
    """Takes `torch.maximum` or `torch.minimum` over squares of `side`: `[..., H - side + 1, W - side + 1]`."""
    for dim in (-2, -1):  # a square is a column, then a row
        reached = 1
        # The window doubles: two that overlap or touch make one.
        while reached < side:
            step = min(reached, side - reached)
            rest = ids.shape[dim] - step
            ids, reached = choose(ids.narrow(dim, 0, rest), ids.narrow(dim, step, rest)), reached + step
    return ids


class BoundaryIoU:
    """IoU of the pixels near the outlines, per class, over any number of images (Cheng et al. 2021, equation 2).

    Void pixels of the target belong to no class in either map and are never counted. A class ends where void begins,
    in the prediction as in the target. So a perfect prediction scores 1, whatever it says on void.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", dilation_ratio: float = 0.02) -> None:
        self.num_classes, self.dilation_ratio = num_classes, dilation_ratio
        # Pixels near an outline: of the class in both maps, in the target, in the prediction.
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)

    def update(self, target: torch.Tensor, prediction: torch.Tensor) -> None:
        """Adds images of one size: class ids `[..., H, W]`, uint8 or any integers in 0..255. Target 255 is void.

        Raises ValueError for other shapes or dtypes, InputError for ids outside 0..255.
        """
        if target.shape != prediction.shape or target.ndim < 2:
            raise ValueError(
                f"target {tuple(target.shape)} and prediction {tuple(prediction.shape)} must both be [..., H, W]"
            )
        target, prediction = as_uint8(target), as_uint8(prediction)
        prediction = torch.where(target == VOID, VOID, prediction)
        near = [torch.where(boundary(ids, self.dilation_ratio), ids, VOID) for ids in (target, prediction)]
        near = [torch.where(near[0] == near[1], near[0], VOID), *near]
        counts = torch.stack([occurrences(ids.flatten(), LABELS) for ids in near])  # [3, 256]
        self.counts += counts[:, : self.num_classes]

    def compute(self) -> dict:
        """Returns "Mean Boundary IoU" and "Class Boundary IoU" in 0..1; absent classes as in `scores`."""
        both, target, prediction = self.counts.double().cpu()
        class_iou = both / (target + prediction - both)  # 0 / 0 = NaN for a class in neither
        return {"Mean Boundary IoU": class_iou.nanmean().item(), "Class Boundary IoU": class_iou.tolist()}


class RunningMean:
    """Averages scalars that stay on the device until the mean is needed."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count = 0

    def add(self, value: torch.Tensor) -> None:
        self.total = self.total + value.detach()
        self.count += 1

    def mean(self) -> float:
        """Returns the mean, NaN without values. Waits for the device."""
        return float(self.total) / self.count if self.count else float("nan")

    def pop(self) -> float:
        """Returns the mean since the last call of `pop`, NaN without values. Waits for the device."""
        mean = self.mean()
        self.total, self.count = 0.0, 0
        return mean
