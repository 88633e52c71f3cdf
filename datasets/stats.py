"""Which classes a split shows, how often and where: counted from the annotations, photographs are not needed."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from datasets.files import VOID, read_mask
from datasets.voc import SegmentationDataset
from utils.errors import InputError
from utils.loss import CLASS_WEIGHTS, class_weights

VISIBLE = 0.01  # of a picture's pixels: less is a speck that one does not find in a grid of pictures


@dataclass
class ClassStatistics:
    """Pixel counts of a split of N images and C classes. `[C]` is in the order of `class_names`."""

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
        """Each class's share of the labelled pixels, float `[C]`, sum 1; zeros where nothing is labelled."""
        return self.pixels / max(1, self.counts.sum())

    @property
    def void_share(self) -> float:
        """Share of void in all pixels."""
        return float(self.void.sum() / max(1, self.void.sum() + self.counts.sum()))

    @property
    def imbalance(self) -> float:
        """Pixels of the most frequent class over those of the rarest that is there; NaN where none is."""
        present = self.pixels[self.pixels > 0]
        return float(present.max() / present.min()) if present.size else float("nan")


def class_statistics(dataset: SegmentationDataset) -> ClassStatistics:
    """Reads every mask of a split once. Raises InputError for a mask that cannot be used."""
    counts = np.zeros((len(dataset), VOID + 1), np.int64)
    # In one thread: 1,464 masks take under 2 s, and no less with two.
    for index, path in enumerate(tqdm(dataset.masks, desc="counting pixels", unit="mask", disable=None)):
        mask = read_mask(path, dataset.num_classes).numpy()
        counts[index] = np.bincount(mask.ravel(), minlength=VOID + 1)
    return ClassStatistics(
        dataset.class_names, dataset.ids, counts[:, : dataset.num_classes].copy(), counts[:, VOID].copy()
    )


def choose_samples(statistics: ClassStatistics, num: int, seed: int, *, must_cover: bool = True) -> list[int]:
    """Indices of `num` images that together show every class that the split has, for a grid of pictures.

    Each step turns to the classes that were shown least so far and takes, of the images with the rarest of
    them, the one with most of them; `seed` decides ties. So the first images form a small set that covers
    every class (greedy: small, not proven smallest), and the further ones spread over the classes.
    An image counts for a class that fills 1% of it, void included, or for a class that fills so much nowhere,
    where it fills most; only if `num` images of that kind do not suffice, for each class with a pixel in it.
    Raises InputError if `num` exceeds the images, or is too small for this choice to cover the classes; without
    `must_cover` the choice is cut short instead.
    """
    _, distinct = np.unique(statistics.ids, return_index=True)  # an id may be listed twice
    if not must_cover:
        num = min(num, len(distinct))
    if num > len(distinct):
        raise InputError(f"--num {num}: the split has only {len(distinct)} images; lower it")
    order = np.random.default_rng(seed).permutation(distinct)
    counts = statistics.counts[order]
    areas = counts / np.maximum(counts.sum(axis=1) + statistics.void[order], 1)[:, None]  # [N, C]
    any_pixel = counts > 0
    visible = any_pixel & (areas >= np.minimum(VISIBLE, areas.max(axis=0)))
    chosen = _spread(visible, num)
    if len(chosen) > num:
        chosen = min(chosen, _spread(any_pixel, num), key=len)
    if len(chosen) > num and must_cover:
        total = np.count_nonzero(statistics.pixels)
        raise InputError(f"--num {num}: too few images to show all {total} classes; give {len(chosen)} or more")
    return order[chosen[:num]].tolist()


def _spread(shows: np.ndarray, num: int) -> list[int]:
    """Rows of bool `[N, C]`: `num` of them, or as many more as it takes to show every class that can be shown."""
    shown = np.where(shows.any(axis=0), 0, num + 1)  # how often each class was so far; at once enough if never
    left, chosen = shows.copy(), []
    rest = np.ones(len(shows), bool)
    while len(chosen) < num or not shown.all():
        can_gain = left.any(axis=0)
        if can_gain.any():
            least = can_gain & (shown == shown[can_gain].min())
            rarest = np.flatnonzero(least)[left[:, least].sum(axis=0).argmin()]
            best = ((left & least).sum(axis=1) * left[:, rarest]).argmax()
        else:  # no image that is left shows anything
            best = rest.argmax()
        shown += shows[best]
        left[best] = rest[best] = False
        chosen.append(int(best))
    return chosen


def statistics_table(statistics: ClassStatistics) -> tuple[list[str], list[list]]:
    """Header and a row per class, for CSV: shares in 0..1, weights as in `utils.loss.class_weights`."""
    header = ["class", "pixels", "pixel_share", "images", "image_share", *(f"weight_{m}" for m in CLASS_WEIGHTS)]
    pixels, image_pixels, images = statistics.pixels, statistics.image_pixels, statistics.images
    weights = [class_weights(m, pixels, image_pixels, images=images).tolist() for m in CLASS_WEIGHTS]
    columns = [pixels.tolist(), statistics.shares.tolist(), images.tolist(), images / max(1, len(statistics.ids))]
    rows = zip(statistics.class_names, *columns, *weights, strict=True)
    return header, [[float(f"{cell:.6g}") if isinstance(cell, float) else cell for cell in row] for row in rows]


def format_statistics(statistics: ClassStatistics) -> list[str]:
    """The table, a line per class, then the totals."""
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
