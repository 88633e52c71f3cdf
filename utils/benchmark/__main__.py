"""Measures speed and memory against plain references: one command, one table.

    python -m utils.benchmark                                            # on the GPU if there is one
    python -m utils.benchmark --device cuda --compile --json speed.json  # also torch.compile; rows to a file
    python -m utils.benchmark --parts loader,predict --repeats 15

Ours and the reference take turns after a warm-up; each figure is the median of its turns. The references are what one
writes with PIL, torchvision and torch alone: whole images resized, float32, NCHW, no autocast, one image at a time.
The data are generated in a temporary folder, in VOC's sizes.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from datasets import build_dataset
from network import MODELS
from utils.benchmark.parts import DISTINCT, IMAGE_SIZE, NUM_CLASSES, ON_CUDA, PARTS, STEPS, timed, write_images
from utils.cli import Parser, friendly_errors, number
from utils.engine import choose_amp, choose_device
from utils.environment import device_name, model_cost, peak_memory_mb
from utils.errors import InputError
from utils.files import write_text

MATRIX = 4096  # side of the matrices whose product gives the device's rate


def cuda_memory(name: str, opts: argparse.Namespace, *, ours: bool) -> tuple[float, float]:
    """Returns the peak memory of one side, allocated and reserved, in MB. It has the device to itself."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(opts.device)
    measurement = PARTS[name](opts, ours=ours)
    # Twice, because the first step creates the optimizer's state.
    for _ in range(2):
        measurement()
    return peak_memory_mb(opts.device), torch.cuda.max_memory_reserved(opts.device) / 2**20


def measure(name: str, opts: argparse.Namespace) -> dict:
    """Measures a part; returns its row: milliseconds, `ratio` (how many times faster ours is) and peak memory."""
    memory = {}
    if opts.device.type == "cuda":
        for ours, prefix in ((True, ""), (False, "reference_")):
            allocated, reserved = cuda_memory(name, opts, ours=ours)
            memory |= {f"{prefix}peak_memory_mb": allocated, f"{prefix}reserved_memory_mb": reserved}
    ours, reference = PARTS[name](opts, ours=True), PARTS[name](opts, ours=False)
    # The first turn is the warm-up.
    _, *turns = [(ours(), reference()) for _ in range(1 + opts.repeats)]
    ms, reference_ms = (1e3 * statistics.median(side) for side in zip(*turns, strict=True))
    unit, images = ("ms/step", opts.step_batch_size) if name in STEPS else ("ms/image", 1)
    row = {"part": name, "unit": unit, "ours": ms, "reference": reference_ms, "ratio": reference_ms / ms}
    row |= memory or {"peak_memory_mb": peak_memory_mb(opts.device)}
    return row | {"images_per_s": 1e3 * images / ms, "reference_images_per_s": 1e3 * images / reference_ms}


def floors(opts: argparse.Namespace) -> dict[str, float]:
    """Estimates a floor in ms for each part and prints how it was found.

    It is the time to decode the files, and the plain network's operations at the rate of a large matrix product in
    the same dtype. Code that skips products with padding can go below it.
    """
    split, start = build_dataset("folder", opts.folder, "train"), time.perf_counter()
    for path in [*split.images, *split.masks]:
        with Image.open(path) as image:
            image.load()
    read = 1e3 * (time.perf_counter() - start) / len(split)
    square = torch.randn(MATRIX, MATRIX, device=opts.device).to(opts.amp or torch.float32)
    product = timed(lambda: square @ square, opts.device)
    flops_per_ms = 2 * MATRIX**3 / min(product() for _ in range(6)) / 1e3
    print(
        f"Floors: decoding JPEG and PNG takes {read:.2f} ms per image. A product of "
        f"{str(square.dtype).removeprefix('torch.')} matrices of {MATRIX} runs at {flops_per_ms / 1e6:,.0f} GFLOP/s; "
        f"at that rate a forward pass of {opts.model} takes"
    )
    crop, step = (opts.crop_size, opts.crop_size), (opts.step_crop_size, opts.step_crop_size)
    least = {}
    for height, width in {IMAGE_SIZE, crop, step}:
        cost = model_cost(
            opts.model, num_classes=NUM_CLASSES, output_stride=opts.output_stride, height=height, width=width
        )
        least[height, width] = 1e9 * cost["gflops"] / flops_per_ms
        print(f"    {width}x{height}: {cost['gflops']:.0f} GFLOP, {least[height, width]:.1f} ms")
    training = 3 * opts.step_batch_size * least[step]  # the backward pass: two products for each forward one
    loading = {"loader": read, "loader_like_for_like": read, "loader_2_workers": read / 2}
    inference = {"predict": least[crop], "validation": read + least[IMAGE_SIZE]}
    return {"train_step": training, "train_step_compiled": training} | loading | inference


def format_table(rows: list[dict]) -> list[str]:
    """Formats the rows as lines of aligned columns."""
    memory = "MB" if any("reserved_memory_mb" in row for row in rows) else "MB so far"  # of the process, on the CPU
    table = [["part", "unit", "ours", "reference", "ratio", "floor", "images/s", "reference", memory]]
    for row in rows:
        times = [f"{row[side]:.2f}" for side in ("ours", "reference")]
        floor = f"{row['floor']:.2f}" if row["floor"] else "-"
        speeds = [f"{row[side]:.1f}" for side in ("images_per_s", "reference_images_per_s")]
        ratio, memory = f"{row['ratio']:.2f}x", f"{row['peak_memory_mb']:.0f}"
        table.append([row["part"], row["unit"], *times, ratio, floor, *speeds, memory])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in table]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags and fills in device, precision and sizes. Raises InputError for what cannot be measured."""
    parser = Parser(
        prog="python -m utils.benchmark", description="Measure speed and memory against plain references."
    )
    add, count = parser.add_argument, number(int, 1)
    add("--device", default="auto", metavar="NAME", help="auto: cuda if available, otherwise cpu")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="our mixed precision")
    add("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    add("--parts", metavar="LIST", help=f"from {','.join(PARTS)} (default: those that suit the device)")
    add("--repeats", type=count, default=7, metavar="N", help="turns of ours and the reference")
    add("--model", choices=MODELS, default="deeplabv3plus_resnet50", metavar="NAME", help="as in main.py")
    add("--output_stride", type=int, choices=[16, 8], default=16, help="as in main.py")
    add("--crop_size", type=count, default=513, metavar="N", help="crop of loader, image side of predict")
    add("--batch_size", type=number(int, 1, DISTINCT), default=16, metavar="N", help="batch of loader")
    add("--step_crop_size", type=count, metavar="N", help="crop of train_step (default: 513, on the CPU 257)")
    add("--step_batch_size", type=number(int, 2, DISTINCT), metavar="N", help="its batch (default: 8, on the CPU 2)")
    add("--num_workers", type=number(int, 0), default=2, metavar="N", help="workers on a GPU: validation, training")
    add("--compile", action="store_true", help="also measure train_step with torch.compile")
    opts = parser.parse_args(argv)
    opts.device = choose_device(opts.device)
    opts.amp = choose_amp(opts.amp, opts.device)
    on_cpu = opts.device.type == "cpu"
    opts.step_crop_size = opts.step_crop_size or (257 if on_cpu else 513)
    opts.step_batch_size = opts.step_batch_size or (2 if on_cpu else 8)
    left_out = (ON_CUDA if on_cpu else set()) | (set() if opts.compile else {"train_step_compiled"})
    opts.parts = opts.parts.split(",") if opts.parts else [name for name in PARTS if name not in left_out]
    if unknown := [name for name in opts.parts if name not in PARTS]:
        raise InputError(f"--parts {unknown[0]}: there is no such part; choose from {', '.join(PARTS)}")
    if opts.json and not opts.json.parent.is_dir():
        raise InputError(f"--json {opts.json}: there is no folder {opts.json.parent}; create it or choose another")
    return opts


@friendly_errors
def main(argv: list[str] | None = None) -> None:
    """Measures the parts, prints the table and writes the rows."""
    opts = parse(argv)
    precision = str(opts.amp or torch.float32).removeprefix("torch.")
    print(f"Device: {device_name(opts.device)}, {precision}, {opts.model}")
    with tempfile.TemporaryDirectory() as folder:
        num_val = DISTINCT if opts.device.type == "cuda" else 8
        opts.folder = write_images(Path(folder), DISTINCT, num_val=num_val, size=IMAGE_SIZE)
        rows = []
        for name in opts.parts:
            print(f"{name} ...", flush=True)
            rows.append(measure(name, opts))
        least = floors(opts)
    rows = [row | {"floor": least.get(row["part"])} for row in rows]
    print("\n".join(format_table(rows)))
    if opts.json:
        write_text(opts.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
