"""Drawing, without a display."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from datasets.voc import SegmentationDataset
from network._deeplab import DeepLab
from utils.engine import evaluating, predict


def draw_curves(histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    """mIoU (best marked with its value), training loss and learning rate over the iterations, a line per run.

    histories: run name to the rows of its `history.csv`.
    """
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [("mean_iou", "validation mIoU"), ("loss", "training loss"), ("lr", "learning rate (head)")]
    for axes, (column, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, (name, rows) in enumerate(histories.items()):
            itrs, values = [row["itr"] for row in rows], [row[column] for row in rows]
            axes.plot(itrs, values, marker="o", markersize=3, color=f"C{number}", label=name)
            finite = [row for row in rows if row[column] == row[column]]
            if column == "mean_iou" and finite:
                best = max(finite, key=lambda row: row["mean_iou"])
                axes.plot(best["itr"], best["mean_iou"], marker="*", markersize=14, color=f"C{number}")
                label = f"{best['mean_iou']:.4f} (epoch {best['epoch']:.0f})"
                axes.annotate(
                    label, (best["itr"], best["mean_iou"]), (0, -16), textcoords="offset points", ha="center"
                )
        axes.set(title=title, xlabel="iteration")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
    figure.axes[0].legend(loc="lower right", fontsize="small")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)


def overlay(image: torch.Tensor, prediction: torch.Tensor, palette: np.ndarray) -> Image.Image:
    """uint8 RGB `[3, H, W]` with class ids `[H, W]` in their colours at half opacity; black is left clear."""
    colours = torch.from_numpy(palette)[prediction.long()].permute(2, 0, 1)  # [3, H, W]
    shown = (colours > 0).any(dim=0)
    blended = torch.where(shown, (image.float() + colours.float()) / 2, image.float()).round().byte()
    return Image.fromarray(blended.permute(1, 2, 0).numpy())


def prediction_strip(model: DeepLab, dataset: SegmentationDataset, index: int) -> torch.Tensor:
    """Picture, ground truth and prediction of one sample side by side, uint8 RGB `[3, H, 3 W]`."""
    image, mask = dataset[index]
    with evaluating(model):
        prediction = predict(model, image[None].to(model.device))[0]  # [H, W]
    colours = [torch.from_numpy(dataset.decode_target(ids)).permute(2, 0, 1) for ids in (mask, prediction)]
    return torch.cat([image, *colours], dim=2)
