"""A generated data set in VOC layout: it needs no download, and a model learns it in minutes.

    python -m datasets.shapes --out datasets/data/shapes               # the data of `main.py --dataset shapes`
    python -m datasets.shapes --out datasets/data/many --classes 151 --images 1000 --size 256
    python main.py --dataset folder --data_root datasets/data/many     # trains on any other that is written

A class is an outline filled with a texture of its own (kind and direction), in hues that only tend to its own.
The same outlines with blotches in them are background, which has every hue: neither colour nor outline alone
gives a class away. The higher its id, the fewer objects a class has; each is in both splits. As in VOC, void
borders run around the objects. The same arguments and library versions give the same bytes.
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
from utils.cli import Parser, exit_codes
from utils.errors import InputError

# The data of `--dataset shapes`: background and 6 kinds of objects, drawn in seconds.
NUM_CLASSES, NUM_IMAGES, SIZE, SEED = 7, 500, 128, 1
MAX_CLASSES, MIN_SIZE = 151, 64  # below 64 pixels the void border leaves nothing of a small star
VAL_EVERY = 5  # picture i is in val where i % 5 == 1, however many pictures there are
RECORD = "shapes.json"  # holds the arguments; a folder that has it is complete
RECIPE = 1  # raise it when what is drawn changes, so that a set drawn before is not taken for the new one

ASPECTS = ((1, 1), (1.25, 1), (1, 1.25), (1, 0.75))  # width and height as multiples of the size
ZIPF = 0.5  # class k is drawn in proportion to k ** -ZIPF
HUE_SPREAD = 0.08  # standard deviation around a class's own hue; the whole circle is 1


def _polygon(corners: int, *radii: float) -> np.ndarray:
    turn = np.arange(corners) * 2 * np.pi / corners
    return np.resize(radii, corners)[:, None] * np.stack([np.sin(turn), -np.cos(turn)], 1)  # [corners, 2]


# Class k takes entry k - 1 of each table, modulo the table's length. 8, 7 and 3 have no common divisor, so the
# first 168 classes all differ (Chinese remainder theorem), and the first 7 differ in texture.
OUTLINES = {  # (x, y) of the corners, y downwards, about the unit circle
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
DIRECTIONS = {"level": 0, "upright": np.pi / 2, "slanted": np.pi / 4}  # one slant: a flip makes it the other


def _appearance(class_id: int) -> list[str]:
    """Direction, texture and outline of class 1, 2, ..."""
    return [list(table)[(class_id - 1) % len(table)] for table in (DIRECTIONS, TEXTURES, OUTLINES)]


def class_names(num_classes: int) -> list[str]:
    return ["background"] + [" ".join(_appearance(class_id)) for class_id in range(1, num_classes)]


def _blotches(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise of about 0..1, float32 `[H, W]`, with `cells` independent values along each side."""
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC))


def _two_tone(rng: np.random.Generator, pattern: np.ndarray, hue: float) -> np.ndarray:
    """A dark and a light tone of about that hue, mixed by the pattern 0..1 `[...]`: RGB 0..255 `[..., 3]`."""
    hues = (hue + rng.normal(0, 0.06, 2)) % 1
    dark = np.array(colorsys.hsv_to_rgb(hues[0], rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.45)))
    light = np.array(colorsys.hsv_to_rgb(hues[1], rng.uniform(0.2, 0.8), rng.uniform(0.65, 1)))
    return 255 * (dark + (light - dark) * pattern[..., None])


def draw(index: int, *, num_classes: int, size: int, seed: int) -> tuple[Image.Image, Image.Image]:
    """Picture `index`, RGB, and its mask, palette indices = class ids. It is drawn from (seed, index) alone."""
    rng = np.random.default_rng([seed, index])
    width, height = (round(size * factor) for factor in ASPECTS[rng.integers(len(ASPECTS))])
    shape, mask = (height, width), Image.new("L", (width, height))
    canvas = _two_tone(rng, _blotches(rng, shape, rng.integers(4, 24)) > 0.5, rng.random())  # [H, W, 3]
    weights = np.arange(1, num_classes) ** -ZIPF
    objects = 1 + rng.choice(num_classes - 1, rng.integers(3, 6), p=weights / weights.sum())
    # The first pictures of a split show one class after the other on top: small sets have the rarest too.
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
        if class_id == 0:  # an outline without a texture is background
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
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    noisy = np.asarray(picture) + rng.normal(0, 8, canvas.shape)
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
    """Writes the data set unless the folder holds it already; returns the folder.

    num_classes counts background, num_images both splits; size is in pixels. The folder appears complete or
    not at all, also where several processes start together. Raises InputError for arguments out of range, for
    a folder that holds anything else, and for one that cannot be written.
    """
    fewest = VAL_EVERY * (num_classes - 2) + 2  # as many pictures in val as there are kinds of objects
    if not 2 <= num_classes <= MAX_CLASSES:
        raise InputError(f"--classes {num_classes}: give 2 to {MAX_CLASSES}, background counted")
    if num_images < fewest:
        raise InputError(f"--images {num_images}: {num_classes} classes in both splits take {fewest} or more")
    if size < MIN_SIZE:
        raise InputError(f"--size {size}: give {MIN_SIZE} pixels or more")
    if seed < 0:
        raise InputError(f"--seed {seed}: give 0 or more")
    folder, drawing = Path(folder), {"num_classes": num_classes, "size": size, "seed": seed}
    arguments = {**drawing, "num_images": num_images, "recipe": RECIPE}
    target = folder.resolve()  # has a name and a parent where the folder is "." or a link
    try:
        if _is_there(target, arguments):
            return folder
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, for a rename is atomic within one file system only; and one level down, for other
        # users cannot enter the temporary folder itself.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staging:
            draft = Path(staging) / target.name
            _write(draft, arguments, drawing)
            try:
                draft.rename(target)
            except OSError:
                if not _is_there(target, arguments):  # otherwise another process was first, with the same bytes
                    raise
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}); choose another folder") from None
    return folder


def _write(folder: Path, arguments: dict[str, int], drawing: dict[str, int]) -> None:
    lists = folder / "ImageSets" / "Segmentation"
    for path in (folder / "JPEGImages", folder / "SegmentationClass", lists):
        path.mkdir(parents=True)
    indices = range(arguments["num_images"])
    for index in tqdm(indices, desc="drawing shapes", unit="picture", disable=None):
        picture, mask = draw(index, **drawing)
        picture.save(folder / "JPEGImages" / f"{index:06d}.jpg", quality=90)
        mask.save(folder / "SegmentationClass" / f"{index:06d}.png")
    val = indices[1::VAL_EVERY]
    train = [index for index in indices if index not in val]
    for split, ids in {"train": train, "val": val, "trainval": indices}.items():
        (lists / f"{split}.txt").write_text("".join(f"{index:06d}\n" for index in ids))
    (folder / "class_names.txt").write_text("\n".join(class_names(drawing["num_classes"])) + "\n")
    (folder / RECORD).write_text(json.dumps(arguments, indent=1) + "\n")


def _is_there(folder: Path, arguments: dict[str, int]) -> bool:
    """Whether the folder holds this very set; False if it is missing or empty. InputError if it holds another."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = dict(json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{folder}: is no generated data set (no readable {RECORD}); choose another") from None
    differing = [
        f"{key} {found.get(key)}, not {arguments[key]}" for key in arguments if found.get(key) != arguments[key]
    ]
    if differing:
        raise InputError(f"{folder}: is there with {'; '.join(differing)}; choose another folder or delete it")
    return True


@exit_codes
def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    parser = Parser(prog="python -m datasets.shapes", description="Generate a data set in VOC layout.")
    add = parser.add_argument
    add("--out", required=True, metavar="FOLDER", help="where to write; a set that is there already is kept")
    add("--classes", type=int, default=NUM_CLASSES, help=f"2 to {MAX_CLASSES}, background counted")
    add("--images", type=int, default=NUM_IMAGES, help="train and val together; a fifth is val")
    add("--size", type=int, default=SIZE, help="pixels; sides are 0.75 to 1.25 times that")
    add("--seed", type=int, default=SEED, help="another seed draws other pictures")
    args = parser.parse_args(argv)
    generate(args.out, num_classes=args.classes, num_images=args.images, size=args.size, seed=args.seed)
    num_val = len(range(args.images)[1::VAL_EVERY])
    print(
        f"{args.out}: {args.images} images ({args.images - num_val} train, {num_val} val), "
        f"{args.classes} classes with background"
    )


if __name__ == "__main__":
    main()
