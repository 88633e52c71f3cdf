"""Finds images whose annotation a trained model contradicts with confidence, for `visualize.py suspects`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from datasets.files import VOID
from datasets.voc import SegmentationDataset
from network._deeplab import DeepLab
from utils.engine import autocast
from utils.errors import InputError, SampleError
from utils.pictures.plotting import draw_grid, error_map, hwc

CONFIDENT = 0.9  # a wrong pixel contradicts its annotation if its class has a higher probability


class Suspect(NamedTuple):
    """How far a model contradicts the annotation of one image."""

    index: int  # in the data set
    share: float  # of the valid pixels are contradicted
    loss: float  # mean cross-entropy over the valid pixels
    annotated: str  # the most frequent pair of classes among the contradicted pixels; empty without any
    predicted: str


@torch.inference_mode()
def contradictions(
    model: DeepLab, image: torch.Tensor, mask: torch.Tensor, *, amp: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Returns the prediction, the contradicted pixels and the mean cross-entropy over the valid pixels.

    The first two are uint8 and bool `[H, W]` on the CPU; the last is 0 without a valid pixel.
    model: in evaluation mode. image: uint8 RGB `[3, H, W]`. mask: uint8 class ids `[H, W]`, void 255.
    """
    mask = mask.to(model.device)
    with autocast(model.device, amp):
        logits = model(image[None].to(model.device))[0]  # [C, H, W]
    # As in `engine.predict`, because close logits tie in the softmax.
    prediction = logits.max(dim=0).indices.to(torch.uint8)  # [H, W]
    confident = logits.softmax(dim=0).amax(dim=0) > CONFIDENT  # [H, W]
    valid = mask != VOID
    loss = F.cross_entropy(logits[None], mask[None].long(), ignore_index=VOID, reduction="sum")
    loss = loss / valid.sum().clamp_min(1)
    return prediction.cpu(), (valid & confident & (prediction != mask)).cpu(), loss.item()


def rank_suspects(
    model: DeepLab, dataset: SegmentationDataset, amp: torch.dtype | None = None
) -> tuple[list[Suspect], list[str]]:
    """Ranks the images of a split: the largest share first, equal shares by their loss.

    The second result has a line for each sample that cannot be used. Raises InputError if none can.
    """
    found, unreadable = [], []
    for index in tqdm(range(len(dataset)), desc="suspects", unit="image", dynamic_ncols=True, disable=None):
        try:
            image, mask = dataset.pair(index)
        except SampleError as error:
            unreadable.append(str(error))
            continue
        prediction, contradicted, loss = contradictions(model, image, mask, amp=amp)
        share = contradicted.sum() / (mask != VOID).sum().clamp_min(1)
        names = ["", ""]
        if contradicted.any():
            both = torch.stack([mask[contradicted], prediction[contradicted]])  # [2, N]
            pairs, counts = both.unique(dim=1, return_counts=True)  # [2, P], [P]
            names = [dataset.class_names[class_id] for class_id in pairs[:, counts.argmax()].tolist()]
        found.append(Suspect(index, share.item(), loss, *names))
    if not found:
        raise InputError(f"{dataset.source}: none of its samples can be used; the first problem: {unreadable[0]}")
    return sorted(found, key=lambda suspect: (-suspect.share, -suspect.loss)), unreadable


def draw_suspects(
    model: DeepLab,
    dataset: SegmentationDataset,
    suspects: Sequence[Suspect],
    path: Path,
    *,
    amp: torch.dtype | None = None,
) -> None:
    """Draws a row per image: image, annotation, prediction, and the contradicted pixels in red."""
    rows, labels, present = [], [], set()
    for index, share, _, annotated, predicted in suspects:
        image, mask = dataset.pair(index)
        # Predicted again, because the maps of a whole split would fill the memory.
        prediction, contradicted, _ = contradictions(model, image, mask, amp=amp)
        present |= {*mask.unique().tolist(), *prediction.unique().tolist()} - {VOID}
        drawings = [hwc(image), dataset.decode_target(mask), dataset.decode_target(prediction)]
        pair = f": {annotated}\npredicted as {predicted}" if annotated else ""
        red = error_map(image, mask.where(contradicted, VOID), prediction)
        rows.append([*((drawing, "") for drawing in drawings), (red, f"{share:.1%}{pair}")])
        labels.append(dataset.ids[index])
    headings = ["image", "annotation", "prediction", f"wrong with probability > {CONFIDENT}"]
    draw_grid(rows, headings=headings, labels=labels, path=path, legend=(dataset, sorted(present)))


def suspects_table(dataset: SegmentationDataset, ranked: Sequence[Suspect]) -> tuple[list[str], list[list]]:
    """Returns header and rows of `suspects.csv`."""
    header = "rank id share mean_loss annotated_class predicted_class".split()
    rows = [[dataset.ids[index], f"{share:.6f}", f"{loss:.6f}", *pair] for index, share, loss, *pair in ranked]
    return header, [[rank, *row] for rank, row in enumerate(rows, 1)]
