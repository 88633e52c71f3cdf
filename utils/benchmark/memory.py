"""What a training step takes of one GPU's memory, counted without one:

    python -m utils.benchmark.memory --batch_size 16 --grad_accum 2 --crop_size 513

It takes the command line of a training. The model, its stride, batch, parts, crop, loss, class weights, momentum and
`--freeze_bn` count, other flags make no difference, and those that would, but cannot be counted, are refused.
The step is taken with tensors that have a size and no values. What the libraries need for their own work is not
counted, nor are the CUDA context and, of several processes, the gradients that travel.
"""

import argparse

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker  # torch's own, though not yet in a public module

from datasets import shapes
from datasets.transforms import train_transform
from datasets.voc import VOC_CLASSES
from network import build_model
from utils.benchmark.reference import with_plain_layers
from utils.cli import exit_codes, number
from utils.engine import autocast
from utils.errors import InputError
from utils.loss import build_loss
from utils.options import get_parser, require_fitting, settle_model

CPU = torch.device("cpu")  # its tensors are as large, once the layers are the plain ones, as they are on a GPU
KINDS = {  # MemTracker's, at a moment in time
    "weights": ("Parameter", "Buffer"),
    "gradients": ("Gradient",),
    "momentum": ("Optstate",),
    "activations": ("Activation",),  # those that the backward pass still needs
    "rest": ("Temp", "Other"),  # what the backward pass has in work; inputs
    "total": ("Total",),
}
CLASSES = {"voc": len(VOC_CLASSES), "shapes": shapes.NUM_CLASSES}
NOT_COUNTED = {  # flags that would change the figures, and what to do
    "ckpt": "give the --model and --output_stride that it has",
    "compile": "a compiled step keeps other tensors; leave it out",
    "test_only": "is no training; leave it out",
    "export": "is no training; leave it out",
}


def peak_of_step(opts: argparse.Namespace, amp: torch.dtype | None) -> dict[str, float]:
    """MiB at the peak of the second step, the first one with momentum, by kind.

    opts: main.py's, with a model, and `num_classes`.
    """
    with FakeTensorMode():
        model = with_plain_layers(
            build_model(opts.model, num_classes=opts.num_classes, output_stride=opts.output_stride)
        )
        model.freeze_bn = opts.freeze_bn
        model.train()
        weights = None if opts.class_weights == "none" else torch.ones(opts.num_classes)
        criterion = build_loss(opts.loss_type, focal_gamma=opts.focal_gamma, class_weights=weights)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=opts.momentum, weight_decay=opts.weight_decay, fused=True
        )
        tracker, parts = MemTracker(), opts.grad_accum
        tracker.track_external(model, optimizer)
        size = (opts.batch_size // parts, opts.crop_size, opts.crop_size)
        with tracker:
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                for _ in range(min(parts, 2)):  # a third part takes what the second does
                    tracker.reset_mod_stats()  # it follows one forward pass
                    images, targets = torch.empty(size[0], 3, *size[1:]), torch.empty(size, dtype=torch.uint8)
                    with autocast(CPU, amp):
                        loss = criterion(model(images), targets)
                    loss.backward()
                optimizer.step()
    peak = tracker.get_tracker_snapshot("peak")[CPU]
    return {name: sum(peak[kind] for kind in kinds) / 2**20 for name, kinds in KINDS.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """main.py's flags and the number of classes. Raises InputError for those that do not go together or count."""
    parser = get_parser()
    parser.prog, parser.usage = "memory.py", "python -m utils.benchmark.memory [--num_classes N] [flags of main.py]"
    parser.description = "Count what a training step takes of a GPU's memory."
    text = f"of the data set (default: {CLASSES['voc']} of voc, {CLASSES['shapes']} of shapes)"
    parser.add_argument("--num_classes", metavar="N", type=number(int, 2, 255), help=text)
    opts = parser.parse_args(argv)
    for name, advice in NOT_COUNTED.items():
        if getattr(opts, name):
            raise InputError(f"--{name}: {advice}")
    require_fitting(opts)
    train_transform(opts.crop_size)  # the crop, too, is what a training takes
    settle_model(opts, None)
    opts.num_classes = opts.num_classes or CLASSES.get(opts.dataset)
    if opts.num_classes is None:
        raise InputError(f"--dataset {opts.dataset}: is not opened here; give its --num_classes")
    return opts


@exit_codes
def main(argv: list[str] | None = None) -> None:
    """The command line above."""
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
