"""Counts the memory that a training step takes on one GPU. No GPU is needed.

    python -m utils.benchmark.memory --batch_size 16 --grad_accum 2 --crop_size 513

It takes the flags of main.py. Model, stride, batch, parts, crop, loss, class weights, momentum and `--freeze_bn`
matter. Other flags make no difference, or are refused if their effect cannot be counted.
The step runs on tensors that have a size but no values. Not counted: the libraries' own workspaces, the CUDA context,
and the gradients that several processes exchange.
"""

import argparse

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker  # torch's own, but not in a public module yet

from datasets import shapes
from datasets.transforms import train_transform
from datasets.voc import VOC_CLASSES
from network import build_model
from utils.cli import friendly_errors, number
from utils.engine import forward_backward
from utils.errors import InputError
from utils.loss import build_loss
from utils.options import check_options, get_parser
from utils.weights.load import resolve_model

CPU = torch.device("cpu")  # plain layers: each tensor has the size that it has on a GPU
KINDS = {  # MemTracker's names for what is there at one moment
    "weights": ("Parameter", "Buffer"),
    "gradients": ("Gradient",),
    "momentum": ("Optstate",),
    "activations": ("Activation",),  # those that the backward pass still needs
    "rest": ("Temp", "Other"),  # inputs, and what the backward pass is working on
    "total": ("Total",),
}
CLASSES = {"voc": len(VOC_CLASSES), "shapes": shapes.NUM_CLASSES}
NOT_COUNTED = {  # flags that would change the result, and what to do instead
    "ckpt": "is not read here; give its --model and --output_stride",
    "compile": "a compiled step keeps other tensors; leave it out",
    "test_only": "does not train; leave it out",
    "export": "does not train; leave it out",
}


def peak_of_step(opts: argparse.Namespace, amp: torch.dtype | None) -> dict[str, float]:
    """Counts MiB by kind at the peak of the second training step, the first that has momentum.

    opts: the flags of main.py with a model and a stride, and `num_classes`.
    """
    with FakeTensorMode():
        model = build_model(opts.model, num_classes=opts.num_classes, output_stride=opts.output_stride)
        model.freeze_bn = opts.freeze_bn
        model.train()
        weights = None if opts.class_weights == "none" else torch.ones(opts.num_classes)
        criterion = build_loss(opts.loss_type, weights=weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=opts.momentum, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        size = opts.crop_size, opts.crop_size
        with tracker:
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                # Two parts are enough: a third takes what the second does.
                for _ in range(min(opts.grad_accum, 2)):
                    # The tracker follows one forward pass.
                    tracker.reset_mod_stats()
                    images = torch.empty(opts.batch_size // opts.grad_accum, 3, *size, dtype=torch.uint8)
                    targets = torch.empty(len(images), *size, dtype=torch.uint8)
                    forward_backward(model, criterion, images, targets, scaler=scaler, amp=amp)
                optimizer.step()
    peak = tracker.get_tracker_snapshot("peak")[CPU]
    return {name: sum(peak[kind] for kind in kinds) / 2**20 for name, kinds in KINDS.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the flags of main.py and `--num_classes`. Raises InputError for flags that cannot be counted."""
    parser = get_parser()
    parser.prog, parser.usage = "memory.py", "python -m utils.benchmark.memory [--num_classes N] [flags of main.py]"
    parser.description = "Count the GPU memory of a training step."
    text = f"number of classes (default: the data set's, {CLASSES['voc']} for voc, {CLASSES['shapes']} for shapes)"
    parser.add_argument("--num_classes", metavar="N", type=number(int, 2, 255), help=text)
    opts = parser.parse_args(argv)
    for name, advice in NOT_COUNTED.items():
        if getattr(opts, name):
            raise InputError(f"--{name}: {advice}")
    check_options(opts)
    # Refuses a crop that no training could have.
    train_transform(opts.crop_size)
    resolve_model(opts, None)
    opts.num_classes = opts.num_classes or CLASSES.get(opts.dataset)
    if opts.num_classes is None:
        raise InputError(f"--dataset {opts.dataset}: is not opened here; give --num_classes")
    return opts


@friendly_errors
def main(argv: list[str] | None = None) -> None:
    """Prints a table for the flags above."""
    opts = parse(argv)
    peaks = {"float32": peak_of_step(opts, None), "bf16 or fp16": peak_of_step(opts, torch.bfloat16)}
    print(
        f"{opts.model}, output stride {opts.output_stride}, {opts.batch_size} crops of {opts.crop_size} in "
        f"{opts.grad_accum} part(s), {opts.num_classes} classes, {opts.loss_type}: MiB at the peak of a step"
    )
    print(f"{'':12}" + "".join(f"{name:>12}" for name in KINDS))
    for name, peak in peaks.items():
        print(f"{name:12}" + "".join(f"{mib:12,.0f}" for mib in peak.values()))


if __name__ == "__main__":
    main()
