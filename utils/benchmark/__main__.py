"""Speed and memory against the plain way of doing the same: one command, one table.

    python -m utils.benchmark                                            # on the GPU where there is one
    python -m utils.benchmark --device cuda --compile --json speed.json  # torch.compile too, and the rows as a file
    python -m utils.benchmark --parts loader,predict --repeats 15
    python -m utils.benchmark --scaling                                  # cost as the work grows

Ours and the reference take turns after a warm-up, and each figure is the median of its turns. The references are what
one writes with PIL, torchvision and torch alone: whole pictures scaled, float32, NCHW, no autocast, one picture at a
time. The data are generated in a temporary folder, of VOC's sizes.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from datasets import build_dataset
from network import MODELS, build_model
from utils.benchmark.parts import (
    DISTINCT,
    MATRIX,
    NUM_CLASSES,
    ON_CUDA,
    PARTS,
    PICTURE,
    Measurement,
    Part,
    timed,
    write_pictures,
)
from utils.cli import Parser, exit_codes, number
from utils.engine import choose_amp, choose_device
from utils.errors import InputError
from utils.run import device_name, peak_memory_mb, write_text


def cuda_peaks(set_up: Callable[[], Measurement], device: torch.device) -> tuple[float, float]:
    """The most memory allocated and reserved, in MB, by one side that has the device to itself."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    measurement = set_up()
    for _ in range(2):  # the first step makes the optimizer's state
        measurement()
    return peak_memory_mb(device), torch.cuda.max_memory_reserved(device) / 2**20


def measure(name: str, part: Part, *, device: torch.device, repeats: int) -> dict:
    """The row of a part: milliseconds, `ratio` = how many times faster ours is, and its peak memory."""
    sides, memory = {"ours": part.ours, "reference": part.reference}, {}
    if device.type == "cuda":
        for side, set_up in sides.items():
            allocated, reserved = cuda_peaks(set_up, device)
            prefix = "" if side == "ours" else "reference_"
            memory |= {f"{prefix}peak_memory_mb": allocated, f"{prefix}reserved_memory_mb": reserved}
    measurements = {side: set_up() for side, set_up in sides.items()}
    turns = [{side: take() for side, take in measurements.items()} for _ in range(1 + repeats)][1:]
    ms = {side: 1e3 * statistics.median(turn[side] for turn in turns) for side in sides}
    memory = memory or {"peak_memory_mb": peak_memory_mb(device)}
    row = {"part": name, "unit": part.unit, **ms, "ratio": ms["reference"] / ms["ours"], **memory}
    scale = part.images / 1e-3 if part.unit == "ms/step" else 1e3
    return row | {"images_per_s": scale / ms["ours"], "reference_images_per_s": scale / ms["reference"]}


def floors(opts: argparse.Namespace) -> dict[str, float]:
    """What no code gets below, in the units of the parts: reading the files, and the network's floating-point
    operations at the rate of a large matrix product in the same dtype."""
    split, start = build_dataset("folder", opts.folder, "train"), time.perf_counter()
    for path in [*split.images, *split.masks]:
        with Image.open(path) as picture:
            picture.load()
    read = 1e3 * (time.perf_counter() - start) / len(split)
    square = torch.randn(MATRIX, MATRIX, device=opts.device).to(opts.amp or torch.float32)
    product = timed(lambda: square @ square, opts.device)
    seconds = min(product() for _ in range(6))
    flops_per_ms = 2 * MATRIX**3 / seconds / 1e3
    print(
        f"Floors: decoding JPEG and PNG {read:.2f} ms an image; {flops_per_ms / 1e6:,.0f} GFLOP/s in a product of "
        f"{str(square.dtype).removeprefix('torch.')} matrices of {MATRIX}, so for a forward pass of {opts.model}"
    )
    picture, crop, step = PICTURE, (opts.crop_size,) * 2, (opts.step_crop_size,) * 2
    least = {}
    for height, width in {picture, crop, step}:
        count = forward_flops(opts, height, width)
        least[height, width] = count / flops_per_ms
        print(f"    {width}x{height}: {count / 1e9:.0f} GFLOP, {least[height, width]:.1f} ms at least")
    training = 3 * opts.step_batch_size * least[step]  # backward: two products for each of the forward pass
    steps = dict.fromkeys(("train_step", "train_step_compiled"), training)
    loaders = {"loader": read, "loader_like_for_like": read, "loader_2_workers": read / 2}
    return steps | loaders | {"predict": least[crop], "validation": read + least[picture]}


def forward_flops(opts: argparse.Namespace, height: int, width: int) -> int:
    """Of one picture; a multiplication and an addition are two."""
    with torch.device("meta"):  # nothing is computed
        model = build_model(opts.model, num_classes=NUM_CLASSES, output_stride=opts.output_stride).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, height, width))
    return counter.get_total_flops()


def format_table(rows: list[dict]) -> list[str]:
    memory = "MB" if any("reserved_memory_mb" in row for row in rows) else "MB so far"  # of the process, on the CPU
    heads = ["part", "unit", "ours", "reference", "ratio", "floor", "images/s", "reference", memory]
    table = [heads]
    for row in rows:
        times = [f"{row[side]:.2f}" for side in ("ours", "reference")]
        floor = f"{row['floor']:.2f}" if row["floor"] else "-"
        speeds = [f"{row[side]:.1f}" for side in ("images_per_s", "reference_images_per_s")]
        ratio, memory = f"{row['ratio']:.2f}x", f"{row['peak_memory_mb']:.0f}"
        table.append([row["part"], row["unit"], *times, ratio, floor, *speeds, memory])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in table]


@exit_codes
def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    opts = parse(argv)
    print(
        f"Device: {device_name(opts.device)}, {str(opts.amp or torch.float32).removeprefix('torch.')}, {opts.model}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if opts.scaling:
            from utils.benchmark.scaling import print_tables  # here, for it imports this module

            return print_tables(opts, Path(folder))
        num_val = DISTINCT if opts.device.type == "cuda" else 8
        opts.folder = write_pictures(Path(folder), DISTINCT, num_val=num_val, size=PICTURE)
        rows = []
        for name in opts.parts:
            print(f"{name} ...", flush=True)
            rows.append(measure(name, PARTS[name](opts), device=opts.device, repeats=opts.repeats))
        least = floors(opts)
    rows = [row | {"floor": least.get(row["part"])} for row in rows]
    print("\n".join(format_table(rows)))
    if opts.json:
        write_text(opts.json, json.dumps(rows, indent=1) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, with device, amp and sizes settled. Raises InputError for what cannot be measured here."""
    parser = Parser(prog="python -m utils.benchmark", description="Speed and memory against plain references.")
    add, count = parser.add_argument, number(int, 1)
    add("--device", default="auto", metavar="NAME", help="auto: cuda where there is one, otherwise cpu")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="mixed precision of ours")
    add("--json", type=Path, metavar="FILE", help="write the rows there too")
    add("--parts", metavar="LIST", help=f"of {','.join(PARTS)} (default: what fits the device)")
    add("--repeats", type=count, default=7, metavar="N", help="turns of ours and the reference")
    add("--model", choices=MODELS, default="deeplabv3plus_resnet50", metavar="NAME", help="as in main.py")
    add("--output_stride", type=int, choices=[16, 8], default=16, help="as in main.py")
    add("--crop_size", type=count, default=513, metavar="N", help="of the loader; pixels a side of predict")
    add("--batch_size", type=number(int, 1, DISTINCT), default=16, metavar="N", help="of the loader")
    add("--step_crop_size", type=count, metavar="N", help="of train_step (default: 513, on the CPU 257)")
    add("--step_batch_size", type=number(int, 2, DISTINCT), metavar="N", help="likewise (default: 8, on the CPU 2)")
    add("--num_workers", type=number(int, 0), default=2, metavar="N", help="of validation and training on a GPU")
    add("--compile", action="store_true", help="train_step with torch.compile as well")
    add("--scaling", action="store_true", help="tables of the cost as the work grows, instead")
    opts = parser.parse_args(argv)
    opts.device = choose_device(opts.device)
    opts.amp = choose_amp(opts.amp, opts.device)
    on_cpu = opts.device.type == "cpu"
    opts.step_crop_size = opts.step_crop_size or (257 if on_cpu else 513)
    opts.step_batch_size = opts.step_batch_size or (2 if on_cpu else 8)
    if opts.parts:
        opts.parts = opts.parts.split(",")
        if unknown := [name for name in opts.parts if name not in PARTS]:
            raise InputError(f"--parts {unknown[0]}: there are {', '.join(PARTS)}")
    else:
        left_out = {"train_step_compiled"} - ({"train_step_compiled"} if opts.compile else set())
        left_out |= set(ON_CUDA) if on_cpu else set()
        opts.parts = [name for name in PARTS if name not in left_out]
    if opts.json and not opts.json.parent.is_dir():
        raise InputError(f"--json {opts.json}: there is no folder {opts.json.parent}; make it, or give another")
    return opts


if __name__ == "__main__":
    main()
