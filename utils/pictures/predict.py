"""Label maps of one's own pictures: a model rebuilt from its checkpoint, any picture format, any size."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.Image import Transpose
from tqdm import tqdm

from datasets.files import FULL_SCALE, UNREADABLE, is_file, is_folder, read_image
from network import build_model
from network._deeplab import DeepLab
from network.fold import folded
from utils.checkpoint import load_checkpoint, load_model_state
from utils.engine import autocast, evaluating, normalize, predict
from utils.errors import InputError
from utils.files import replacing
from utils.pictures.plotting import overlay
from utils.run import write_csv

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
TURNS = {  # by EXIF orientation; 1 is upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# Pixels a side. DeepLabV3+ ResNet-50 (21 classes) takes 0.25 GB for such a tile in bfloat16 and 0.5 GB in float32
# beside its weights, four times that for twice the side; training crops are a quarter of its area.
TILE = 1024
MIN_TILE = 64
BAND = 256  # rows that are drawn at a time
GRID = 16  # the largest output stride: tiles that begin on its multiples see the feature grid of the whole picture


class TrainedModel(NamedTuple):
    model: DeepLab  # in evaluation mode, on its device
    class_names: list[str]
    palette: np.ndarray  # [256, 3] uint8 RGB
    options: dict  # of the training


def load_model(path: str | Path, device: torch.device) -> TrainedModel:
    """A model from a checkpoint of main.py and nothing else: no data set, no download.

    Raises InputError for a file that is missing, damaged or of another kind.
    """
    checkpoint = load_checkpoint(path)
    return build_trained(checkpoint, path, device, output_stride=checkpoint["options"]["output_stride"])


def build_trained(checkpoint: dict, path: str | Path, device: torch.device, *, output_stride: int) -> TrainedModel:
    """As `load_model`, of a checkpoint that is read already; `path` is for messages."""
    options, class_names = checkpoint["options"], checkpoint["class_names"]
    model = build_model(options["model"], num_classes=len(class_names), output_stride=output_stride)
    load_model_state(model, checkpoint, str(path))
    model = model.to(device, memory_format=torch.channels_last).eval()
    model = folded(model) if device.type == "cpu" else model  # as in `engine.evaluate`
    return TrainedModel(model, class_names, np.array(checkpoint["palette"], np.uint8), options)


def list_pictures(source: str | Path) -> list[Path]:
    """A file itself, whatever its suffix; of a folder the pictures that lie in it, by name, without hidden ones.

    Raises InputError for a path that does not exist and for a folder without pictures.
    """
    source = Path(source)
    if is_file(source):
        return [source]
    if not is_folder(source):
        raise InputError(f"--input {source}: there is no such file or folder")
    paths = [path for path in source.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    paths = sorted(path for path in paths if not path.name.startswith("."))
    if not paths:
        raise InputError(f"--input {source}: no picture lies in it ({' '.join(sorted(SUFFIXES))})")
    return paths


def read_any(path: Path) -> torch.Tensor:
    """A picture of any format that Pillow reads as uint8 RGB `[3, H, W]`; of several frames the first.

    It is turned upright as its EXIF orientation says, unlike in training, where a mask must fit the pixels as they
    are stored. Transparent parts lie on white, as viewers show them (training takes the colours underneath).
    Greys of more than 8 bits are scaled as `datasets.files.read_image` says. Colour profiles are not applied.
    Raises InputError for a file that cannot be read, and for greys below 0 or above full scale, naming it.
    """
    return read_image(path, prepare=lambda picture: _on_white(_turn_upright(picture)))


def _turn_upright(picture: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose writes the EXIF data anew, which fails for what some cameras put there.
    picture.load()  # turns a TIFF by itself
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:
        return picture  # broken EXIF data, as viewers have it too
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode[0] in FULL_SCALE or not picture.has_transparency_data:
        return picture  # deep greys: converted here they would be clipped
    picture, white = picture.convert("RGBA"), Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture)
    return white


def predict_picture(
    model: DeepLab,
    image: torch.Tensor,
    *,
    amp: torch.dtype | None = None,
    tile: int = TILE,
    overlap: int | None = None,
) -> torch.Tensor:
    """Class ids, uint8 `[H, W]` on the CPU, of uint8 RGB `[3, H, W]` on any device.

    Up to `tile` pixels a side the picture goes through the model in one piece, exactly as in `engine.predict`.
    A larger one goes in tiles that share at least `overlap` pixels (None: an eighth of the tile) with the next;
    there the logits fade into each other, weighted by the squared distance to the tile's edge, where zero padding
    spoils them. Image pooling (1706.05587, section 3.3) takes its mean over the tile alone: that, not the seams, is
    what tiles differ in from one piece.
    The logits that are kept at a time, float32 `[C, tile, W]` (or H, where that is less), do not grow with the
    longer side: 0.7 GB for 21 classes and 8,000 x 8,000 pixels.
    Raises InputError for a tile under 64 and for an overlap over half of it.
    """
    overlap = tile // 8 if overlap is None else overlap
    if tile < MIN_TILE:
        raise InputError(f"--tile {tile}: give {MIN_TILE} pixels or more")
    if not 0 <= overlap <= tile // 2:
        raise InputError(f"--overlap {overlap}: give 0 to {tile // 2}, half of --tile {tile}")
    with evaluating(model):
        height, width = image.shape[-2:]
        if max(height, width) <= tile:
            return predict(model, image[None].to(model.device), amp)[0].cpu()  # [H, W]
        if width <= height:
            return _predict_tiles(model, image, amp=amp, tile=tile, overlap=overlap)
        ids = _predict_tiles(model, image.mT, amp=amp, tile=tile, overlap=overlap, on_its_side=True)  # [W, H]
        return ids.mT.contiguous()  # [H, W]


@torch.inference_mode()
def _predict_tiles(
    model: DeepLab,
    image: torch.Tensor,
    *,
    amp: torch.dtype | None,
    tile: int,
    overlap: int,
    on_its_side: bool = False,
) -> torch.Tensor:
    """Class ids `[H, W]` of `[3, H, W]`, tile by tile, a band from left to right after the other; of a picture
    on its side the model sees each tile upright."""
    _, height, width = image.shape
    rows, columns = spans(height, tile, overlap), spans(width, tile, overlap)
    next_tops = [*(top for top, _ in rows[1:]), height]
    result, band = torch.empty(height, width, dtype=torch.uint8), None
    for (top, bottom), next_top in zip(rows, next_tops, strict=True):
        for left, right in columns:
            piece = image[None, :, top:bottom, left:right].to(model.device)  # [1, 3, h, w]
            with autocast(piece.device, amp):
                logits = model(normalize(piece.mT if on_its_side else piece))[0]  # [C, h, w]
            logits = logits.mT if on_its_side else logits
            if band is None:
                band = logits.new_zeros(len(logits), bottom - top, width)  # [C, tile, W]
            down, across = (_weights(*s, device=piece.device) for s in ((top, bottom, height), (left, right, width)))
            band[:, : bottom - top, left:right].addcmul_(logits, down[:, None] * across)
        done = next_top - top  # rows that no tile further down reaches; the highest sum needs no division
        result[top:next_top] = band[:, :done].max(dim=0).indices.to(torch.uint8)
        rest = band[:, done : bottom - top].clone()
        band.zero_()
        band[:, : rest.shape[1]] = rest
    return result


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, stop) of as few tiles as cover 0..size, and no larger than they need be: each begins on the grid and
    shares at least `overlap` pixels with the next; all are of one size, on the grid too, the last up to 15 pixels
    less."""
    if size <= tile:
        return [(0, size)]
    tile -= tile % GRID
    while tile - GRID >= MIN_TILE and _steps(size, tile - GRID, overlap) == _steps(size, tile, overlap):
        tile -= GRID
    last, steps = -(-(size - tile) // GRID), _steps(size, tile, overlap)
    starts = [last * i // steps * GRID for i in range(steps + 1)]
    return [(start, min(start + tile, size)) for start in starts]


def _steps(size: int, tile: int, overlap: int) -> int:
    """How many tiles follow the first, all beginning on the grid."""
    last = -(-(size - tile) // GRID)  # the last start; like the steps to it in units of the grid
    step = (tile - overlap) // GRID
    return -(-last // step) if step else size


def _weights(start: int, stop: int, size: int, *, device: torch.device) -> torch.Tensor:
    """Of a tile's pixels along one side, float32 `[stop - start]`, above 0: the square of the distance to the nearer
    edge, the picture's own edges apart, for beyond them there is no other tile to take over."""
    x = torch.arange(start, stop, dtype=torch.float32, device=device) + 0.5
    weights = torch.full_like(x, stop - start)
    if start > 0:
        weights = torch.minimum(weights, x - start)
    if stop < size:
        weights = torch.minimum(weights, stop - x)
    return (weights / (stop - start)).square()


def predict_files(
    model: DeepLab,
    paths: Sequence[Path],
    out: str | Path,
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    amp: torch.dtype | None = None,
    tile: int = TILE,
    overlap: int | None = None,
) -> list[str]:
    """Predicts pictures one by one; returns a line per file that cannot be read, naming it.

    Writes `<out>/masks/<name>.png` (class ids in the palette), `<out>/overlays/<name>.jpg` and, at the end,
    `<out>/shares.csv` (per picture the share of each class in its pixels), each file whole or not at all; what
    an earlier call left under these names is replaced. A name is the picture's without its suffix, with it where
    two would be alike. `tile` and `overlap` are those of `predict_picture`.
    Raises InputError if no file can be read, if `out` cannot be written, or if a picture would be overwritten.
    """
    out, names = Path(out), output_names(paths)
    masks = [out / "masks" / f"{name}.png" for name in names]
    overlays = [out / "overlays" / f"{name}.jpg" for name in names]
    for target in {path.resolve() for path in paths} & {path.resolve() for path in [*masks, *overlays]}:
        raise InputError(f"{target}: is to be read, and would be overwritten; give another --out")

    shares, unreadable = [], []
    bar = tqdm(paths, desc="predict", unit="picture", dynamic_ncols=True, disable=None)
    for path, mask, drawing in zip(bar, masks, overlays, strict=True):
        try:
            image = read_any(path)
        except InputError as error:
            unreadable.append(str(error))
            continue
        ids = predict_picture(model, image, amp=amp, tile=tile, overlap=overlap)  # [H, W]
        picture = Image.fromarray(ids.numpy())
        picture.putpalette(palette.tobytes())
        _save(picture, mask, "PNG")
        _save(_overlay(image, ids, palette), drawing, "JPEG")
        counts = torch.bincount(ids.flatten(), minlength=len(class_names))
        names = (name.encode(errors="replace").decode() for name in (path.name, f"masks/{mask.name}"))
        shares.append([*names, *(f"{share:.6f}" for share in (counts / ids.numel()).tolist())])
    if not shares:
        raise InputError(f"none of the {len(paths)} pictures can be read; of the first: {unreadable[0]}")
    write_csv(out / "shares.csv", ["picture", "mask", *class_names], shares)
    return unreadable


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each picture's files, all different even where upper and lower case are the same."""
    stems, names, taken = Counter(path.stem.lower() for path in paths), [], set()
    for path in paths:
        wish = path.stem if stems[path.stem.lower()] == 1 else path.name
        name = next(name for name in chain([wish], (f"{wish}-{i}" for i in count(2))) if name.lower() not in taken)
        names.append(name)
        taken.add(name.lower())
    return names


def _overlay(image: torch.Tensor, ids: torch.Tensor, palette: np.ndarray) -> Image.Image:
    """`plotting.overlay` by bands, for its intermediate results take fifty bytes a pixel."""
    height, width = ids.shape
    drawing = Image.new("RGB", (width, height))
    for top in range(0, height, BAND):
        drawing.paste(overlay(image[:, top : top + BAND], ids[top : top + BAND], palette), (0, top))
    return drawing


def _save(picture: Image.Image, path: Path, kind: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            picture.save(temporary, format=kind)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); give another --out") from None
