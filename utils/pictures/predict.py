"""Predicts label maps for images of any size and any format that Pillow reads, and writes files that show them."""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets.files import VOID, is_file, is_folder, read_image, to_rgb
from network._deeplab import DeepLab
from utils.engine import autocast, evaluating, predict, predict_with_confidence
from utils.errors import InputError
from utils.files import make_folder, replacing, write_csv
from utils.pictures.plotting import save_prediction
from utils.weights.load import TrainedModel

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
NOT_COUNTED = {"thumbs.db", "desktop.ini"}  # Windows puts them into folders, as others put hidden files
# Side in pixels. Besides its weights DeepLabV3+ ResNet-50 (21 classes) takes 0.25 GB for such a tile in bfloat16 and
# 0.5 GB in float32. Twice the side takes four times that; training crops are a quarter of its area.
TILE = 1024
MIN_TILE = 64
GRID = 16  # the largest output stride: tiles that start on its multiples see the feature grid of the whole image


def list_images(source: str | Path, out: str | Path | None = None) -> tuple[list[Path], int]:
    """Lists the images in a folder and its sub-folders by name, and counts the other files there.

    Hidden files and folders do not count, nor does what `predict_files` has written to `out`, if that lies inside.
    If `source` is a file, it is the one image, whatever its suffix.
    Raises InputError for a path that does not exist, a folder that cannot be read, and one without images.
    """
    source = Path(source)
    if is_file(source):
        return [source], 0
    if not is_folder(source):
        raise InputError(f"--input {source}: no such file or folder; check the path")
    names = ("", "masks", "overlays", "confidence", "shares.csv")
    own = {os.path.realpath(Path(out, name)) for name in names} if out else set()
    images, others, seen = [], 0, {os.path.realpath(source)}
    for folder, folders, files in os.walk(source, onerror=_refuse, followlinks=True):
        for name in sorted(folders):
            # A link may lead back to where the walk has been.
            real = os.path.realpath(Path(folder, name))
            if name.startswith(".") or real in seen | own:
                folders.remove(name)
            else:
                seen.add(real)
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES and is_file(path):
                images.append(path)
            elif path.name.lower() not in NOT_COUNTED and os.path.realpath(path) not in own:
                others += 1
    if not images:
        raise InputError(f"--input {source}: has no images ({' '.join(sorted(SUFFIXES))}); give another folder")
    return sorted(images), others


def _refuse(error: OSError) -> None:
    raise InputError(f"--input {error.filename}: cannot be read ({error.strerror}); change its permissions") from None


def predict_image(
    model: DeepLab,
    image: torch.Tensor,
    *,
    amp: torch.dtype | None = None,
    tile: int = TILE,
    overlap: int | None = None,
) -> torch.Tensor:
    """Predicts class ids, uint8 `[H, W]` on the CPU, for uint8 RGB `[3, H, W]` on any device.

    An image of up to `tile` pixels per side passes through the model in one piece, exactly as in `engine.predict`. A
    larger one passes in tiles, and neighbouring tiles share at least `overlap` pixels (None: an eighth of the tile).
    There the logits fade into each other, weighted by the squared distance to the tile's edge, where zero padding
    distorts them. Image pooling (1706.05587, section 3.3) averages over the tile alone. That, not the seams, makes
    the difference from one piece.
    The logits kept at a time, float32 `[C, tile, W]` (or H, if that is less), do not grow with the longer side: 0.7
    GB for 21 classes and 8,000 x 8,000 pixels. Raises InputError for a tile or an overlap that cannot be used.
    """
    return _predict(model, image, amp=amp, tile=tile, overlap=overlap, with_confidence=False)[0]


def predict_image_with_confidence(
    model: DeepLab,
    image: torch.Tensor,
    *,
    amp: torch.dtype | None = None,
    tile: int = TILE,
    overlap: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicts class ids like `predict_image`, and the probability of each, float32 `[H, W]` in 0..1 on the CPU.

    In tiles it is the softmax of the weighted mean of their logits.
    """
    return _predict(model, image, amp=amp, tile=tile, overlap=overlap, with_confidence=True)


def _predict(
    model: DeepLab,
    image: torch.Tensor,
    *,
    amp: torch.dtype | None,
    tile: int,
    overlap: int | None,
    with_confidence: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Predicts class ids `[H, W]` and, if asked for, their probabilities `[H, W]`."""
    if tile < MIN_TILE:
        raise InputError(f"--tile {tile}: too small; give {MIN_TILE} or more")
    overlap = tile // 8 if overlap is None else overlap
    if not 0 <= overlap <= tile // 2:
        raise InputError(f"--overlap {overlap}: out of range; give 0 to {tile // 2}, half of --tile {tile}")
    with evaluating(model):
        height, width = image.shape[-2:]
        on_its_side = width > height
        if max(height, width) > tile:
            ids, confidence = _predict_tiles(
                model,
                image.mT if on_its_side else image,
                amp=amp,
                tile=tile,
                overlap=overlap,
                on_its_side=on_its_side,
                with_confidence=with_confidence,
            )
            if on_its_side:
                ids = ids.mT.contiguous()  # [H, W]
                confidence = confidence.mT.contiguous() if with_confidence else None  # [H, W]
            return ids, confidence
        images = image[None].to(model.device)  # [1, 3, H, W]
        if with_confidence:
            ids, confidence = predict_with_confidence(model, images, amp)
            return ids[0].cpu(), confidence[0].cpu()  # [H, W] each
        return predict(model, images, amp)[0].cpu(), None  # [H, W]


def segment(trained: TrainedModel, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """Predicts class ids, uint8 `[H, W]`, of one image; `trained.class_names[id]` is the name of a class.

    image: a file, a Pillow image, or an array of uint8: RGB `[H, W, 3]` or grey `[H, W]`. Files and Pillow images are
    turned upright. Raises InputError for a file that cannot be read and for any other array.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise InputError(
                f"image: an array of {image.dtype} {list(image.shape)}; give uint8 [H, W, 3] in RGB, or [H, W]"
            )
        image = Image.fromarray(image)
    pixels = to_rgb(image, where="image") if isinstance(image, Image.Image) else read_image(Path(image))
    return predict_image(trained.model, pixels).numpy()


@torch.inference_mode()
def _predict_tiles(
    model: DeepLab,
    image: torch.Tensor,
    *,
    amp: torch.dtype | None,
    tile: int,
    overlap: int,
    on_its_side: bool,
    with_confidence: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Predicts like `_predict` for `[3, H, W]`, tile by tile, in bands from left to right.

    If the image lies on its side, the model still sees each tile upright.
    """
    _, height, width = image.shape
    rows, columns = spans(height, tile, overlap), spans(width, tile, overlap)
    next_tops = [*(top for top, _ in rows[1:]), height]
    ids, band = torch.empty(height, width, dtype=torch.uint8), None
    confidence = torch.empty(height, width) if with_confidence else None
    # Tiles form a grid, so the weights of all that cover a pixel add up to a product of two sums.
    total_down, total_across = (
        _total_weights(tiles, size, device=model.device) for tiles, size in ((rows, height), (columns, width))
    )
    for (top, bottom), next_top in zip(rows, next_tops, strict=True):
        for left, right in columns:
            piece = image[None, :, top:bottom, left:right].to(model.device)  # [1, 3, h, w]
            with autocast(piece.device, amp):
                logits = model(piece.mT if on_its_side else piece)[0]  # [C, h, w]
            logits = logits.mT if on_its_side else logits
            if band is None:
                band = logits.new_zeros(len(logits), bottom - top, width)  # [C, tile, W]
            down, across = (_weights(*s, device=piece.device) for s in ((top, bottom, height), (left, right, width)))
            band[:, : bottom - top, left:right].addcmul_(logits, down[:, None] * across)
        # Rows that no tile further down reaches are done. The highest sum needs no division.
        done = next_top - top
        ids[top:next_top] = band[:, :done].max(dim=0).indices.to(torch.uint8)
        if confidence is not None:
            logits = band[:, :done].div_(total_down[top:next_top, None] * total_across)  # [C, done, W]
            confidence[top:next_top] = logits.softmax(dim=0).amax(dim=0)
        rest = band[:, done : bottom - top].clone()
        band.zero_()
        band[:, : rest.shape[1]] = rest
    return ids, confidence


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Returns (start, stop) of the fewest tiles that cover 0..size, no larger than necessary.

    Each starts on the grid and shares at least `overlap` pixels with the next. All have one size, also on the grid;
    the last may have up to 15 pixels less.
    """
    if size <= tile:
        return [(0, size)]
    tile -= tile % GRID
    while tile - GRID >= MIN_TILE and _steps(size, tile - GRID, overlap) == _steps(size, tile, overlap):
        tile -= GRID
    last, steps = -(-(size - tile) // GRID), _steps(size, tile, overlap)
    starts = [last * i // steps * GRID for i in range(steps + 1)]
    return [(start, min(start + tile, size)) for start in starts]


def _steps(size: int, tile: int, overlap: int) -> int:
    """Counts the tiles after the first, all starting on the grid."""
    last = -(-(size - tile) // GRID)  # the last start; like the steps to it, in units of the grid
    step = (tile - overlap) // GRID
    return -(-last // step) if step else size


def _weights(start: int, stop: int, size: int, *, device: torch.device) -> torch.Tensor:
    """Returns the weights of a tile's pixels along one side, float32 `[stop - start]`, above 0.

    They are the squared distance to the nearer edge. The edges of the image do not count, because no other tile takes
    over beyond them.
    """
    x = torch.arange(start, stop, dtype=torch.float32, device=device) + 0.5
    weights = torch.full_like(x, stop - start)
    if start > 0:
        weights = torch.minimum(weights, x - start)
    if stop < size:
        weights = torch.minimum(weights, stop - x)
    return (weights / (stop - start)).square()


def _total_weights(tiles: Sequence[tuple[int, int]], size: int, *, device: torch.device) -> torch.Tensor:
    """Sums the weights of all tiles at each pixel along one side, float32 `[size]`."""
    total = torch.zeros(size, device=device)
    for start, stop in tiles:
        total[start:stop] += _weights(start, stop, size, device=device)
    return total


def predict_files(
    model: DeepLab,
    paths: Sequence[Path],
    out: str | Path,
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    root: str | Path | None = None,
    amp: torch.dtype | None = None,
    tile: int = TILE,
    overlap: int | None = None,
    confidence: bool = False,
    min_confidence: float = 0.0,
) -> list[str]:
    """Predicts images one by one; returns a line for each file that cannot be read, naming it.

    Writes `<out>/masks/<name>.png` (class ids in the palette), `<out>/overlays/<name>.jpg` and, at the end,
    `<out>/shares.csv` (the share of each class, and of void, in the pixels of each image). With `confidence` also
    `<out>/confidence/<name>.png`, 8-bit grey: the probability of each pixel's class, 255 for 1. Pixels whose
    probability is below `min_confidence` become void. Each file is replaced as a whole. A name is the image's without
    its suffix, or with it if two names would be equal. It begins with the folders between `root` and the image, if
    `root` is given. `tile` and `overlap` are those of `predict_image`.
    Raises InputError if no file can be read, if `out` cannot be written, or if an image would be overwritten.
    """
    out = Path(out)
    inputs = [path.relative_to(root) if root else Path(path.name) for path in paths]
    names = output_names(inputs)
    masks = [out / "masks" / f"{name}.png" for name in names]
    overlays = [out / "overlays" / f"{name}.jpg" for name in names]
    greys = [out / "confidence" / f"{name}.png" for name in names]
    targets = [*masks, *overlays, *(greys if confidence else [])]
    for target in {path.resolve() for path in paths} & {path.resolve() for path in targets}:
        raise InputError(f"{target}: is an input and would be overwritten; give another --out")

    shares, unreadable = [], []
    bar = tqdm(paths, desc="predict", unit="image", dynamic_ncols=True, disable=None)
    for path, picture, mask, drawing, grey in zip(bar, inputs, masks, overlays, greys, strict=True):
        try:
            image = read_image(path)
        except InputError as error:
            unreadable.append(str(error))
            continue
        if confidence or min_confidence > 0:
            ids, probabilities = predict_image_with_confidence(model, image, amp=amp, tile=tile, overlap=overlap)
            ids = ids.masked_fill(probabilities < min_confidence, VOID)  # [H, W]
        else:
            ids = predict_image(model, image, amp=amp, tile=tile, overlap=overlap)  # [H, W]
        if confidence:
            save_confidence(probabilities, grey)
        save_prediction(image, ids, palette, mask=mask, drawing=drawing)
        counts = torch.bincount(ids.flatten(), minlength=VOID + 1)[[*range(len(class_names)), VOID]]
        files = (path.as_posix().encode(errors="replace").decode() for path in (picture, mask.relative_to(out)))
        shares.append([*files, *(f"{share:.6f}" for share in (counts / ids.numel()).tolist())])
    if not shares:
        raise InputError(f"--input: none of the {len(paths)} images can be read; the first problem: {unreadable[0]}")
    write_csv(out / "shares.csv", ["picture", "mask", *class_names, "void"], shares)
    return unreadable


def save_confidence(confidence: torch.Tensor, path: Path) -> None:
    """Writes probabilities `[H, W]` in 0..1 as an 8-bit grey PNG: 255 is 1."""
    make_folder(path.parent)
    with replacing(path) as temporary:
        Image.fromarray((confidence * 255).round().byte().numpy()).save(temporary, format="PNG")


def output_names(paths: Sequence[Path]) -> list[str]:
    """Returns a name for each image's files; all differ even where upper and lower case are the same.

    paths: relative ones; a name keeps their folders.
    """
    stems, names, taken = [(path.parent / path.stem).as_posix() for path in paths], [], set()
    number = Counter(stem.lower() for stem in stems)
    for path, stem in zip(paths, stems, strict=True):
        wish = stem if number[stem.lower()] == 1 else path.as_posix()
        name = next(name for name in chain([wish], (f"{wish}-{i}" for i in count(2))) if name.lower() not in taken)
        names.append(name)
        taken.add(name.lower())
    return names
