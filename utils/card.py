"""Computes the evaluation card of `main.py --test_only`, which shows more than a single mIoU.

It has boundary IoU, the effect of the choice of images, the worst images, speed and memory. It is collected batch by
batch alongside the confusion matrix; only 3 counts per class are kept for each image.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import torch

from utils.against import ImageCounts, log_comparison
from utils.bootstrap import bootstrap_interval, mean_iou
from utils.distributed import all_gather, all_sum
from utils.environment import model_cost, peak_memory_mb
from utils.files import write_csv, write_text
from utils.metrics import CLASS_SCORES, LABELS, SCORE_COLUMNS, BoundaryIoU, classes_in_mean, occurrences
from utils.options import TEST_FLAGS

NUM_WORST = 10
NOT_IN_JSON = ("class_boundary_iou", "per_image", "counts")  # of `Card.compute`; card.json has them otherwise or not
log = logging.getLogger("deeplab")


class Card:
    """Collects the figures of one evaluation as the `on_batch` of `engine.evaluate`; create it right before.

    ids: the data set's, which the indices of a batch point into. also: another `on_batch`, called with each batch.
    Neither its time nor that of collecting counts as the evaluation's.
    """

    def __init__(
        self, ids: list[str], num_classes: int, device: torch.device, *, also: Callable[..., None] | None = None
    ) -> None:
        self.ids, self.num_classes, self.device, self.also = ids, num_classes, device, also
        self._boundary = BoundaryIoU(self.num_classes, device)
        self._indices: list[int] = []
        self._counts: list[torch.Tensor] = []  # [B, 3, C] per batch, on the device
        self._began, self._not_counted = time.perf_counter(), 0.0

    def __call__(
        self, indices: list[int], images: torch.Tensor, masks: torch.Tensor, predictions: torch.Tensor
    ) -> None:
        began = self._clock()
        self._indices += indices
        self._counts.append(image_counts(masks, predictions, self.num_classes))
        self._boundary.update(masks, predictions)
        if self.also is not None:
            self.also(indices, images, masks, predictions)
        self._not_counted += self._clock() - began

    def gather(self) -> Self:
        """Merges what all processes have collected, in every process."""
        counts = torch.cat(self._counts) if self._counts else torch.zeros(0, 3, self.num_classes, dtype=torch.int64)
        gathered = all_gather((self._indices, counts.cpu()))
        self._indices = [index for indices, _ in gathered for index in indices]
        self._counts = [counts for _, counts in gathered]
        all_sum(self._boundary.counts)
        return self

    def compute(self) -> dict:
        """Computes the figures; call it right after the evaluation, because it reads the clock.

        "mean_boundary_iou" and "class_boundary_iou" (C floats; NaN: absent). "bootstrap": the 95% interval
        (low, high) of mIoU over the "labelled_images", those with a labelled pixel. "worst": (id, mIoU) of the ten
        labelled images whose mIoU is lowest, lowest first. "per_image": (id, mIoU, pixel accuracy) in the data
        set's order, NaN for images without a labelled pixel. "counts": int32 `[N, 3, C]` in that order, as from
        `image_counts`. "images_per_second" and "peak_memory_mb".
        Raises ValueError if no image has a labelled pixel.
        """
        seconds = self._clock() - self._began - self._not_counted
        peak = peak_memory_mb(self.device)
        counts = torch.cat(self._counts).cpu().numpy()[np.argsort(self._indices)].astype(float)  # [N, 3, C]
        ids = [self.ids[index] for index in sorted(self._indices)]
        right, target, _ = counts.sum(axis=2).T  # [N] each
        labelled = target > 0
        with np.errstate(invalid="ignore"):  # 0 / 0 = NaN: nothing is labelled
            ious, accuracies = mean_iou(counts), right / target
        worst = np.argsort(ious, kind="stable")[: min(NUM_WORST, labelled.sum())]  # NaNs come last
        edges = self._boundary.compute()
        return {
            "mean_boundary_iou": edges["Mean Boundary IoU"],
            "class_boundary_iou": edges["Class Boundary IoU"],
            "bootstrap": bootstrap_interval(counts[labelled]),
            "labelled_images": int(labelled.sum()),
            "worst": [(ids[index], float(ious[index])) for index in worst],
            "counts": counts.astype(np.int32),
            "per_image": list(zip(ids, ious.tolist(), accuracies.tolist(), strict=True)),
            "images_per_second": len(ids) / seconds,
            "peak_memory_mb": peak,
        }

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def image_counts(masks: torch.Tensor, predictions: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Counts pixels per image and class: correct, in the target, in the prediction. Returns int64 `[B, 3, C]`.

    masks and predictions: uint8 class ids `[B, H, W]`, the predictions below C. Pixels whose mask is not a class do
    not count.
    """
    first = torch.arange(len(masks), device=masks.device).mul_(LABELS).to(torch.int32)[:, None, None]  # [B, 1, 1]
    index = (first + masks).mul_(num_classes).add_(predictions)  # [B, H, W]
    pairs = occurrences(index.flatten(), len(masks) * LABELS * num_classes)
    matrices = pairs.view(len(masks), LABELS, num_classes)[:, :num_classes]  # [B, C, C], rows = target
    return torch.stack([matrices.diagonal(dim1=1, dim2=2), matrices.sum(dim=2), matrices.sum(dim=1)], dim=1)


def format_card(card: dict) -> list[str]:
    """Returns the figures of `Card.compute` as lines to print, without those per class and image."""
    low, high = card["bootstrap"]
    return [
        f"Mean Boundary IoU: {card['mean_boundary_iou']:.6f}",
        f"Mean IoU 95% interval: {low:.6f} to {high:.6f} (bootstrap over {card['labelled_images']} images)",
        f"Speed: {card['images_per_second']:.1f} images/s",
        f"Peak memory: {card['peak_memory_mb']:,.0f} MB",
        f"The {len(card['worst'])} images with the lowest mIoU:",
        *(f"  {iou:.6f}  {id}" for id, iou in card["worst"]),
    ]


def write_card(
    folder: Path,
    card: dict,
    result: dict,
    *,
    opts: argparse.Namespace,
    class_names: list[str],
    against: ImageCounts | None = None,
) -> None:
    """Logs a card, writes `card.json`, `images.csv` and `counts.npz`, and compares with `--against`.

    card: from `Card.compute`; result: from `utils.metrics.scores`; against: from `read_against`. The JSON begins with
    what was evaluated and how. NaN becomes null there. Raises InputError if the two were scored on different masks.
    """
    log.info("\n".join(format_card(card)))
    figures = {name: getattr(opts, name) for name in ("ckpt", "dataset", "val_split", *TEST_FLAGS)}
    figures |= {"comparable": not opts.crop_val}
    stride = opts.eval_output_stride or opts.output_stride
    figures |= model_cost(
        opts.model, num_classes=len(class_names), output_stride=stride, separable_conv=opts.separable_conv
    )
    figures |= {column: result[name] for column, name in SCORE_COLUMNS.items()}
    figures |= {f"mean_{name}": result[f"Mean {name.title()}"] for name in ("precision", "recall", "f1")}
    figures |= {"classes_in_mean": classes_in_mean(result["Class IoU"])}
    figures |= {name: value for name, value in card.items() if name not in NOT_IN_JSON}
    figures["worst"] = [{"image": id, "mean_iou": iou} for id, iou in card["worst"]]
    per_class = {column: result[name] for column, name in CLASS_SCORES.items()}
    per_class = {"class": class_names} | per_class | {"boundary_iou": card["class_boundary_iou"]}
    figures["classes"] = [dict(zip(per_class, row, strict=True)) for row in zip(*per_class.values(), strict=True)]
    write_text(folder / "card.json", json.dumps(_without_nan(figures), indent=2, allow_nan=False) + "\n")
    rows = [[id, f"{iou:.6f}", f"{accuracy:.6f}"] for id, iou, accuracy in card["per_image"]]
    write_csv(folder / "images.csv", ["image", "mean_iou", "pixel_accuracy"], rows)
    own = ImageCounts([id for id, *_ in card["per_image"]], class_names, card["counts"])
    own.save(folder / "counts.npz")
    log.info(f"Scores saved in {folder}")
    if against is not None:
        log_comparison(own, against, opts.against)


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and value != value else value
