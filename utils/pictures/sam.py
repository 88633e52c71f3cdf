"""Draws or scores Segment Anything's masks and the predictions that they refine, for `visualize.py sam`."""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode, functional
from tqdm import tqdm

from datasets.files import VOID, read_image
from datasets.voc import SegmentationDataset, decode_target
from network.sam import Mask, Sam, generate_masks, refine, true_masks
from utils.engine import autocast
from utils.environment import peak_memory_mb
from utils.errors import InputError
from utils.files import make_folder, write_csv
from utils.metrics import BoundaryIoU, ConfusionMatrix, image_iou
from utils.pictures.plotting import draw_grid, draw_masks, hwc
from utils.weights.load import TrainedModel

LONGEST_SIDE = 2048  # pixels of a drawn image: twice what SAM sees, and the models' memory stays bounded


class Item(NamedTuple):
    """An image that is not read before its turn."""

    name: str
    read: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]  # image [3, H, W], ground truth [H, W] if any


class Result(NamedTuple):
    """The masks and predictions of one image; class ids are uint8 `[H, W]`, None without ground truth or model."""

    name: str
    image: torch.Tensor  # uint8 [3, H, W]
    target: torch.Tensor | None
    masks: list[Mask]
    prediction: torch.Tensor | None
    refined: torch.Tensor | None
    seconds: dict[str, float]  # for "masks", "model" and "refinement"


def check_flags(opts: argparse.Namespace) -> None:
    """Raises InputError for flags that contradict each other."""
    if opts.input and (opts.ids or opts.eval or opts.true_masks):
        raise InputError("--input: its images have no ids and no ground truth; drop --ids, --eval, --true_masks")
    if opts.eval and not opts.ckpt:
        raise InputError("--eval: there is no prediction to refine without a model; add --ckpt")
    if opts.eval and opts.ids:
        raise InputError("--ids: --eval chooses its images at random; drop one of the two")


def choose_any(opts: argparse.Namespace, dataset: SegmentationDataset) -> list[int]:
    """Returns the indices of the images for `--eval`: all, or a random choice."""
    if opts.eval == "all":
        return list(range(len(dataset)))
    if opts.eval > len(dataset):
        raise InputError(f"--eval {opts.eval}: the split has only {len(dataset)} images; lower it, or give all")
    return np.random.default_rng(opts.random_seed).permutation(len(dataset))[: opts.eval].tolist()


def dataset_items(dataset: SegmentationDataset, indices: Sequence[int], *, native: bool) -> list[Item]:
    """Returns the images of a data set: at native size for scores, otherwise up to `LONGEST_SIDE` pixels a side."""
    return [Item(dataset.ids[index], partial(_read_pair, dataset, index, native)) for index in indices]


def _read_pair(dataset: SegmentationDataset, index: int, native: bool) -> tuple[torch.Tensor, torch.Tensor]:
    image, mask = dataset.pair(index)
    if native:
        return image, mask
    return _shrink(image, InterpolationMode.BILINEAR), _shrink(mask[None], InterpolationMode.NEAREST_EXACT)[0]


def file_items(paths: Sequence[Path]) -> list[Item]:
    """Returns the images in files, up to `LONGEST_SIDE` pixels a side."""
    return [Item(path.name, partial(_read_file, path)) for path in paths]


def _read_file(path: Path) -> tuple[torch.Tensor, None]:
    return _shrink(read_image(path), InterpolationMode.BILINEAR), None


def _shrink(image: torch.Tensor, interpolation: InterpolationMode) -> torch.Tensor:
    """Resizes `[C, H, W]` so that no side exceeds `LONGEST_SIDE`."""
    scale = LONGEST_SIDE / max(image.shape[1:])
    if scale >= 1:
        return image
    return functional.resize(image, [max(1, round(side * scale)) for side in image.shape[1:]], interpolation)


@torch.inference_mode()
def class_probabilities(trained: TrainedModel, image: torch.Tensor, amp: torch.dtype | None) -> torch.Tensor:
    """Returns float32 `[C, H, W]` on the model's device for an RGB image, uint8 `[3, H, W]`."""
    device = trained.model.device
    with autocast(device, amp):
        logits = trained.model(image[None].to(device))  # [1, C, H, W]
    return logits[0].float().softmax(dim=0)


def process(
    items: Iterable[Item],
    opts: argparse.Namespace,
    *,
    sam: Sam | None,
    trained: TrainedModel | None,
    amp: torch.dtype | None,
    unreadable: list[str],
) -> Iterator[Result]:
    """Yields one result after the other; for an image that cannot be read, appends a line to `unreadable` instead.

    sam: None takes the regions of the ground truth as masks. trained: None gives masks without predictions.
    """
    for item in items:
        try:
            image, target = item.read()
        except InputError as error:
            unreadable.append(str(error))
            continue
        seconds, start = {}, time.perf_counter()
        if sam is None:
            masks = true_masks(target, VOID)
        else:
            masks = generate_masks(
                sam,
                image,
                points_per_side=opts.points_per_side,
                points_per_batch=opts.points_per_batch,
                min_score=opts.min_score,
                min_stability=opts.min_stability,
                max_masks=opts.max_masks,
                amp=amp,
            )
        seconds["masks"] = time.perf_counter() - start
        prediction, refined = None, None
        if trained is not None:
            start = time.perf_counter()
            probabilities = class_probabilities(trained, image, amp)
            prediction = probabilities.max(dim=0).indices.to(torch.uint8).cpu()  # [H, W]
            seconds["model"] = time.perf_counter() - start
            start = time.perf_counter()
            refined = refine(probabilities, masks, min_area=opts.min_area, min_confidence=opts.min_confidence).cpu()
            seconds["refinement"] = time.perf_counter() - start
        yield Result(item.name, image, target, masks, prediction, refined, seconds)


def draw(
    results: Iterable[Result], path: Path, *, owner: SegmentationDataset | TrainedModel | None, masks_name: str
) -> list[int]:
    """Draws a row per image: RGB, ground truth, prediction, masks, refined prediction, as far as they exist.

    owner: gives class names and palette; None if no classes are shown.
    Returns the number of masks of each image.
    """
    rows, labels, counts, present, headings = [], [], [], set(), []
    for result in results:
        counts.append(len(result.masks))
        text = f"{counts[-1]} mask{'s' * (counts[-1] != 1)}"
        row = [("RGB", hwc(result.image), "")]
        for heading, ids in (("ground truth", result.target), ("DeepLab", result.prediction)):
            if ids is not None:
                row.append((heading, decode_target(ids, owner.palette), _miou(result, ids, owner)))
                present |= set(ids.unique().tolist())
        row.append((masks_name, draw_masks(result.image, result.masks), text))
        if result.refined is not None:
            colours = decode_target(result.refined, owner.palette)
            row.append(("DeepLab refined", colours, _miou(result, result.refined, owner)))
        headings = [heading for heading, _, _ in row]
        rows.append([cell[1:] for cell in row])
        labels.append(result.name)
        print(", ".join([f"{result.name}: {text}", *(f"{name} {t:.2f} s" for name, t in result.seconds.items())]))
    if rows:
        legend = (owner, sorted(present - {VOID})) if owner is not None else None
        draw_grid(rows, headings=headings, labels=labels, path=path, legend=legend)
    return counts


def _miou(result: Result, ids: torch.Tensor, owner: SegmentationDataset | TrainedModel) -> str:
    if result.target is None or ids is result.target:
        return ""
    return f"mIoU {image_iou(result.target, ids, len(owner.class_names)):.4f}"


def score(results: Iterable[Result], total: int, class_names: list[str], path: Path) -> list[int]:
    """Prints mIoU and boundary IoU before and after refinement, and writes them to the CSV file `path`.

    A row per image goes to `<path>_images.csv`. Every result must have a ground truth and a prediction.
    Returns the number of masks of each image.
    """
    num_classes = len(class_names)
    regions = [ConfusionMatrix(num_classes) for _ in range(2)]
    outlines = [BoundaryIoU(num_classes) for _ in range(2)]
    images, counts, columns = [], [], ["model", "masks", "refinement"]
    for result in tqdm(results, total=total, desc="scoring", unit="image", dynamic_ncols=True, disable=None):
        for ids, region, outline in zip((result.prediction, result.refined), regions, outlines, strict=True):
            region.update(result.target, ids)
            outline.update(result.target, ids)
        counts.append(len(result.masks))
        images.append([result.name, counts[-1], *(result.seconds[name] for name in columns)])
    if not images:
        return counts

    scores, edges = [region.compute() for region in regions], [outline.compute() for outline in outlines]
    table = [*zip(*(s["Class IoU"] for s in scores), *(e["Class Boundary IoU"] for e in edges), strict=True)]
    table.append((*(s["Mean IoU"] for s in scores), *(e["Mean Boundary IoU"] for e in edges)))
    names = [*class_names, "mean"]
    width = max(map(len, names))
    print(f"{'':<{width}}  {'IoU':^18}  {'boundary IoU':^18}")
    print(f"{'class':<{width}}  {'before':>8}  {'after':>8}  {'before':>8}  {'after':>8}")
    for name, row in zip(names, table, strict=True):
        print("  ".join([f"{name:<{width}}", *(f"{'-' if x != x else f'{x:.4f}':>8}" for x in row)]))
    means = np.mean([row[2:] for row in images], axis=0)
    times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in zip(columns, means, strict=True))
    print(f"{len(images)} images, mean time per image: {times}")

    header = "class iou_before iou_after boundary_iou_before boundary_iou_after".split()
    cells = [[name, *(f"{x:.6f}" for x in row)] for name, row in zip(names, table, strict=True)]
    image_header = ["image", "masks", *(f"{name}_seconds" for name in columns)]
    image_cells = [[name, count, *(f"{seconds:.4f}" for seconds in row)] for name, count, *row in images]
    make_folder(path.parent)
    write_csv(path, header, cells)
    write_csv(path.with_name(f"{path.stem}_images.csv"), image_header, image_cells)
    return counts


def summary(counts: list[int], device: torch.device) -> str:
    return f"{np.mean(counts):.1f} masks per image, peak memory {peak_memory_mb(device):,.0f} MB"
