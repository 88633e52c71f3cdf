"""Runs Segment Anything (Kirillov et al. 2023, arXiv 2304.02643) and refines predictions with its masks.

transformers is optional: it is imported only here, and only when a model is loaded.
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

from utils.errors import InputError

MASK_PIXELS = 2**25  # pixels of float32 masks at full size at a time: 128 MB, a few times that with intermediates
HUB_TIMEOUT = 10.0  # seconds
BOX_IOU = 0.7  # masks whose boxes overlap more than this are duplicates (paper, appendix B)


class Mask(NamedTuple):
    """A region, stored as the packed bits of its bounding box: at most 1/32 of a float mask of the image."""

    window: tuple[slice, slice]  # rows and columns of the bounding box
    bits: np.ndarray  # uint8, 8 pixels per byte
    area: int  # pixels
    score: float  # SAM's estimate of the mask's IoU with the true object, about 0..1

    @classmethod
    def from_array(cls, inside: np.ndarray, score: float = 1.0) -> "Mask":
        """Packs a bool array `[H, W]`. Raises ValueError for a mask without pixels."""
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        if not len(rows):
            raise ValueError("a mask without pixels has no bounding box")
        window = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        return cls(window, np.packbits(inside[window]), int(inside[window].sum()), score)

    def pixels(self) -> np.ndarray:
        """Unpacks the mask to a bool array of the size of its window."""
        height, width = (side.stop - side.start for side in self.window)
        return np.unpackbits(self.bits, count=height * width).reshape(height, width).view(bool)


class Sam(NamedTuple):
    """A loaded Segment Anything model."""

    model: nn.Module  # transformers.SamModel in evaluation mode, on its device
    processor: object  # its transformers.SamImageProcessor


def load_sam(name: str, device: torch.device) -> Sam:
    """Loads `--sam`: a local folder (model and processor as `save_pretrained` writes them), or a name on the hub.

    The hub is asked once, for at most `HUB_TIMEOUT` seconds; if it does not answer, its local cache is used.
    Raises InputError if transformers is not installed, if nothing is found under the name, and for a folder that
    holds another model or lacks some of its weights.
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
    # It logs every attempt.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    local, no_hub = Path(name).is_dir(), None
    if not local:
        # from_pretrained alone would try each file five times, for minutes.
        try:
            HfApi().model_info(name, timeout=HUB_TIMEOUT)
        except Exception as error:  # which types depends on the HTTP library behind it
            local, no_hub = True, (str(error).strip().splitlines() or [type(error).__name__])[0]
    try:
        processor = SamProcessor.from_pretrained(name, local_files_only=local).image_processor
        model, loading = SamModel.from_pretrained(name, local_files_only=local, output_loading_info=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if no_hub:
            raise InputError(
                f"--sam {name}: is not a local folder, and the hub did not provide it ({no_hub}); give a local folder"
            ) from None
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise InputError(f"--sam {name}: is not a SAM model that can be loaded ({reason}); give another") from None
    # transformers would continue with random weights.
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"--sam {name}: lacks {len(missing)} weights, first {missing[0]}; save the model again")
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
    """Returns masks of everything that a grid of points hits in an image, best first.

    image: RGB uint8 `[3, H, W]` on the CPU.
    Each of points_per_side^2 points gives three masks (part, object, whole). A mask stays if the IoU that SAM
    predicts for it exceeds `min_score`, and if its outline hardly moves with the threshold (`min_stability`); 0 turns
    a bound off. Among masks whose boxes overlap by more than 0.7 IoU only the best stays. At most `max_masks` stay in
    all (paper, appendix B, without its second pass over crops).
    Memory: the decoder gets `points_per_batch` points at a time, or half as many whenever a GPU runs out of memory.
    Masks that pass `min_score` are enlarged to full size `MASK_PIXELS` at a time, at least one, and then packed.
    Raises InputError if the memory is too small for a single point.
    """
    model, processor = sam
    height, width = image.shape[1:]
    inputs = processor(image.permute(1, 2, 0).numpy(), input_data_format="channels_last", return_tensors="pt")
    with torch.autocast(model.device.type, dtype=amp, enabled=amp is not None):
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
                with torch.autocast(model.device.type, dtype=amp, enabled=amp is not None):
                    answer = model(input_points=batch[None, :, None], image_embeddings=embedding)
            except torch.OutOfMemoryError:
                if step == 1:
                    raise InputError("--device: not enough memory for a single point of SAM; try cpu") from None
                step //= 2
                continue
            scores, logits = answer.iou_scores[0].float(), answer.pred_masks[0]  # [n, 3], [n, 3, h, w]
            keep = scores > min_score if min_score else torch.ones_like(scores, dtype=torch.bool)
            pad = processor.pad_size  # the intermediate size on the way to full size
            chunk = max(1, MASK_PIXELS // max(height * width, pad["height"] * pad["width"]))
            for some_scores, some_logits in zip(scores[keep].split(chunk), logits[keep].split(chunk), strict=True):
                large = processor.post_process_masks(
                    [some_logits[:, None].float()],
                    [[height, width]],
                    reshaped_input_sizes=[[seen_height, seen_width]],
                    binarize=False,
                )[0]  # [k, 1, H, W]
                box = [0, 0, width, height]
                runs, kept, _ = processor.filter_masks(
                    large, some_scores[:, None], [height, width], box, min_score, min_stability
                )
                for run_lengths, score in zip(runs, kept.tolist(), strict=True):
                    inside = _decode(run_lengths)  # [H, W]
                    if inside.any():
                        found.append(Mask.from_array(inside, score))
            found = sorted(found, key=lambda mask: -mask.score)[: 4 * max_masks]
            start += len(batch)
            bar.update(len(batch))
    if not found:
        return []
    boxes = [[m.window[1].start, m.window[0].start, m.window[1].stop, m.window[0].stop] for m in found]
    best = nms(torch.tensor(boxes).float(), torch.tensor([mask.score for mask in found]), BOX_IOU)
    return [found[index] for index in best[:max_masks].tolist()]


def _decode(run_lengths: dict) -> np.ndarray:
    """Returns a bool array `[H, W]` from run lengths that go down the columns and start outside the mask."""
    height, width = run_lengths["size"]
    inside = np.arange(len(run_lengths["counts"])) % 2 == 1
    return np.repeat(inside, run_lengths["counts"]).reshape(width, height).T


def refine(
    probabilities: torch.Tensor, masks: Sequence[Mask], *, min_area: int = 64, min_confidence: float = 0.5
) -> torch.Tensor:
    """Returns class ids, uint8 `[H, W]`, from class probabilities, float `[C, H, W]`, with outlines from masks.

    Every pixel starts with its most probable class. Then, from the largest mask to the smallest, all pixels of a mask
    take the class with the highest mean probability over the mask. So where masks overlap, the smaller one wins, and
    between masks of equal area the later one. A mask with fewer than `min_area` pixels, or whose highest mean is
    below `min_confidence`, changes nothing, and pixels outside all masks keep their class.
    Raises ValueError for masks that reach beyond the image.
    """
    height, width = probabilities.shape[1:]
    refined = probabilities.max(dim=0).indices.to(torch.uint8)  # [H, W]
    for mask in sorted(masks, key=lambda mask: -mask.area):
        rows, columns = mask.window
        if rows.stop > height or columns.stop > width:
            raise ValueError(f"a mask reaches ({rows.stop}, {columns.stop}) in an image of ({height}, {width})")
        if mask.area < min_area:
            continue
        inside = torch.from_numpy(mask.pixels()).to(probabilities.device)  # [h, w]
        mean, class_id = probabilities[:, rows, columns][:, inside].mean(dim=1).max(dim=0)
        if mean >= min_confidence:
            refined[rows, columns][inside] = class_id.to(torch.uint8)
    return refined


def true_masks(target: torch.Tensor, void: int) -> list[Mask]:
    """Returns the masks of a perfect mask generator: the connected regions of one class in the ground truth.

    target: class ids, uint8 `[H, W]`. Pixels connect over edges, not corners. Void has no masks.
    """
    ids = target.numpy()
    labels = np.arange(ids.size).reshape(ids.shape)
    while True:
        # Each pixel takes the highest label of its four neighbours, and then the label at that position. Labels jump
        # ever further within their region, so a region of any shape takes about log2(size) rounds.
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
    return [Mask.from_array(labels == label) for label in np.unique(labels[ids != void])]
