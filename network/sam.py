"""Segment Anything (Kirillov et al. 2023, arXiv 2304.02643): masks without classes, and what they do for a prediction
that has classes. `transformers` is imported here alone, and only when a model is loaded.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision.ops import nms
from tqdm import tqdm

from utils.engine import autocast
from utils.errors import InputError

MASK_PIXELS = 2**25  # of float32 masks at full size at a time: 128 MB, and a few times that in intermediate results
HUB_TIMEOUT = 10.0  # seconds
BOX_IOU = 0.7  # of two masks' boxes, above which they are taken for one object (the paper's appendix B)


class Mask(NamedTuple):
    """A region, kept as the packed bits of its bounding box: 1/32 of a float mask of the picture or less."""

    window: tuple[slice, slice]  # rows and columns of the bounding box
    bits: np.ndarray  # uint8, 8 pixels a byte
    area: int  # pixels
    score: float  # the mask's IoU with the true object as SAM predicts it, about 0..1

    @classmethod
    def of(cls, inside: np.ndarray, score: float = 1.0) -> "Mask":
        """Of bool `[H, W]`. Raises ValueError for a mask without a pixel."""
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        if not len(rows):
            raise ValueError("a mask without a pixel has no bounding box")
        window = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        return cls(window, np.packbits(inside[window]), int(inside[window].sum()), score)

    def pixels(self) -> np.ndarray:
        """bool, of the window's size."""
        height, width = (side.stop - side.start for side in self.window)
        return np.unpackbits(self.bits, count=height * width).reshape(height, width).view(bool)


class Sam(NamedTuple):
    model: nn.Module  # transformers.SamModel in evaluation mode, on its device
    processor: object  # its transformers.SamImageProcessor


def load_sam(name: str, device: torch.device) -> Sam:
    """`--sam`: a local folder (model and processor as `save_pretrained` writes them), or a name on the hub.

    The hub is asked once, with a bound of `HUB_TIMEOUT` seconds; where it does not answer, its cache is used.
    Raises InputError where transformers is missing, where nothing is to be had under the name, and for a folder
    with another model or without all of its weights.
    """
    try:
        from huggingface_hub import HfApi
        from safetensors import SafetensorError
        from transformers import SamModel, SamProcessor
        from transformers.utils import logging as messages
    except ImportError as error:
        raise InputError(f"--sam: transformers cannot be imported ({error}); pip install transformers") from None
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each attempt
    local, no_hub = Path(name).is_dir(), None
    if not local:
        try:
            HfApi().model_info(name, timeout=HUB_TIMEOUT)
        except Exception as error:  # of whichever HTTP library it uses
            # from_pretrained alone would try each of its files five times, for minutes.
            local, no_hub = True, (str(error).strip().splitlines() or [type(error).__name__])[0]
    try:
        processor = SamProcessor.from_pretrained(name, local_files_only=local).image_processor
        model, loading = SamModel.from_pretrained(name, local_files_only=local, output_loading_info=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if no_hub:
            raise InputError(
                f"--sam {name}: is no folder, and the hub does not give it ({no_hub}); give the folder of a copy"
            ) from None
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise InputError(f"--sam {name}: holds no SAM that can be loaded ({reason}); give another") from None
    if loading["missing_keys"]:  # transformers would go on with random ones
        lost = sorted(loading["missing_keys"])
        raise InputError(f"--sam {name}: {len(lost)} weights of SAM are missing, {lost[0]} first; save it anew")
    return Sam(model.to(device).eval(), processor)


@torch.inference_mode()
def generate_masks(
    sam: Sam,
    image: torch.Tensor,
    *,
    points_per_side: int = 32,
    points_per_batch: int = 64,
    min_score: float = 0.88,
    min_stability: float = 0.95,
    max_masks: int = 256,
    amp: torch.dtype | None = None,
) -> list[Mask]:
    """Masks of all that a grid of points hits in a picture, uint8 RGB `[3, H, W]` on the CPU; the best first.

    Each of points_per_side^2 points gives three masks (part, object, whole). Those stay whose IoU as SAM predicts
    it exceeds `min_score` and whose outline moves little when the threshold does (`min_stability`); 0 switches a
    bound off. Of masks with boxes that overlap by more than 0.7 IoU the best stays, and `max_masks` in all (paper,
    appendix B, without its second pass over crops).
    Memory: the points pass the decoder `points_per_batch` at a time (half of that wherever a GPU has too little
    memory); what passes `min_score` is enlarged to full size `MASK_PIXELS` at a time, or one mask, and packed.
    Raises InputError where the memory does not suffice for one point.
    """
    model, processor = sam
    height, width = image.shape[1:]
    inputs = processor(image.permute(1, 2, 0).numpy(), input_data_format="channels_last", return_tensors="pt")
    with autocast(model.device, amp):
        embedding = model.get_image_embeddings(inputs["pixel_values"].to(model.device))  # [1, E, h, w]
    seen_height, seen_width = (int(side) for side in inputs["reshaped_input_sizes"][0])
    steps = (torch.arange(points_per_side) + 0.5) / points_per_side
    points = torch.cartesian_prod(steps * seen_width, steps * seen_height).to(model.device)  # [N, 2], (x, y)

    found: list[Mask] = []
    start, step = 0, points_per_batch
    with tqdm(total=len(points), desc="SAM", unit="point", leave=False, dynamic_ncols=True, disable=None) as bar:
        while start < len(points):
            batch = points[start : start + step]  # [n, 2]
            try:
                with autocast(model.device, amp):
                    answer = model(input_points=batch[None, :, None], image_embeddings=embedding)
            except torch.OutOfMemoryError:
                if step == 1:
                    raise InputError("sam: the memory does not suffice for one point; try --device cpu") from None
                step //= 2
                continue
            scores, logits = answer.iou_scores[0].float(), answer.pred_masks[0]  # [n, 3], [n, 3, h, w]
            keep = scores > min_score if min_score else torch.ones_like(scores, dtype=torch.bool)
            pad = processor.pad_size  # to which they are enlarged on the way
            chunk = max(1, MASK_PIXELS // max(height * width, pad["height"] * pad["width"]))
            for some_scores, some in zip(scores[keep].split(chunk), logits[keep].split(chunk), strict=True):
                large = processor.post_process_masks(
                    [some[:, None].float()],
                    [[height, width]],
                    reshaped_input_sizes=[[seen_height, seen_width]],
                    binarize=False,
                )[0]  # [k, 1, H, W]
                box = [0, 0, width, height]
                runs, kept, _ = processor.filter_masks(
                    large, some_scores[:, None], [height, width], box, min_score, min_stability
                )
                inside = (_decode(run) for run in runs)
                found += [Mask.of(m, s) for m, s in zip(inside, kept.tolist(), strict=True) if m.any()]
            found = sorted(found, key=lambda mask: -mask.score)[: 4 * max_masks]
            start += len(batch)
            bar.update(len(batch))
    if not found:
        return []
    boxes = [[m.window[1].start, m.window[0].start, m.window[1].stop, m.window[0].stop] for m in found]
    best = nms(torch.tensor(boxes).float(), torch.tensor([mask.score for mask in found]), BOX_IOU)
    return [found[index] for index in best[:max_masks].tolist()]


def _decode(run_lengths: dict) -> np.ndarray:
    """bool `[H, W]` of run lengths that go down the columns and begin with what is outside."""
    height, width = run_lengths["size"]
    inside = np.arange(len(run_lengths["counts"])) % 2 == 1
    return np.repeat(inside, run_lengths["counts"]).reshape(width, height).T


def refine(
    probabilities: torch.Tensor, masks: Sequence[Mask], *, min_area: int = 64, min_confidence: float = 0.5
) -> torch.Tensor:
    """Class ids, uint8 `[H, W]`, of class probabilities, float `[C, H, W]`, with their outlines taken from masks.

    The rule: every pixel begins with its most probable class. Then, from the largest mask to the smallest, so that
    where masks overlap the smaller one wins, all pixels of a mask take the class whose mean probability over the
    mask is highest. A mask of fewer than `min_area` pixels, or whose highest mean is below `min_confidence`,
    changes nothing. Nor does anything outside all masks change. Of two masks of one area the later wins.
    Raises ValueError for masks that reach beyond the picture.
    """
    height, width = probabilities.shape[1:]
    refined = probabilities.max(dim=0).indices.to(torch.uint8)  # [H, W]
    for mask in sorted(masks, key=lambda mask: -mask.area):
        rows, columns = mask.window
        if rows.stop > height or columns.stop > width:
            raise ValueError(f"a mask up to ({rows.stop}, {columns.stop}) of a picture of ({height}, {width})")
        if mask.area < min_area:
            continue
        inside = torch.from_numpy(mask.pixels()).to(probabilities.device)  # [h, w]
        mean, class_id = probabilities[:, rows, columns][:, inside].mean(dim=1).max(dim=0)
        if mean >= min_confidence:
            refined[rows, columns][inside] = class_id.to(torch.uint8)
    return refined


def true_masks(target: torch.Tensor, void: int) -> list[Mask]:
    """A mask for each connected region (over edges, not corners) of one class in class ids uint8 `[H, W]`: what a
    perfect mask generator would give. Void has none."""
    ids = target.numpy()
    labels = np.arange(ids.size).reshape(ids.shape)
    while True:
        # Each pixel takes the highest label of its four neighbours, then that label's own: so labels point ever
        # further within their region, and a region of any shape takes about log2(size) rounds.
        new = labels.copy()
        for axis in (0, 1):
            first, second = (tuple([slice(None)] * axis + [side]) for side in (slice(None, -1), slice(1, None)))
            same = ids[first] == ids[second]
            np.maximum(new[first], new[second], out=new[first], where=same)
            np.maximum(new[first], new[second], out=new[second], where=same)
        new = new.ravel()[new]
        if (new == labels).all():
            break
        labels = new
    return [Mask.of(labels == label) for label in np.unique(labels[ids != void])]
