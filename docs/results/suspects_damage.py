"""Damages 5% of the training masks of a data set in VOC layout, and counts how many of them are among the suspects.

python docs/results/suspects_damage.py damage datasets/data/shapes datasets/data/damaged
python docs/results/suspects_damage.py count datasets/data/damaged results/suspects.csv

The three kinds of damage take turns. A class is renamed to another, or deleted, which makes it background; it is one
with at least 1% of the image. Or the mask moves left or right by 10% of its width, and the gap becomes void.
"""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

VOID, SHARE, SEED, TOP = 255, 0.05, 1, 0.1
KINDS = ("renamed", "deleted", "shifted")


def damage(mask: np.ndarray, kind: str, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a damaged copy of class ids, uint8 `[H, W]`."""
    mask = mask.copy()
    if kind == "shifted":
        step = round(0.1 * mask.shape[1]) * rng.choice([-1, 1])
        mask = np.roll(mask, step, axis=1)
        mask[:, slice(0, step) if step > 0 else slice(step, None)] = VOID
        return mask
    counts = np.bincount(mask.ravel(), minlength=256)[1:num_classes]
    chosen = 1 + rng.choice(np.flatnonzero(counts >= 0.01 * mask.size))
    others = [class_id for class_id in range(1, num_classes) if class_id != chosen]
    mask[mask == chosen] = rng.choice(others) if kind == "renamed" else 0
    return mask


def write_damaged(source: Path, out: Path) -> None:
    """Copies a data set to `out`, damages masks of its train split and lists these in `damaged.csv`."""
    shutil.copytree(source, out)
    num_classes = len((out / "class_names.txt").read_text().splitlines())
    ids = (out / "ImageSets/Segmentation/train.txt").read_text().split()
    rng, rows = np.random.default_rng(SEED), []
    for number, name in enumerate(rng.choice(ids, round(SHARE * len(ids)), replace=False)):
        path, kind = out / "SegmentationClass" / f"{name}.png", KINDS[number % len(KINDS)]
        with Image.open(path) as mask:
            damaged = Image.fromarray(damage(np.array(mask), kind, num_classes, rng))
            damaged.putpalette(mask.getpalette())
        damaged.save(path)
        rows.append(f"{name},{kind}\n")
    (out / "damaged.csv").write_text("".join(["id,kind\n", *rows]))


def count_found(data: Path, table: Path) -> None:
    """Prints how many damaged masks are in the top 10%, by the order of `suspects.csv` and by its mean loss."""
    with table.open(newline="") as file:
        suspects = list(csv.DictReader(file))
    with (data / "damaged.csv").open(newline="") as file:
        kinds = {row["id"]: row["kind"] for row in csv.DictReader(file)}
    top = round(TOP * len(suspects))
    by_loss = sorted(suspects, key=lambda row: -float(row["mean_loss"]))
    for name, order in (("suspects", suspects), ("mean loss", by_loss)):
        found = [kinds.get(row["id"]) for row in order[:top]]
        shares = [f"{kind} {found.count(kind)} of {list(kinds.values()).count(kind)}" for kind in KINDS]
        total = sum(kind is not None for kind in found)
        print(f"first {top} of {len(order)} by {name}: {total} of {len(kinds)} ({', '.join(shares)})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["damage", "count"])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args()
    (write_damaged if args.command == "damage" else count_found)(args.first, args.second)
