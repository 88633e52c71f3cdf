"""Scores of semantic segmentation, all from one confusion matrix."""

import torch

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


def format_scores(result: dict) -> list[str]:
    """The four scores, one a line."""
    return [f"{name}: {result[name]:.6f}" for name in ("Overall Acc", "Mean Acc", "FreqW Acc", "Mean IoU")]


def format_class_table(result: dict, class_names: list[str]) -> list[str]:
    """A line per class with its IoU; "-" for one in neither target nor prediction."""
    width = max(len(name) for name in [*class_names, "class"])
    rows = zip(class_names, result["Class IoU"], strict=True)
    lines = [f"{name:<{width}}  {'-' if iou != iou else f'{iou:.4f}':>6}" for name, iou in rows]
    return [f"{'class':<{width}}  {'IoU':>6}", *lines]
