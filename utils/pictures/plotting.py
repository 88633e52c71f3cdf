"""Draws grids of images, legends, bar charts and curves, without a display."""

import contextlib
import logging
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from datasets.files import VOID
from datasets.stats import ClassStatistics
from datasets.voc import SegmentationDataset
from network._deeplab import DeepLab
from utils.engine import evaluating, predict_in_parts
from utils.errors import InputError
from utils.files import make_folder, replacing

if TYPE_CHECKING:
    from network.sam import Mask  # not at run time, so that curves do not need Segment Anything

matplotlib.rcParams["text.parse_math"] = False  # a "$" in a class name is a dollar sign
COLUMNS = 10  # samples per row
BAND = 256  # rows of an overlay drawn at a time
LINES = ("-", "--", "-.", ":")  # tell runs apart in print without colour
FONTS = (  # with Chinese, Japanese and Korean characters; those that have all three, or the most, come first
    *("Noto Sans CJK SC", "Noto Sans CJK TC", "Noto Sans CJK JP", "Noto Sans CJK KR"),
    *("Source Han Sans SC", "Source Han Sans CN", "Source Han Sans JP", "Source Han Sans KR", "Arial Unicode MS"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback"),
    *("Noto Sans SC", "Noto Sans TC", "Noto Sans JP", "Noto Sans KR"),
    *("Microsoft YaHei", "Microsoft JhengHei", "SimHei", "PingFang SC", "Heiti SC", "Hiragino Sans GB", "STHeiti"),
    *("Hiragino Sans", "Yu Gothic", "Meiryo", "MS Gothic", "IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic"),
    *("Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic", "NanumGothic", "Baekmuk Gulim", "UnDotum"),
    *("Unifont", "Unifont-JP"),
)
log = logging.getLogger("deeplab")


def new_figure(width: float, height: float) -> Figure:
    """Creates a figure that needs no display; the size is in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def require_png(path: Path) -> None:
    """Raises InputError for another suffix than .png."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path}: only PNG is supported; give a name that ends with .png")


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Writes a PNG, completely or not at all. Raises InputError for another suffix or if it cannot be written."""
    require_png(path)
    choose_fonts(figure)
    make_folder(path.parent)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def choose_fonts(figure: Figure) -> None:
    """Lets texts use installed fonts of `FONTS` for characters that the default font lacks.

    Characters that none of them has become "?", with one warning per process. Other figures do not change.
    """
    both = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    # Labels of ticks get their texts only when they are asked for, or drawn.
    labels = {axis: [label.get_text() for label in axis.get_ticklabels()] for axis in both}
    texts = figure.findobj(Text)
    lacking = {character for text in texts for character in text.get_text()} - {"\n"}
    lacking -= _characters(*matplotlib.rcParams["font.family"])
    if not lacking:
        return
    _find_new_fonts()
    fonts, installed = [], fontManager.get_font_names()
    for font in FONTS:
        if lacking and font in installed and lacking & (found := _characters(font)):
            fonts, lacking = [*fonts, font], lacking - found
    if lacking:
        _warn_of_missing_fonts()
    readable = str.maketrans(dict.fromkeys(lacking, "?"))
    for text in texts:
        text.set_fontfamily([*text.get_fontfamily(), *fonts])
        text.set_text(text.get_text().translate(readable))
    for axis, names in labels.items():
        # A label keeps its text only if the axis does not write it again when it is drawn.
        if not lacking.isdisjoint("".join(names)):
            axis.set_ticks(axis.get_majorticklocs(), [name.translate(readable) for name in names])


def _characters(*families: str) -> set[str]:
    """Returns the characters that fonts have."""
    files = (findfont(FontProperties(family=[family])) for family in families)
    return {chr(code) for file in files for code in get_font(file).get_charmap()}


@cache
def _find_new_fonts() -> None:
    """Looks for fonts that were installed since matplotlib made its list, which it keeps in a file."""
    known = {font.fname for font in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:
            # matplotlib cannot read every font.
            with contextlib.suppress(Exception):
                fontManager.addfont(path)


@cache
def _warn_of_missing_fonts() -> None:
    log.warning(
        'some names are drawn with "?", because no installed font has their characters; install one, such as '
        "Debian's fonts-noto-cjk (Chinese, Japanese, Korean) or fonts-unifont (other scripts)"
    )


def add_legend(figure: Figure, dataset: SegmentationDataset, class_ids: Sequence[int]) -> None:
    """Adds the colours and names of these classes, and of void, below the figure."""
    names = [*(dataset.class_names[class_id] for class_id in class_ids), "void"]
    colours = dataset.palette[[*class_ids, VOID]] / 255
    patches = [Patch(facecolor=c, edgecolor="0.4", label=n) for c, n in zip(colours, names, strict=True)]
    width, _ = figure.get_size_inches()
    widest = 0.09 * max(map(text_width, names)) + 0.6  # inches per name
    figure.legend(handles=patches, loc="outside lower center", ncols=max(1, int(width / widest)), frameon=False)


def text_width(text: str) -> int:
    """Returns a text's width in Latin letters: a Chinese, Japanese or Korean character is as wide as two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def show(axes: Axes, image: np.ndarray | None, *, title: str = "", label: str = "") -> None:
    """Shows an RGB image, uint8 `[H, W, 3]`, or None if it is missing, with a title above and a label below."""
    axes.set(xticks=[], yticks=[])
    # Wrapped, because run names can be long.
    axes.set_title("\n".join(textwrap.wrap(title, 30)), fontsize=9)
    axes.set_xlabel(label, fontsize=8)
    if image is None:
        axes.text(0.5, 0.5, "image\nmissing", ha="center", va="center", color="0.4", transform=axes.transAxes)
        axes.set_facecolor("0.93")
    else:
        axes.imshow(image, interpolation="nearest")


def hwc(image: torch.Tensor) -> np.ndarray:
    """Converts uint8 `[3, H, W]` to an array `[H, W, 3]`."""
    return image.permute(1, 2, 0).numpy()


def draw_samples(dataset: SegmentationDataset, indices: list[int], path: Path) -> None:
    """Draws each image above its annotation and id, ten per row, with a legend of the classes."""
    rows, masks = -(-len(indices) // COLUMNS), {index: dataset.mask(index) for index in indices}
    ratio = np.mean([mask.shape[0] / mask.shape[1] for mask in masks.values()])
    figure = new_figure(2 * min(COLUMNS, len(indices)), (2 * 1.93 * ratio + 0.3) * rows + 0.9)
    grid = figure.subplots(2 * rows, min(COLUMNS, len(indices)), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, index in enumerate(indices):
        row, column = divmod(place, COLUMNS)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        above.set_axis_on()
        below.set_axis_on()
        show(above, hwc(dataset.image(index)) if dataset.images[index].is_file() else None)
        show(below, dataset.decode_target(masks[index]), label=dataset.ids[index])
    if dataset.missing_images:
        missing = f"{len(dataset.missing_images)} of {len(dataset)} images are missing"
        figure.suptitle(f"{missing}; only their annotations are shown")
    add_legend(figure, dataset, range(dataset.num_classes))
    save(figure, path)


def draw_statistics(statistics: ClassStatistics, palette: np.ndarray, path: Path) -> None:
    """Draws each class's share of the labelled pixels (log scale) and number of images, most frequent first."""
    order = np.argsort(-statistics.pixels, kind="stable")
    names = [statistics.class_names[class_id] for class_id in order]
    figure = new_figure(12, 0.28 * len(names) + 1.6)
    shares, images = figure.subplots(1, 2, sharey=True)
    panels = [
        (shares, statistics.shares, "share of labelled pixels", "{:.2%}"),
        (images, statistics.images, "images", "{}"),
    ]
    for axes, values, title, form in panels:
        bars = axes.barh(names, values[order], color=palette[order] / 255, edgecolor="0.3")
        axes.bar_label(bars, [form.format(value) for value in values[order]], padding=3, fontsize=8)
        axes.set_title(title)
        axes.margins(y=0.01)
        axes.grid(axis="x", alpha=0.3)
    shares.set(xscale="log", title="share of labelled pixels (log scale)")
    present = statistics.shares[statistics.shares > 0]
    # The axis starts at a power of ten, without minor labels, which would overlap.
    shares.set_xlim(10 ** np.floor(np.log10(present.min())), 3 * present.max())
    shares.xaxis.set_minor_formatter(NullFormatter())
    images.set_xlim(0, 1.15 * max(1, statistics.images.max()))
    shares.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    images.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    shares.invert_yaxis()
    figure.suptitle(
        f"{len(statistics.ids)} images, {statistics.void_share:.1%} void, "
        f"imbalance {statistics.imbalance:,.0f} to 1 (most frequent to rarest class)"
    )
    save(figure, path)


def draw_grid(
    rows: list[list[tuple[np.ndarray | None, str]]],
    *,
    headings: list[str],
    labels: list[str],
    path: Path,
    legend: tuple[SegmentationDataset, Sequence[int]] | None = None,
) -> None:
    """Draws images in rows and columns, with a heading per column and a label per row.

    rows: `rows[i][j]` = (RGB uint8 `[H, W, 3]` or None, text below).
    legend: (data set, class ids).
    """
    ratio = np.mean([image.shape[0] / image.shape[1] for row in rows for image, _ in row if image is not None])
    figure = new_figure(3.2 * len(headings), (3.2 * ratio + 0.35) * len(rows) + 0.9)
    grid = figure.subplots(len(rows), len(headings), squeeze=False)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for axes, (image, text), heading in zip(grid[number], row, headings, strict=True):
            show(axes, image, title=heading if number == 0 else "", label=text)
        grid[number][0].set_ylabel(label, fontsize=9)
    if legend:
        add_legend(figure, *legend)
    save(figure, path)


def error_map(image: torch.Tensor, target: torch.Tensor, prediction: torch.Tensor) -> np.ndarray:
    """Returns the image in pale grey with wrong pixels in red, RGB uint8 `[H, W, 3]`; void is never wrong.

    image: uint8 `[3, H, W]`. target, prediction: class ids `[H, W]`.
    """
    grey = image.float().mean(dim=0, keepdim=True).expand(3, -1, -1) * 0.4 + 150  # [3, H, W]
    wrong = (prediction != target) & (target != VOID)
    red = torch.tensor([215.0, 25.0, 28.0]).view(3, 1, 1)
    return hwc(torch.where(wrong, red, grey).byte())


def draw_curves(histories: dict[str, list[dict[str, float]]], path: Path, *, stacked: bool = False) -> None:
    """Draws mIoU (best marked), both losses and learning rate over the iterations, a line per run.

    histories: maps run names to the rows of `history.csv`; older ones have no validation loss. stacked: one panel
    below the other, for a narrow column.
    """
    loss_title = "training loss (dots)\nvalidation cross-entropy (rings)"
    panels = [("mean_iou", "validation mIoU"), ("loss", loss_title), ("lr", "learning rate (head)")]
    if stacked:
        figure = new_figure(4.6, 4.4 + 0.3 * len(histories))
        all_axes = figure.subplots(3, 1, height_ratios=(3, 2, 1.2), sharex=True)
    else:
        figure = new_figure(13, 4.2 + 0.2 * len(histories))
        all_axes = figure.subplots(1, 3)
    for number, (name, rows) in enumerate(histories.items()):
        colour, style = f"C{number}", LINES[number % len(LINES)]
        best = max((row for row in rows if row["mean_iou"] == row["mean_iou"]), key=lambda row: row["mean_iou"])
        label = f"{name}: best {best['mean_iou']:.4f} at epoch {best['epoch']:.0f}, last {rows[-1]['mean_iou']:.4f}"
        label = textwrap.fill(label, 50) if stacked else label
        itrs = [row["itr"] for row in rows]
        for axes, (column, _) in zip(all_axes, panels, strict=True):
            values = [row[column] for row in rows]
            axes.plot(itrs, values, label=label, color=colour, linestyle=style, marker="o", markersize=3)
        # Beside the training loss: where only that one still falls, the model overfits.
        val_loss = [row.get("val_loss", math.nan) for row in rows]
        all_axes[1].plot(itrs, val_loss, color=colour, linestyle=style, marker="o", markersize=5, mfc="white")
        all_axes[0].plot(best["itr"], best["mean_iou"], marker="*", markersize=15, color=colour, mec="black")
        # More labels than two would overlap; the legend has all the numbers.
        if len(histories) <= 2:
            # A label at the left or right edge grows inwards.
            first, last = rows[0]["itr"] == best["itr"], rows[-1]["itr"] == best["itr"]
            all_axes[0].annotate(
                f"{best['mean_iou']:.4f}",
                xy=(best["itr"], best["mean_iou"]),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center" if first == last else "left" if first else "right",
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
            )
    for axes, (_, title) in zip(all_axes, panels, strict=True):
        axes.set_title(title, fontsize="medium" if stacked else "large")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
        axes.ticklabel_format(axis="y", useOffset=False)
    low, high = all_axes[0].get_ylim()
    # So small a range is noise; stretched to the full height it would look like a trend.
    if high - low < 0.02:
        all_axes[0].set_ylim((low + high) / 2 - 0.01, (low + high) / 2 + 0.01)
    all_axes[2].set_ylim(bottom=0)
    for axes in all_axes[-1:] if stacked else all_axes:
        axes.set_xlabel("iteration")
    figure.legend(handles=all_axes[0].get_lines()[::2], loc="outside lower center", frameon=False)
    save(figure, path, dpi=200 if stacked else 120)


def overlay(image: torch.Tensor, prediction: torch.Tensor, palette: np.ndarray) -> Image.Image:
    """Draws class ids `[H, W]` over an RGB image, uint8 `[3, H, W]`, at half opacity; black classes stay clear."""
    colours = torch.from_numpy(palette)[prediction.long()].permute(2, 0, 1)  # [3, H, W]
    shown = (colours > 0).any(dim=0)
    blended = torch.where(shown, (image.float() + colours.float()) / 2, image.float()).round().byte()
    return Image.fromarray(hwc(blended))


def prediction_strips(
    model: DeepLab, dataset: SegmentationDataset, num: int, amp: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Returns image | ground truth | prediction of the first `num` samples by id, each RGB uint8 `[3, H, 3 W]`."""
    strips = {}
    for index in range(min(num, len(dataset))):
        image, mask = dataset[index]
        with evaluating(model):
            prediction = predict_in_parts(model, image[None].to(model.device), amp)[0].cpu()  # [H, W]
        colours = [torch.from_numpy(dataset.decode_target(ids)).permute(2, 0, 1) for ids in (mask, prediction)]
        strips[dataset.ids[index]] = torch.cat([image, *colours], dim=2)  # [3, H, 3 W]
    return strips


def draw_masks(image: torch.Tensor, masks: "Sequence[Mask]") -> np.ndarray:
    """Draws masks over an RGB image, uint8 `[3, H, W]`; returns RGB uint8 `[H, W, 3]`.

    Each mask has its own colour, the same in every call, and an outline. Smaller masks are drawn on top.
    """
    drawing = hwc(image).copy()
    width = max(1, round(min(drawing.shape[:2]) / 150))  # pixels of outline
    rng = np.random.default_rng(1)
    order = sorted(range(len(masks)), key=lambda number: -masks[number].area)
    # Steps of the golden ratio keep any number of hues apart.
    hues = (rng.random() + np.arange(len(masks)) * 0.618034) % 1
    colours = (
        hsv_to_rgb(np.stack([hues, rng.uniform(0.65, 1, len(masks)), rng.uniform(0.75, 1, len(masks))], 1)) * 255
    )
    for rank, number in enumerate(order):
        mask = masks[number]
        inside, pixels = mask.pixels(), drawing[mask.window]  # a view
        pixels[inside] = (0.45 * pixels[inside] + 0.55 * colours[rank]).astype(np.uint8)
        edge = torch.from_numpy(np.pad(~inside, width, constant_values=True))[None, None].float()
        near = F.max_pool2d(edge, 2 * width + 1, stride=1)[0, 0].bool().numpy()
        pixels[inside & near] = 255
    return drawing


class PredictionWriter:
    """Saves the predictions for `--save_val_results`, as the `on_batch` of `engine.evaluate`.

    Writes `masks/<id>.png` (class ids in the data set's palette) and `overlays/<id>.jpg` for each image.
    """

    def __init__(self, folder: Path, dataset: SegmentationDataset) -> None:
        self.folder, self.ids, self.palette = folder, dataset.ids, dataset.palette

    def __call__(
        self, indices: list[int], images: torch.Tensor, masks: torch.Tensor, predictions: torch.Tensor
    ) -> None:
        for index, image, prediction in zip(indices, images.cpu(), predictions.cpu(), strict=True):
            mask = self.folder / "masks" / f"{self.ids[index]}.png"
            drawing = self.folder / "overlays" / f"{self.ids[index]}.jpg"
            save_prediction(image, prediction, self.palette, mask=mask, drawing=drawing)


def save_prediction(
    image: torch.Tensor, ids: torch.Tensor, palette: np.ndarray, *, mask: Path, drawing: Path
) -> None:
    """Writes class ids `[H, W]` as a palette PNG to `mask`, and over the image `[3, H, W]` as a JPEG to `drawing`."""
    label_map = Image.fromarray(ids.numpy())
    label_map.putpalette(palette.tobytes())
    for path, content, kind in ((mask, label_map, "PNG"), (drawing, _overlay(image, ids, palette), "JPEG")):
        make_folder(path.parent)
        with replacing(path) as temporary:
            content.save(temporary, format=kind)


def _overlay(image: torch.Tensor, ids: torch.Tensor, palette: np.ndarray) -> Image.Image:
    """Draws `overlay` in bands, because its intermediate results take fifty bytes per pixel."""
    height, width = ids.shape
    drawing = Image.new("RGB", (width, height))
    for top in range(0, height, BAND):
        drawing.paste(overlay(image[:, top : top + BAND], ids[top : top + BAND], palette), (0, top))
    return drawing
