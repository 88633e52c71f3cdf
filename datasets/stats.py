"""Counts which classes a split shows, how often and where, and derives class weights. Reads only the masks."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from datasets.files import VOID
from datasets.voc import SegmentationDataset
from utils.errors import InputError

CLASS_WEIGHTS = ("inverse", "median_frequency", "effective_number")
BETA = 0.999  # (N - 1) / N for N = 1,000 distinct images; one of the values compared by Cui et al. 2019, section 5
VISIBLE = 0.01  # share of an image's pixels; a smaller speck goes unnoticed in a grid of images
log = logging.getLogger("deeplab")


@dataclass
class ClassStatistics:
    """Pixel counts of a split with N images and C classes. `[C]` is in the order of `class_names`."""

    class_names: list[str]
    ids: list[str]
    counts: np.ndarray  # int64 [N, C], labelled pixels of each class in each image
    void: np.ndarray  # int64 [N], the other pixels of each image

    @property
    def pixels(self) -> np.ndarray:
        """Labelled pixels of each class, int64 `[C]`."""
        return self.counts.sum(axis=0)

    @property
    def images(self) -> np.ndarray:
        """Number of images that show each class, int64 `[C]`."""
        return (self.counts > 0).sum(axis=0)

    @property
    def image_pixels(self) -> np.ndarray:
        """All labelled pixels of the images that show each class, int64 `[C]`."""
        return self.counts.sum(axis=1) @ (self.counts > 0)

    @property
    def shares(self) -> np.ndarray:
        """Each class's share of the labelled pixels, float `[C]`, sum 1; zeros if nothing is labelled."""
        return self.pixels / max(1, self.counts.sum())

    @property
    def void_share(self) -> float:
        """Void's share of all pixels."""
        return float(self.void.sum() / max(1, self.void.sum() + self.counts.sum()))

    @property
    def imbalance(self) -> float:
        """Pixels of the most frequent class over pixels of the rarest class present; NaN if there is none."""
        present = self.pixels[self.pixels > 0]
        return float(present.max() / present.min()) if present.size else float("nan")


def class_statistics(dataset: SegmentationDataset) -> ClassStatistics:
    """Reads every mask of a split once. Raises InputError for a mask that cannot be used."""
    counts = np.zeros((len(dataset), VOID + 1), np.int64)
    # One thread reads 1,464 masks in under 2 s; two are no faster.
    for index in tqdm(range(len(dataset)), desc="counting pixels", unit="mask", disable=None):
        counts[index] = np.bincount(dataset.mask(index).numpy().ravel(), minlength=VOID + 1)
    return ClassStatistics(
        dataset.class_names, dataset.ids, counts[:, : dataset.num_classes].copy(), counts[:, VOID].copy()
    )


def class_weights(
    method: str, pixels: np.ndarray, image_pixels: np.ndarray | None = None, *, images: np.ndarray | None = None
) -> torch.Tensor:
    """Returns the weights of `--class_weights`, float32 `[C]`, from counts over the training set, integers `[C]`.

    pixels: labelled pixels of each class. image_pixels: all labelled pixels of the images that show the class.
    images: number of those images. The mean weight of a labelled pixel is scaled to 1, so that a learning rate keeps
    its meaning. A class without pixels has weight 0, because it is never a target.
    "inverse": 1 / pixels. The strongest: every class counts the same, however few its pixels.
    "median_frequency": 1 / f with f = pixels / image_pixels (Eigen and Fergus 2015, arXiv 1411.4734, section 6.3.2;
    the scale replaces their factor, the median of f). Independent of how many images show a class.
    "effective_number": 1 / (1 - beta^images) (Cui et al. 2019, arXiv 1901.05555, equation 2 and section 4; the scale
    replaces 1 - beta). Their n counts samples that overlap only by chance. So it counts images here, not pixels: with
    pixels, beta 0.9999 saturates for every class, and (N - 1) / N for N pixels in total is nearly "inverse". Two
    weights differ by a factor of at most 1 / (1 - beta). Classes shown by thousands of images, or by all images, have
    equal weights.
    Raises InputError for an unknown method, ValueError if the counts that the method needs are missing.
    """
    if method not in CLASS_WEIGHTS:
        raise InputError(
            f"--class_weights {method}: there is no such method; choose one of {', '.join(CLASS_WEIGHTS)}"
        )
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


def count_class_weights(dataset: SegmentationDataset, method: str, device: torch.device) -> torch.Tensor | None:
    """Counts the pixels of a training set for `--class_weights`; returns float32 `[C]`, or None for "none"."""
    if method == "none":
        return None
    counted = class_statistics(dataset)
    weights = class_weights(method, counted.pixels, counted.image_pixels, images=counted.images)
    pairs = zip(dataset.class_names, weights.tolist(), strict=True)
    log.info(f"Class weights ({method}): {', '.join(f'{name} {weight:.4g}' for name, weight in pairs)}")
    return weights.to(device)


def choose_samples(statistics: ClassStatistics, num: int, seed: int, *, must_cover: bool = True) -> list[int]:
    """Chooses `num` images that together show every class of the split, and returns their indices.

    Each step looks at the classes shown least so far. Among the images of the rarest of them it takes the one with
    the most of these classes; `seed` breaks ties. So the first images are a small set that covers every class
    (greedy: not proven smallest), and further images spread over the classes.
    An image counts for a class that fills 1% of it, void included. A class that never fills 1% counts where it fills
    most. Only if `num` such images cannot cover the classes does a single pixel count.
    Raises InputError if the split has fewer than `num` images, or if this choice needs more than `num` to cover the
    classes. Without `must_cover` it returns fewer images or covers fewer classes instead.
    """
    # An id may be listed twice.
    _, distinct = np.unique(statistics.ids, return_index=True)
    if not must_cover:
        num = min(num, len(distinct))
    if num > len(distinct):
        raise InputError(f"--num {num}: the split has only {len(distinct)} images; lower it")
    order = np.random.default_rng(seed).permutation(distinct)
    counts = statistics.counts[order]
    areas = counts / np.maximum(counts.sum(axis=1) + statistics.void[order], 1)[:, None]  # [N, C]
    any_pixel = counts > 0
    visible = any_pixel & (areas >= np.minimum(VISIBLE, areas.max(axis=0)))
    chosen = _greedy_cover(visible, num)
    if len(chosen) > num:
        chosen = min(chosen, _greedy_cover(any_pixel, num), key=len)
    if len(chosen) > num and must_cover:
        total = np.count_nonzero(statistics.pixels)
        raise InputError(f"--num {num}: too few images to show all {total} classes; give {len(chosen)} or more")
    return order[chosen[:num]].tolist()


def _greedy_cover(shows: np.ndarray, num: int) -> list[int]:
    """Chooses `num` rows of bool `[N, C]`, or more if that many do not show every class that any row shows."""
    shown = np.where(shows.any(axis=0), 0, num + 1)  # how often so far; a class in no row counts as shown enough
    left, chosen = shows.copy(), []
    rest = np.ones(len(shows), bool)
    while len(chosen) < num or not shown.all():
        can_gain = left.any(axis=0)
        if can_gain.any():
            least = can_gain & (shown == shown[can_gain].min())
            rarest = np.flatnonzero(least)[left[:, least].sum(axis=0).argmin()]
            best = ((left & least).sum(axis=1) * left[:, rarest]).argmax()
        else:  # no remaining image shows anything
            best = rest.argmax()
        shown += shows[best]
        left[best] = rest[best] = False
        chosen.append(int(best))
    return chosen


def statistics_table(statistics: ClassStatistics) -> tuple[list[str], list[list]]:
    """Returns a header and one row per class, for CSV. Shares are in 0..1, weights as in `class_weights`."""
    header = ["class", "pixels", "pixel_share", "images", "image_share", *(f"weight_{m}" for m in CLASS_WEIGHTS)]
    pixels, image_pixels, images = statistics.pixels, statistics.image_pixels, statistics.images
    weights = [class_weights(m, pixels, image_pixels, images=images).tolist() for m in CLASS_WEIGHTS]
    columns = [pixels.tolist(), statistics.shares.tolist(), images.tolist(), images / max(1, len(statistics.ids))]
    rows = zip(statistics.class_names, *columns, *weights, strict=True)
    return header, [[float(f"{cell:.6g}") if isinstance(cell, float) else cell for cell in row] for row in rows]


def format_statistics(statistics: ClassStatistics) -> list[str]:
    """Formats the table, one line per class, followed by the totals."""
    _, rows = statistics_table(statistics)
    cells = [["class", "pixels", "share", "images", "share", *CLASS_WEIGHTS]]
    for name, pixels, share, images, image_share, *weights in rows:
        cells.append([name, f"{pixels:,}", f"{share:.2%}", f"{images:,}", f"{image_share:.1%}"])
        cells[-1] += [f"{weight:.4f}" if pixels else "-" for weight in weights]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line, widths[1:], strict=True))])
        for name, *line in cells
    ]
    labelled = f"{statistics.counts.sum():,} labelled pixels"
    lines += ["", f"{len(rows):,} classes, {len(statistics.ids):,} images, {labelled}"]
    lines += [f"void: {statistics.void_share:.2%} of all pixels"]
    present = [row for row in rows if row[1]]
    if present:
        most, least = max(present, key=lambda row: row[1])[0], min(present, key=lambda row: row[1])[0]
        lines += [f"imbalance: {statistics.imbalance:,.1f} pixels of {most} to one of {least}"]
    if absent := [row[0] for row in rows if not row[1]]:
        lines += [f"in no image: {', '.join(absent)}"]
    return lines
