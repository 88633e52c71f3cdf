"""Says how much a mean IoU, or its difference between two models, depends on the choice of images.

Both come from the bootstrap (Efron 1979): images are drawn with replacement, as many as there are, again and again.
Nothing here says anything about other trainings of the same model.
"""

from typing import NamedTuple

import numpy as np

RESAMPLES, SEED = 1000, 0
CHUNK = 100  # resamples at a time: 8 bytes per image each
FEW_IMAGES, FEW_OF_CLASS = 50, 10  # below these, 95% intervals are too narrow: see docs/results.md


class Difference(NamedTuple):
    """How much higher one model scores than another on the same images, in IoU; all NaN for a class in no mask."""

    name: str  # "mIoU" or the class
    value: float
    low: float  # 95% interval
    high: float
    better: float  # share of the resamples in which it scores higher
    without: int  # resamples that do not show the class
    images: int  # that show the class; for mIoU, that have a labelled pixel


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Computes mIoU `[...]` from float counts `[..., 3, C]` as `utils.card.image_counts` returns them.

    Absent classes are treated as in `utils.metrics.scores`; NaN, without a warning, if there is no class at all.
    """
    right, target, predicted = np.moveaxis(counts, -2, 0)  # [..., C] each
    union = target + predicted - right
    there = union > 0
    iou = np.divide(right, union, out=np.zeros_like(right), where=there)
    with np.errstate(invalid="ignore"):
        return iou.sum(axis=-1) / there.sum(axis=-1)


def resampled(counts: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Sums float counts `[N, ...]` over the images of each resample: `[R, ...]`.

    A resample is N draws out of the N images with replacement. The same seed and N give the same draws. Raises
    ValueError for N = 0.
    """
    rng, number, sums = np.random.default_rng(seed), len(counts), []
    if not number:
        raise ValueError("no image has a labelled pixel, so there is no interval")
    for first in range(0, resamples, CHUNK):
        draws = (rng.integers(number, size=number) for _ in range(min(CHUNK, resamples - first)))
        weights = np.stack([np.bincount(draw, minlength=number) for draw in draws]).astype(float)  # [CHUNK, N]
        sums.append((weights @ counts.reshape(number, -1)).reshape(-1, *counts.shape[1:]))
    return np.concatenate(sums)


def bootstrap_interval(counts: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED) -> tuple[float, float]:
    """Computes the 95% interval of mIoU over the choice of images: percentiles 2.5 and 97.5 over the resamples.

    counts: float `[N, 3, C]` as from `image_counts`, each image with a labelled pixel. Raises ValueError for N = 0.
    """
    low, high = np.percentile(mean_iou(resampled(counts, resamples=resamples, seed=seed)), (2.5, 97.5))
    return float(low), float(high)


def paired_differences(
    counts: np.ndarray,
    others: np.ndarray,
    class_names: list[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Difference]:
    """Compares two models on the same images: the difference of mIoU, then that of each class.

    Both models are scored on the same draws, so that what makes an image hard for both cancels out. The means are
    over the classes annotated in a resample: so both models have the same ones. A class is compared on the resamples
    in which it is annotated. Images without a labelled pixel do not count.
    counts, others: integers `[N, 3, C]` as from `image_counts`, equal in [:, 1]. Raises ValueError if no image has a
    labelled pixel.
    """
    both = np.stack([counts, others], axis=1).astype(float)  # [N, 2, 3, C]
    both = both[both[:, 0, 1].sum(axis=1) > 0]
    shown = (both[:, 0, 1] > 0).sum(axis=0)  # [C] images
    draws = _differences(resampled(both, resamples=resamples, seed=seed))  # [R, 1 + C]
    found = []
    for name, value, column, images in zip(
        ["mIoU", *class_names], _differences(both.sum(axis=0)), draws.T, [len(both), *shown], strict=True
    ):
        seen = column[~np.isnan(column)]
        low, high = np.percentile(seen, (2.5, 97.5)) if len(seen) else (np.nan, np.nan)
        better = float((seen > 0).mean()) if len(seen) else np.nan
        found.append(
            Difference(name, float(value), float(low), float(high), better, len(column) - len(seen), int(images))
        )
    return found


def _differences(counts: np.ndarray) -> np.ndarray:
    """Computes first less second in mIoU and each class's IoU, `[..., 1 + C]`, from float counts `[..., 2, 3, C]`."""
    right, target, predicted = np.moveaxis(counts, -2, 0)  # [..., 2, C] each
    iou = np.divide(right, target + predicted - right, out=np.full_like(right, np.nan), where=target > 0)
    classes = iou[..., 0, :] - iou[..., 1, :]  # [..., C]
    mean = np.nanmean(classes, axis=-1, keepdims=True)
    return np.concatenate([mean, classes], axis=-1)


def format_differences(differences: list[Difference], other: str) -> list[str]:
    """Formats a comparison in points of IoU: a sentence on mIoU, and a line per class."""
    mean, *classes = differences
    width = max(len(each.name) for each in classes)
    lines = [
        f"mIoU {points(mean.value, '+')} points over {other}, 95% interval {interval(mean)}; better in "
        f"{mean.better:.1%} of resamples ({RESAMPLES:,} of {mean.images} images)"
    ]
    for each in classes:
        if np.isnan(each.value):
            lines.append(f"  {each.name:<{width}}  in no annotation")
            continue
        without = f" ({each.without:,} resamples without it dropped)" if each.without else ""
        lines.append(
            f"  {each.name:<{width}}  {points(each.value, '+'):>7}  {interval(each):>16}  better in "
            f"{each.better:.1%}{without}"
        )
    return lines


def points(value: float, sign: str = "") -> str:
    """Formats a difference of IoU in points, hundredths of IoU; never as -0.00."""
    return format(100 * value, f"{sign}z.2f")


def interval(difference: Difference) -> str:
    """Formats the 95% interval in points."""
    return f"{points(difference.low)} to {points(difference.high)}"


def cautions(differences: list[Difference]) -> list[str]:
    """Returns the warnings that a comparison needs: few images, and classes in few of them."""
    mean, *classes = differences
    notes = []
    if mean.images < FEW_IMAGES:
        notes.append(f"{mean.images} images are few: below {FEW_IMAGES} a 95% interval tends to be too narrow")
    rare = [f"{each.name} ({each.images})" for each in classes if 0 < each.images < FEW_OF_CLASS]
    if rare:
        notes.append(
            f"classes in fewer than {FEW_OF_CLASS} images, whose intervals tend to be too narrow: {', '.join(rare)}"
        )
    return notes
