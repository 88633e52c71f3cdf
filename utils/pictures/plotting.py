"""Drawing, without a display: grids of pictures, legends, bars and curves."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from datasets.files import VOID
from datasets.stats import ClassStatistics
from datasets.voc import SegmentationDataset
from network._deeplab import DeepLab
from network.sam import Mask
from utils.engine import evaluating, predict
from utils.errors import InputError
from utils.files import replacing

matplotlib.rcParams["text.parse_math"] = False  # a "$" in a class name is a dollar
COLUMNS = 10  # of a grid of samples
LINES = ("-", "--", "-.", ":")  # runs differ in print without colour too


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, drawn without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Writes a PNG whole or not at all. Raises InputError for another suffix and where it cannot be written."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path}: pictures are PNG; give a name that ends with .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}); give another path") from None


def add_legend(figure: Figure, dataset: SegmentationDataset, class_ids: Sequence[int]) -> None:
    """The colours and names of these classes, and of void, below the pictures."""
    names = [*(dataset.class_names[class_id] for class_id in class_ids), "void"]
    colours = dataset.palette[[*class_ids, VOID]] / 255
    patches = [Patch(facecolor=c, edgecolor="0.4", label=n) for c, n in zip(colours, names, strict=True)]
    width, _ = figure.get_size_inches()
    widest = 0.09 * max(map(len, names)) + 0.6  # inches that a name takes
    figure.legend(handles=patches, loc="outside lower center", ncols=max(1, int(width / widest)), frameon=False)


def show(axes: Axes, picture: np.ndarray | None, title: str = "", label: str = "") -> None:
    """One picture, RGB `[H, W, 3]` uint8, with a title above and a label below; None where it is missing."""
    axes.set(xticks=[], yticks=[])
    axes.set_title("\n".join(textwrap.wrap(title, 30)), fontsize=9)  # names of runs are long
    axes.set_xlabel(label, fontsize=8)
    if picture is None:
        axes.text(0.5, 0.5, "photograph\nmissing", ha="center", va="center", color="0.4", transform=axes.transAxes)
        axes.set_facecolor("0.93")
    else:
        axes.imshow(picture, interpolation="nearest")


def hwc(image: torch.Tensor) -> np.ndarray:
    """uint8 `[3, H, W]` to `[H, W, 3]`."""
    return image.permute(1, 2, 0).numpy()


def draw_samples(dataset: SegmentationDataset, indices: list[int], path: Path) -> None:
    """Each image above its annotation, its id below, ten a row, and a legend of the data set's classes."""
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
        missing = f"{len(dataset.missing_images)} of {len(dataset)} photographs are missing"
        figure.suptitle(f"{missing}: annotations alone are shown for them")
    add_legend(figure, dataset, range(dataset.num_classes))
    save(figure, path)


def draw_statistics(statistics: ClassStatistics, palette: np.ndarray, path: Path) -> None:
    """Share of the labelled pixels, on a log scale, and number of images of each class, most frequent first."""
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
    shares.set_xlim(10 ** np.floor(np.log10(present.min())), 3 * present.max())  # from a whole decade
    shares.xaxis.set_minor_formatter(NullFormatter())  # their labels would overlap
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
    """Pictures in rows and columns: `rows[i][j]` = (RGB `[H, W, 3]` uint8, text below), a heading per column, a
    label per row; `legend` = (data set, class ids)."""
    ratio = np.mean(
        [picture.shape[0] / picture.shape[1] for row in rows for picture, _ in row if picture is not None]
    )
    figure = new_figure(3.2 * len(headings), (3.2 * ratio + 0.35) * len(rows) + 0.9)
    grid = figure.subplots(len(rows), len(headings), squeeze=False)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for axes, (picture, text), heading in zip(grid[number], row, headings, strict=True):
            show(axes, picture, title=heading if number == 0 else "", label=text)
        grid[number][0].set_ylabel(label, fontsize=9)
    if legend:
        add_legend(figure, *legend)
    save(figure, path)


def error_map(image: torch.Tensor, target: torch.Tensor, prediction: torch.Tensor) -> np.ndarray:
    """The picture `[3, H, W]` in pale grey with the pixels in red where the prediction is not the target; void is
    never wrong. RGB `[H, W, 3]` uint8."""
    grey = image.float().mean(dim=0, keepdim=True).expand(3, -1, -1) * 0.4 + 150  # [3, H, W]
    wrong = (prediction != target) & (target != VOID)
    red = torch.tensor([215.0, 25.0, 28.0]).view(3, 1, 1)
    return hwc(torch.where(wrong, red, grey).byte())


def draw_curves(histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    """mIoU (best marked), training loss and learning rate over the iterations, a line per run.

    histories: run name to the rows of its `history.csv`.
    """
    figure = new_figure(13, 4.2 + 0.2 * len(histories))
    panels = [("mean_iou", "validation mIoU"), ("loss", "training loss"), ("lr", "learning rate (head)")]
    all_axes = figure.subplots(1, 3)
    for number, (name, rows) in enumerate(histories.items()):
        style = {"color": f"C{number}", "linestyle": LINES[number % len(LINES)], "marker": "o", "markersize": 3}
        best = max((row for row in rows if row["mean_iou"] == row["mean_iou"]), key=lambda row: row["mean_iou"])
        label = f"{name}: best {best['mean_iou']:.4f} at epoch {best['epoch']:.0f}, last {rows[-1]['mean_iou']:.4f}"
        for axes, (column, _) in zip(all_axes, panels, strict=True):
            axes.plot([row["itr"] for row in rows], [row[column] for row in rows], label=label, **style)
        all_axes[0].plot(best["itr"], best["mean_iou"], marker="*", markersize=15, color=f"C{number}", mec="black")
        if len(histories) <= 2:  # more of them cover each other; the legend has them all
            place = (best["itr"], best["mean_iou"])
            first, last = rows[0]["itr"] == best["itr"], rows[-1]["itr"] == best["itr"]  # at the edge, away from it
            side = "center" if first == last else "left" if first else "right"
            pale = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}  # over the other run's curve
            text = f"{place[1]:.4f}"
            all_axes[0].annotate(text, place, (0, 9), textcoords="offset points", ha=side, bbox=pale)
    for axes, (_, title) in zip(all_axes, panels, strict=True):
        axes.set(title=title, xlabel="iteration")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
        axes.ticklabel_format(axis="y", useOffset=False)
    low, high = all_axes[0].get_ylim()
    if high - low < 0.02:  # no more than that is noise, and stretched to the whole height it would look like a fall
        all_axes[0].set_ylim((low + high) / 2 - 0.01, (low + high) / 2 + 0.01)
    all_axes[2].set_ylim(bottom=0)
    figure.legend(handles=all_axes[0].get_lines()[::2], loc="outside lower center", frameon=False)
    save(figure, path)


def overlay(image: torch.Tensor, prediction: torch.Tensor, palette: np.ndarray) -> Image.Image:
    """uint8 RGB `[3, H, W]` with class ids `[H, W]` in their colours at half opacity; black is left clear."""
    colours = torch.from_numpy(palette)[prediction.long()].permute(2, 0, 1)  # [3, H, W]
    shown = (colours > 0).any(dim=0)
    blended = torch.where(shown, (image.float() + colours.float()) / 2, image.float()).round().byte()
    return Image.fromarray(hwc(blended))


def prediction_strip(
    model: DeepLab, dataset: SegmentationDataset, index: int, amp: torch.dtype | None = None
) -> torch.Tensor:
    """Picture, ground truth and prediction of one sample side by side, uint8 RGB `[3, H, 3 W]`."""
    image, mask = dataset[index]
    with evaluating(model):
        prediction = predict(model, image[None].to(model.device), amp)[0].cpu()  # [H, W]
    colours = [torch.from_numpy(dataset.decode_target(ids)).permute(2, 0, 1) for ids in (mask, prediction)]
    return torch.cat([image, *colours], dim=2)


def draw_masks(image: torch.Tensor, masks: Sequence[Mask]) -> np.ndarray:
    """The picture, uint8 RGB `[3, H, W]`, under its masks, each in a random colour of its own (always the same ones)
    with an outline, smaller ones on top. RGB `[H, W, 3]` uint8."""
    drawing = hwc(image).copy()
    width = max(1, round(min(drawing.shape[:2]) / 150))  # of an outline, in pixels
    rng = np.random.default_rng(1)
    order = sorted(range(len(masks)), key=lambda number: -masks[number].area)
    # Hues a golden section apart never come close to one another, however many there are.
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
