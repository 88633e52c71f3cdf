"""What `visualize.py sam` shows: masks and the prediction with their outlines, drawn, or scored over a split."""

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

from datasets.files import VOID, require_one_size
from datasets.voc import SegmentationDataset, decode_target
from network.sam import Mask, generate_masks, load_sam, refine, true_masks
from utils.cli import number
from utils.engine import autocast, normalize
from utils.errors import InputError
from utils.metrics import BoundaryIoU, ConfusionMatrix, image_iou
from utils.pictures.plotting import draw_grid, draw_masks, hwc
from utils.pictures.predict import TrainedModel, read_any
from utils.run import peak_memory_mb, write_csv

LONGEST_SIDE = 2048  # pixels, of a picture to draw: twice what SAM sees, and a model's memory stays bounded


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `visualize.py sam` beside those that say which data and which model."""

    def add(name: str, **keywords) -> None:
        parser.add_argument(name, **keywords)

    share, count = number(float, 0, 1), number(int, 1)
    add("--sam", default="facebook/sam-vit-base", metavar="NAME", help="a name on the hub, or a local folder")
    add("--true_masks", action="store_true", help="the ground truth's regions for masks: the most they can repair")
    add("--eval", type=_count_or_all, metavar="N|all", help="scores on so many images as CSV, instead of a picture")
    add("--points_per_side", type=count, default=32, metavar="N", help="of the grid of prompts")
    add("--points_per_batch", type=count, default=64, metavar="N", help="halved where a GPU's memory is too small")
    add("--max_masks", type=count, default=256, metavar="N", help="of an image, the best")
    add("--min_score", type=share, default=0.88, metavar="X", help="of a mask: IoU that SAM predicts; 0: any")
    add("--min_stability", type=share, default=0.95, metavar="X", help="of a mask's outline; 0: any")
    add("--min_area", type=number(int, 0), default=64, metavar="N", help="pixels; smaller masks refine nothing")
    text = "mean probability of a mask's class; masks below it refine nothing"
    add("--min_confidence", type=share, default=0.5, metavar="X", help=text)


def _count_or_all(text: str) -> int | str:
    return text if text == "all" else number(int, 1)(text)


def require_fitting(opts: argparse.Namespace) -> None:
    """Raises InputError for flags that contradict each other."""
    if opts.input and (opts.ids or opts.eval or opts.true_masks):
        raise InputError("--input: its pictures have no ids and no ground truth; drop --ids, --eval, --true_masks")
    if opts.eval and not opts.ckpt:
        raise InputError("--eval: without a model there is nothing to refine; add --ckpt")
    if opts.eval and opts.ids:
        raise InputError("--ids: with --eval the images are any of the split; drop one of the two")


def mask_generator(opts: argparse.Namespace, device: torch.device, amp: torch.dtype | None) -> Callable:
    """(picture, ground truth) to masks: SAM's, or with `--true_masks` those of the ground truth."""
    if opts.true_masks:
        return lambda image, target: true_masks(target, VOID)
    sam = load_sam(opts.sam, device)
    options = {
        "points_per_side": opts.points_per_side,
        "points_per_batch": opts.points_per_batch,
        "min_score": opts.min_score,
        "min_stability": opts.min_stability,
        "max_masks": opts.max_masks,
    }
    return lambda image, target: generate_masks(sam, image, amp=amp, **options)


def choose_any(dataset: SegmentationDataset, count: int | str, seed: int) -> list[int]:
    """Indices of "all" images, or of so many that the seed chooses."""
    if count == "all":
        return list(range(len(dataset)))
    if count > len(dataset):
        raise InputError(f"--eval {count}: the split has only {len(dataset)} images; lower it, or give all")
    return np.random.default_rng(seed).permutation(len(dataset))[:count].tolist()


class Item(NamedTuple):
    name: str
    read: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]  # picture [3, H, W], ground truth [H, W] if any


class Result(NamedTuple):
    name: str
    image: torch.Tensor  # uint8 [3, H, W]
    target: torch.Tensor | None  # uint8 [H, W]
    masks: list[Mask]
    prediction: torch.Tensor | None  # uint8 [H, W], None without a model
    refined: torch.Tensor | None
    seconds: dict[str, float]  # of "model", "masks", "refinement"


def dataset_items(dataset: SegmentationDataset, indices: Sequence[int], *, native: bool) -> list[Item]:
    """native: at their own size, to be scored; otherwise at most `LONGEST_SIDE` a side."""
    return [Item(dataset.ids[index], partial(_read_pair, dataset, index, native)) for index in indices]


def _read_pair(dataset: SegmentationDataset, index: int, native: bool) -> tuple[torch.Tensor, torch.Tensor]:
    image, mask = dataset.image(index), dataset.mask(index)
    require_one_size(image, mask, dataset.masks[index])
    if native:
        return image, mask
    return _shrink(image, InterpolationMode.BILINEAR), _shrink(mask[None], InterpolationMode.NEAREST_EXACT)[0]


def picture_items(paths: Sequence[Path]) -> list[Item]:
    return [Item(path.name, partial(_read_picture, path)) for path in paths]


def _read_picture(path: Path) -> tuple[torch.Tensor, None]:
    return _shrink(read_any(path), InterpolationMode.BILINEAR), None


def _shrink(image: torch.Tensor, interpolation: InterpolationMode) -> torch.Tensor:
    """`[C, H, W]` with no side above `LONGEST_SIDE`."""
    scale = LONGEST_SIDE / max(image.shape[1:])
    if scale >= 1:
        return image
    return functional.resize(image, [max(1, round(side * scale)) for side in image.shape[1:]], interpolation)


@torch.inference_mode()
def class_probabilities(trained: TrainedModel, image: torch.Tensor, amp: torch.dtype | None) -> torch.Tensor:
    """float32 `[C, H, W]` on the model's device, of uint8 RGB `[3, H, W]`."""
    device = trained.model.device
    with autocast(device, amp):
        logits = trained.model(normalize(image[None].to(device)))  # [1, C, H, W]
    return logits[0].float().softmax(dim=0)


def results(
    items: Iterable[Item],
    generate: Callable[[torch.Tensor, torch.Tensor | None], list[Mask]],
    trained: TrainedModel | None,
    *,
    amp: torch.dtype | None,
    min_area: int,
    min_confidence: float,
    unreadable: list[str],
) -> Iterator[Result]:
    """One by one; a line about each picture that cannot be read goes to `unreadable` instead.

    generate: (picture, ground truth or None) to masks.
    """
    for item in items:
        try:
            image, target = item.read()
        except InputError as error:
            unreadable.append(str(error))
            continue
        prediction, refined, seconds = None, None, {}
        start = time.perf_counter()
        masks = generate(image, target)
        seconds["masks"] = time.perf_counter() - start
        if trained is not None:
            start = time.perf_counter()
            probabilities = class_probabilities(trained, image, amp)
            prediction = probabilities.max(dim=0).indices.to(torch.uint8).cpu()  # [H, W]
            seconds["model"] = time.perf_counter() - start
            start = time.perf_counter()
            refined = refine(probabilities, masks, min_area=min_area, min_confidence=min_confidence).cpu()
            seconds["refinement"] = time.perf_counter() - start
        yield Result(item.name, image, target, masks, prediction, refined, seconds)


def draw(
    found: Iterable[Result], path: Path, *, owner: SegmentationDataset | TrainedModel | None, masks_name: str
) -> list[int]:
    """A row per picture: RGB, ground truth, prediction, masks, refined prediction, as far as there are such; returns
    the number of masks of each. `owner` of class names and palette: None where no classes are shown."""
    rows, labels, counts, present, headings = [], [], [], set(), []
    for result in found:
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


def score(found: Iterable[Result], total: int, class_names: list[str], path: Path) -> list[int]:
    """mIoU and boundary IoU before and after refinement, printed and written to `path`, CSV, with a row per image in
    `<path>_images.csv`; returns the number of masks of each. Results need a ground truth and a prediction."""
    num_classes = len(class_names)
    regions = [ConfusionMatrix(num_classes) for _ in range(2)]
    outlines = [BoundaryIoU(num_classes) for _ in range(2)]
    images, counts, columns = [], [], ["model", "masks", "refinement"]
    for result in tqdm(found, total=total, desc="scoring", unit="image", dynamic_ncols=True, disable=None):
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
    print(f"{len(images)} images, a mean time for each of: {times}")

    header = "class iou_before iou_after boundary_iou_before boundary_iou_after".split()
    cells = [[name, *(f"{x:.6f}" for x in row)] for name, row in zip(names, table, strict=True)]
    image_cells = [[name, count, *(f"{seconds:.4f}" for seconds in row)] for name, count, *row in images]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(path, header, cells)
        image_header = ["image", "masks", *(f"{name}_seconds" for name in columns)]
        write_csv(path.with_name(f"{path.stem}_images.csv"), image_header, image_cells)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}); give another path") from None
    return counts


def summary(counts: list[int], device: torch.device) -> str:
    return f"{np.mean(counts):.1f} masks per image, peak memory {peak_memory_mb(device):,.0f} MB"
