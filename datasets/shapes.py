"""Generates a data set in VOC layout that needs no download and that a model learns in minutes.

    python -m datasets.shapes --out datasets/data/shapes               # the data of `main.py --dataset shapes`
    python -m datasets.shapes --out datasets/data/many --classes 151 --images 1000 --size 256
    python main.py --dataset folder --data_root datasets/data/many     # trains on a set written elsewhere

A class is an outline filled with its own texture (kind and direction), in hues that scatter around its own. The same
outlines filled with blotches are background, in any hue. So neither colour nor outline alone gives a class away.
Classes with higher ids have fewer objects; every class is in both splits. Void borders surround the objects, as in
VOC. The same arguments and library versions give the same bytes.
"""

import colorsys
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from datasets.files import VOID
from datasets.voc import voc_colormap
from utils.cli import Parser, friendly_errors
from utils.errors import InputError
from utils.files import cannot_write

# The data of `--dataset shapes`: background and 6 kinds of objects, drawn in seconds.
NUM_CLASSES, NUM_IMAGES, SIZE, SEED = 7, 500, 128, 1
MAX_CLASSES, MIN_SIZE = 151, 64  # below 64 pixels the void border covers a small star completely
VAL_EVERY = 5  # image i is in val if i % 5 == 1, whatever the number of images
RECORD = "shapes.json"  # holds the arguments; a folder that has it is complete
RECIPE = 1  # increase it when the drawings change, so that older sets are not mistaken for current ones

ASPECTS = ((1, 1), (1.25, 1), (1, 1.25), (1, 0.75))  # width and height as multiples of the size
ZIPF = 0.5  # class k is drawn in proportion to k ** -ZIPF
HUE_SPREAD = 0.08  # standard deviation around a class's own hue; the full circle is 1


def _polygon(corners: int, *radii: float) -> np.ndarray:
    turn = np.arange(corners) * 2 * np.pi / corners
    return np.resize(radii, corners)[:, None] * np.stack([np.sin(turn), -np.cos(turn)], 1)  # [corners, 2]


# Class k takes entry k - 1 of each table, modulo the table's length. 8, 7 and 3 have no common divisor, so the
# first 168 classes all differ (Chinese remainder theorem), and the first 7 differ in texture.
OUTLINES = {  # (x, y) of the corners, y downwards, roughly on the unit circle
    "circle": _polygon(40, 1),
    "star": _polygon(10, 1.2, 0.6),
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85,
    "triangle": _polygon(3, 1.25),
    "cross": _polygon(12, 0.44, 1.2, 1.2) @ np.array([[1, 1], [-1, 1]]) / 2**0.5,
    "heart": _polygon(12, 0.55, 1.05, 1.2, 1.05, 0.9, 0.9, 1.25, 0.9, 0.9, 1.05, 1.2, 1.05),
    "drop": _polygon(12, 1.4, *[0.8] * 11),
    "arrow": np.array([(0, -1.2), (1.1, 0.1), (0.5, 0.1), (0.5, 1.1), (-0.5, 1.1), (-0.5, 0.1), (-1.1, 0.1)]),
}
TEXTURES = {  # brightness 0..1 by u, in periods across the direction, and v, in periods along it
    "striped": lambda u, v: u % 1 < 0.5,
    "checked": lambda u, v: (u % 1 < 0.5) ^ (v / 2 % 1 < 0.5),
    "dotted": lambda u, v: np.hypot(u % 1 - 0.5, (v / 2 % 1 - 0.5) * 1.2) < 0.33,
    "wavy": lambda u, v: (u + 0.4 * np.sin(np.pi * v)) % 1 < 0.5,
    "graded": lambda u, v: u / 2 % 1,
    "ringed": lambda u, v: np.hypot(u, v / 2) % 1 < 0.5,
    "bricked": lambda u, v: (u % 1 > 0.25) & ((v / 2 + u // 1 / 2) % 1 > 0.15),
}
# Only one slant, because a flip turns it into the other.
DIRECTIONS = {"level": 0, "upright": np.pi / 2, "slanted": np.pi / 4}


def _appearance(class_id: int) -> list[str]:
    """Returns the names of the direction, texture and outline of class 1, 2, ..."""
    return [list(table)[(class_id - 1) % len(table)] for table in (DIRECTIONS, TEXTURES, OUTLINES)]


def class_names(num_classes: int) -> list[str]:
    return ["background"] + [" ".join(_appearance(class_id)) for class_id in range(1, num_classes)]


def _blotches(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Draws smooth noise of about 0..1, float32 `[H, W]`, with `cells` independent values along each side."""
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC))


def _two_tone(rng: np.random.Generator, pattern: np.ndarray, hue: float) -> np.ndarray:
    """Mixes a dark and a light tone near `hue` by a pattern 0..1 `[...]`; returns RGB 0..255 `[..., 3]`."""
    hues = (hue + rng.normal(0, 0.06, 2)) % 1
    dark = np.array(colorsys.hsv_to_rgb(hues[0], rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.45)))
    light = np.array(colorsys.hsv_to_rgb(hues[1], rng.uniform(0.2, 0.8), rng.uniform(0.65, 1)))
    return 255 * (dark + (light - dark) * pattern[..., None])


def draw(index: int, *, num_classes: int, size: int, seed: int) -> tuple[Image.Image, Image.Image]:
    """Draws image `index`, RGB, and its mask, whose palette indices are class ids, from (seed, index) alone."""
    rng = np.random.default_rng([seed, index])
    width, height = (round(size * factor) for factor in ASPECTS[rng.integers(len(ASPECTS))])
    shape, mask = (height, width), Image.new("L", (width, height))
    canvas = _two_tone(rng, _blotches(rng, shape, rng.integers(4, 24)) > 0.5, rng.random())  # [H, W, 3]
    weights = np.arange(1, num_classes) ** -ZIPF
    objects = 1 + rng.choice(num_classes - 1, rng.integers(3, 6), p=weights / weights.sum())
    # The first images of a split show one class after another on top, so that small sets have even the rarest.
    val_before = (index + VAL_EVERY - 2) // VAL_EVERY
    rank = val_before if index % VAL_EVERY == 1 else index - val_before
    if rank < num_classes - 1:
        objects[-1] = rank + 1
    for class_id in [0] * rng.integers(2, 5) + objects.tolist():
        direction, texture, outline = _appearance(class_id or rng.integers(1, num_classes))
        radius, lean = min(shape) * rng.uniform(0.18, 0.33), rng.normal(0, 0.15)
        centre = rng.uniform(0.1, 0.9, 2) * (width, height)
        turn = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]])
        corners = [tuple(corner) for corner in OUTLINES[outline] @ turn * radius + centre]
        stencil = Image.new("1", (width, height))
        ImageDraw.Draw(stencil).polygon(corners, fill=1)
        inside = np.asarray(stencil)  # [H, W]
        if class_id == 0:
            # An outline filled with blotches is background.
            pattern, hue = _blotches(rng, shape, rng.integers(8, 24))[inside] > 0.5, rng.random()
        else:
            angle, period = DIRECTIONS[direction] + rng.normal(0, 0.12), size * rng.uniform(0.07, 0.11)
            y, x = (np.argwhere(inside) - centre[::-1]).T / period
            u, v = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
            pattern, hue = TEXTURES[texture](u, v), 0.618 * class_id + rng.normal(0, HUE_SPREAD)
            pen = ImageDraw.Draw(mask)
            pen.polygon(corners, fill=class_id)
            pen.line(corners + corners[:2], fill=VOID, width=max(3, size // 100), joint="curve")
        canvas[inside] = _two_tone(rng, pattern, hue)
    canvas *= 0.7 + 0.5 * _blotches(rng, shape, 3)[..., None]  # uneven light
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    noisy = np.asarray(image) + rng.normal(0, 8, canvas.shape)
    mask.putpalette(voc_colormap().tobytes())
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), mask


def generate(
    folder: str | Path,
    *,
    num_classes: int = NUM_CLASSES,
    num_images: int = NUM_IMAGES,
    size: int = SIZE,
    seed: int = SEED,
) -> Path:
    """Writes the data set unless the folder already holds it, and returns the folder.

    num_classes includes background, num_images both splits; size is in pixels. The folder appears complete or not at
    all, even if several processes start together. Raises InputError for arguments out of range, for a folder that
    holds anything else, and for a folder that cannot be written.
    """
    # So that val has an image for every kind of object.
    fewest = VAL_EVERY * (num_classes - 2) + 2
    if not 2 <= num_classes <= MAX_CLASSES:
        raise InputError(f"--classes {num_classes}: give 2 to {MAX_CLASSES}, including background")
    if num_images < fewest:
        raise InputError(f"--images {num_images}: {num_classes} classes in both splits need {fewest} or more")
    if size < MIN_SIZE:
        raise InputError(f"--size {size}: give {MIN_SIZE} pixels or more")
    if seed < 0:
        raise InputError(f"--seed {seed}: give 0 or more")
    folder = Path(folder)
    arguments = {"num_classes": num_classes, "size": size, "seed": seed, "num_images": num_images, "recipe": RECIPE}
    # Resolved, it has a name and a parent even if it is "." or a link.
    target = folder.resolve()
    try:
        if _is_complete(target, arguments):
            return folder
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, because a rename is atomic only within one file system. One level down, because the
        # temporary folder itself is closed to other users.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staging:
            draft = Path(staging) / target.name
            _write(draft, arguments)
            try:
                draft.rename(target)
            except OSError:
                # If it is complete, another process has written the same bytes.
                if not _is_complete(target, arguments):
                    raise
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder


def _write(folder: Path, arguments: dict[str, int]) -> None:
    lists, num_classes = folder / "ImageSets" / "Segmentation", arguments["num_classes"]
    for path in (folder / "JPEGImages", folder / "SegmentationClass", lists):
        path.mkdir(parents=True)
    indices = range(arguments["num_images"])
    for index in tqdm(indices, desc="drawing shapes", unit="image", disable=None):
        image, mask = draw(index, num_classes=num_classes, size=arguments["size"], seed=arguments["seed"])
        image.save(folder / "JPEGImages" / f"{index:06d}.jpg", quality=90)
        mask.save(folder / "SegmentationClass" / f"{index:06d}.png")
    val = indices[1::VAL_EVERY]
    train = [index for index in indices if index not in val]
    for split, ids in {"train": train, "val": val, "trainval": indices}.items():
        (lists / f"{split}.txt").write_text("".join(f"{index:06d}\n" for index in ids))
    (folder / "class_names.txt").write_text("\n".join(class_names(num_classes)) + "\n")
    (folder / RECORD).write_text(json.dumps(arguments, indent=1) + "\n")


def _is_complete(folder: Path, arguments: dict[str, int]) -> bool:
    """Whether the folder holds this set; False if it is missing or empty. Raises InputError for other content."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = dict(json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{folder}: has no readable {RECORD}, so it was not generated; choose another") from None
    differing = [
        f"{key} {found.get(key)}, not {value}" for key, value in arguments.items() if found.get(key) != value
    ]
    if differing:
        raise InputError(f"{folder}: was generated with {'; '.join(differing)}; choose another folder or delete it")
    return True


@friendly_errors
def main(argv: list[str] | None = None) -> None:
    """Runs the command line above."""
    parser = Parser(prog="python -m datasets.shapes", description="Generate a data set in VOC layout.")
    add = parser.add_argument
    add("--out", required=True, metavar="FOLDER", help="folder to write; an existing set is kept")
    add("--classes", type=int, default=NUM_CLASSES, help=f"2 to {MAX_CLASSES}, including background")
    add("--images", type=int, default=NUM_IMAGES, help="train and val together; a fifth is val")
    add("--size", type=int, default=SIZE, help="pixels; sides are 0.75 to 1.25 times this")
    add("--seed", type=int, default=SEED, help="another seed draws other images")
    args = parser.parse_args(argv)
    generate(args.out, num_classes=args.classes, num_images=args.images, size=args.size, seed=args.seed)
    num_val = len(range(args.images)[1::VAL_EVERY])
    print(
        f"{args.out}: {args.images} images ({args.images - num_val} train, {num_val} val), "
        f"{args.classes} classes including background"
    )


if __name__ == "__main__":
    main()
