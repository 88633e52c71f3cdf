"""`utils.benchmark --scaling`: what more pictures, larger ones, more classes and more workers cost, one table each.

"growth" is the exponent between a row and the one above it: 1 is linear, 0 constant, above 1 more than linear.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from datasets import build_dataset
from datasets.loader import SameSizeBatches, make_loader
from datasets.transforms import eval_transform
from utils.benchmark.parts import DISTINCT, PICTURE, loader, timed, trained_model, write_pictures
from utils.engine import evaluate
from utils.loss import LOSSES, build_loss
from utils.metrics import ConfusionMatrix
from utils.pictures.predict import predict_picture
from utils.run import peak_memory_mb

IMAGES, SIDE = (100, 1000, 10_000), 32  # many pictures, but small ones
SIDES = (256, 512, 1024, 2048)
CLASSES = (2, 10, 50, 150)
LOSS_SIDE = 128
WORKERS = (0, 1, 2)
Row = tuple[float, dict[str, float]]  # the amount of work, and what it costs by name


class OnePixel(nn.Module):
    """The smallest model: a 1x1 convolution from the colours to the classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 1)

    @property
    def device(self) -> torch.device:
        return self.conv.weight.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def images(opts: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """A data set opened and sorted into batches of one size, then evaluated by the smallest model."""
    for count in IMAGES:
        root = write_pictures(folder / f"images_{count}", count, num_val=1, size=(SIDE, SIDE))
        before, start = peak_memory_mb(torch.device("cpu")), time.perf_counter()
        dataset = build_dataset("folder", root, "train", eval_transform())
        batches = SameSizeBatches(dataset.sizes(), 8)
        opened = time.perf_counter()
        source = make_loader(dataset, batches, num_workers=0, device=opts.device)
        model = OnePixel(dataset.num_classes).to(opts.device)
        evaluate(model, source, num_classes=dataset.num_classes, amp=opts.amp).matrix()
        done = time.perf_counter()
        memory = peak_memory_mb(torch.device("cpu")) - before
        yield count, {"open, ms": 1e3 * (opened - start), "evaluate, ms": 1e3 * (done - opened), "more MB": memory}


def sides(opts: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """A prediction by pixels a picture; above 1024 a side it goes in tiles."""
    model = trained_model(opts)
    for side in SIDES:
        picture = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
        take = timed(lambda picture=picture: predict_picture(model, picture, amp=opts.amp), opts.device)
        yield side**2, {"predict, ms": median_ms(take), "peak MB so far": peak_memory_mb(opts.device)}


def classes(opts: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Counting a picture of VOC's size, and each loss with its gradient."""
    for count in CLASSES:
        target, prediction = torch.randint(0, count, (2, *PICTURE), dtype=torch.uint8, device=opts.device)
        confusion = ConfusionMatrix(count, opts.device)
        update = timed(lambda args=(confusion, target, prediction): args[0].update(*args[1:]), opts.device, calls=20)
        costs = {"confusion, ms": median_ms(update)}
        for name in LOSSES:
            costs[f"{name}, ms"] = median_ms(timed(backward(name, count, opts.device), opts.device))
        yield count, costs


def backward(name: str, num_classes: int, device: torch.device) -> Callable[[], None]:
    criterion = build_loss(name)
    logits = torch.randn(2, num_classes, LOSS_SIDE, LOSS_SIDE, device=device, requires_grad=True)
    target = torch.randint(0, num_classes, (2, LOSS_SIDE, LOSS_SIDE), device=device)

    def call() -> None:
        logits.grad = None
        criterion(logits, target).backward()

    return call


def workers(opts: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Training batches from files, by processes that load them."""
    for count in WORKERS:
        yield count, {"load an image, ms": median_ms(loader(opts, workers=count).ours())}


def median_ms(take: Callable[[], float]) -> float:
    take()
    return 1e3 * statistics.median(take() for _ in range(3))


TABLES = {"images": images, "pixels": sides, "classes": classes, "workers": workers}


def print_tables(opts: argparse.Namespace, folder: Path) -> None:
    """Measures and prints all four, with the files of the data sets in `folder`."""
    opts.folder = write_pictures(folder, DISTINCT, num_val=1, size=PICTURE)
    for name, measure in TABLES.items():
        print(f"\n{measure.__doc__}", flush=True)
        last: Row | None = None
        for amount, costs in measure(opts, folder):
            if last is None:
                print("  ".join([f"{name:>10}", *(f"{cost:>12} growth" for cost in costs)]))
            cells = [
                f"{costs[cost]:>{max(12, len(cost))}.2f} {growth(last, amount, cost, costs):>6}" for cost in costs
            ]
            print("  ".join([f"{amount:>10}", *cells]), flush=True)
            last = amount, costs


def growth(last: Row | None, amount: float, cost: str, costs: dict[str, float]) -> str:
    """The exponent from the last row to this one."""
    if last is None or min(last[0], last[1][cost], costs[cost]) <= 0:
        return "-"
    return f"{math.log(costs[cost] / last[1][cost]) / math.log(amount / last[0]):.2f}"
