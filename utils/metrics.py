"""Scores of semantic segmentation, from one confusion matrix; boundary IoU."""

import math

import torch
import torch.nn.functional as F

from utils.errors import InputError

LABELS = 256  # a mask is uint8


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
        self._counts += torch.bincount(index.flatten(), minlength=len(self._counts))[: len(self._counts)]

    def matrix(self) -> torch.Tensor:
        """`[C, C]` int64 on the device, rows = target, columns = prediction.

        Raises InputError for a label or prediction that is neither a class nor (for a label) 255.
        """
        counts = self._counts.view(LABELS, self.num_classes)
        if int(self._highest) >= self.num_classes:
            raise InputError(f"a prediction of {int(self._highest)}, but the classes are 0..{self.num_classes - 1}")
        stray = counts[self.num_classes : LABELS - 1].sum(dim=1).nonzero()
        if len(stray):
            label = self.num_classes + int(stray[0])
            raise InputError(f"a label of {label} is neither a class (0..{self.num_classes - 1}) nor void (255)")
        return counts[: self.num_classes]

    def compute(self) -> dict:
        """The scores of `matrix()`, see `scores`."""
        return scores(self.matrix())


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


def format_class_table(result: dict, class_names: list[str]) -> list[str]:
    """A line per class with its IoU; "-" for one in neither target nor prediction."""
    width = max(len(name) for name in [*class_names, "class"])
    rows = zip(class_names, result["Class IoU"], strict=True)
    lines = [f"{name:<{width}}  {'-' if iou != iou else f'{iou:.4f}':>6}" for name, iou in rows]
    return [f"{'class':<{width}}  {'IoU':>6}", *lines]


def boundary(masks: torch.Tensor, dilation_ratio: float = 0.02) -> torch.Tensor:
    """The pixels of bool `[..., H, W]` masks that lie within d of their outline, d = `dilation_ratio` of the diagonal
    in whole pixels, 1 at least (Cheng et al. 2021, arXiv 2103.16562, section 4 and its published code: d erosions by
    a 3x3 square). The picture's edge is an outline too."""
    height, width = masks.shape[-2:]
    reach = max(1, round(dilation_ratio * math.hypot(height, width)))
    outside = F.pad((~masks).float().reshape(-1, 1, height, width), [reach] * 4, value=1.0)  # [N, 1, H + 2d, W + 2d]
    side = 2 * reach + 1  # d erosions by 3x3 are one by this square, and a square is a row after a column
    near = F.max_pool2d(F.max_pool2d(outside, (side, 1), stride=1), (1, side), stride=1)  # [N, 1, H, W]
    return masks & near.reshape(masks.shape).bool()


class BoundaryIoU:
    """IoU of the pixels near the outlines, per class, summed over any number of pictures (Cheng et al. 2021, eq. 2).

    Void pixels of the target belong to no class in either map: a class ends where void begins in the prediction
    as in the target, so a perfect prediction scores 1 whatever it says on void, and no void pixel is counted.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", dilation_ratio: float = 0.02) -> None:
        self.num_classes, self.dilation_ratio = num_classes, dilation_ratio
        self._counts = torch.zeros(2, num_classes, dtype=torch.int64, device=device)  # intersection, union

    def update(self, target: torch.Tensor, prediction: torch.Tensor) -> None:
        """Adds one picture: class ids `[H, W]`, uint8 or any integers in 0..255; a target of 255 is void.

        Raises ValueError for other shapes or dtypes, InputError for ids outside 0..255.
        """
        if target.shape != prediction.shape or target.ndim != 2:
            raise ValueError(f"target {tuple(target.shape)} and prediction {tuple(prediction.shape)} are not [H, W]")
        target, prediction = as_uint8(target), as_uint8(prediction)
        prediction = torch.where(target == LABELS - 1, target, prediction)
        for class_id in range(self.num_classes):  # one at a time: a stack of all would be large
            both = torch.stack([target == class_id, prediction == class_id])  # [2, H, W]
            if both.any():
                near = boundary(both, self.dilation_ratio)
                self._counts[:, class_id] += torch.stack([near.all(dim=0).sum(), near.any(dim=0).sum()])

    def compute(self) -> dict:
        """ "Mean Boundary IoU" and "Class Boundary IoU" in 0..1; absent classes as in `scores`."""
        intersection, union = self._counts.double().cpu()
        class_iou = intersection / union  # 0 / 0 = NaN: in neither
        return {"Mean Boundary IoU": class_iou.nanmean().item(), "Class Boundary IoU": class_iou.tolist()}
