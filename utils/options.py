"""Defines the flags of `main.py` and checks which of them go together.

After a change to a flag or its help, run `python -m utils.options > docs/flags.md`.
"""

import argparse

import torch

from datasets import DATASETS
from datasets.loader import DATA_FLAGS
from datasets.stats import CLASS_WEIGHTS
from datasets.transforms import parse_scales
from network import TORCHVISION, require_model
from utils.cli import Parser, any_path, inner_path, number
from utils.engine import parse_tta
from utils.errors import InputError
from utils.loss import ADDITIVE_LOSSES, LOSSES
from utils.weights.load import MODEL_DEFAULTS

TEST_FLAGS = {"tta": None, "eval_output_stride": None, "crop_val": False, "against": None}  # with their defaults
# Flags that may differ between two starts of a run without changing what it computes.
START_FLAGS = {"continue_training", "test_only", "ckpt", "download", "run_name", "run_dir", "num_workers"}
START_FLAGS |= {"print_interval", "enable_vis", "vis_port", "vis_env", "vis_num_samples", "tensorboard"}
START_FLAGS |= {"allow_absent"}
START_FLAGS |= {"backbone_weights", "init_from"}


def check_options(opts: argparse.Namespace, *, processes: int = 1) -> None:
    """Raises InputError for flags that contradict each other or do not work with that many processes."""
    if opts.test_only and opts.continue_training:
        raise InputError("--test_only: excludes --continue_training; leave one of them out")
    part, rest = divmod(opts.batch_size, opts.grad_accum)
    if rest:
        raise InputError(
            f"--grad_accum {opts.grad_accum}: does not divide --batch_size {opts.batch_size}; change one of them"
        )
    part, rest = divmod(part, processes)
    if rest and not opts.test_only:
        raise InputError(
            f"--batch_size {opts.batch_size} --grad_accum {opts.grad_accum}: cannot be shared equally by {processes} "
            f"processes; give a multiple of {opts.grad_accum * processes}"
        )
    if part == 1 and not opts.test_only and not opts.freeze_bn:
        share = f" over {processes} processes" if processes > 1 else ""
        raise InputError(
            f"--batch_size {opts.batch_size} --grad_accum {opts.grad_accum}{share}: leaves one image at a time, but "
            "after the ASPP's global pooling batch normalisation needs two or more; raise --batch_size, or give "
            "--freeze_bn"
        )
    if opts.export and (not opts.ckpt or opts.test_only or opts.continue_training):
        raise InputError("--export: needs --ckpt and excludes --test_only and --continue_training; change the flags")
    if opts.export and processes > 1:
        raise InputError(f"--export: needs one process, not {processes}; start it without torchrun")
    if opts.init_from and (opts.ckpt or opts.test_only):
        raise InputError("--init_from: starts a training and excludes --ckpt and --test_only; leave one of them out")
    if opts.class_weights != "none" and opts.loss_type == "lovasz_softmax":
        raise InputError(
            f"--class_weights {opts.class_weights}: lovasz_softmax already weights all classes equally; use none"
        )
    if opts.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401  # only to see that it works
        except ImportError as error:
            raise InputError(f"--tensorboard: needs a package ({error}); pip install tensorboard") from None
    for name, default in TEST_FLAGS.items():
        if getattr(opts, name) != default and not opts.test_only:
            raise InputError(f"--{name}: works with --test_only alone, not in training; leave it out")


def notes_on_batches(opts: argparse.Namespace, device: torch.device, *, processes: int) -> list[str]:
    """Returns a log line for each computation that does not see the whole batch of a step."""
    part = opts.batch_size // opts.grad_accum // processes
    if opts.test_only or part == opts.batch_size:
        return []
    notes, synchronised = [], processes > 1 and device.type == "cuda"
    seen = part * (processes if synchronised else 1)
    if seen < opts.batch_size and not opts.freeze_bn:
        reason = "because of --grad_accum" if opts.grad_accum > 1 else "it is synchronised on GPUs only"
        notes.append(f"Batch normalisation sees {seen} of {opts.batch_size} images at a time ({reason})")
    if opts.loss_type not in ADDITIVE_LOSSES:
        notes.append(f"{opts.loss_type} is computed on {part} images at a time and averaged over the step")
    return notes


def memory_advice(opts: argparse.Namespace, itr: int, *, amp: torch.dtype | None, processes: int) -> str:
    """Returns the message for a training step that ran out of memory: what to lower.

    Nothing is saved after it, because the failed pass has already changed the statistics of batch norms.
    """
    part = opts.batch_size // opts.grad_accum // processes
    advice = f"give --grad_accum {2 * opts.grad_accum}" if part % 2 == 0 and part > 2 else "lower --batch_size"
    advice += ", lower --crop_size" + ("" if amp else ", or give --amp auto")
    return (
        f"iteration {itr}: the device's memory is too small for {part} crops of {opts.crop_size} pixels at a time; "
        f"{advice}"
    )


def require_labels(matrix: torch.Tensor, opts: argparse.Namespace) -> torch.Tensor:
    """Returns the confusion matrix of an evaluation. Raises InputError if not one pixel was labelled."""
    if not matrix.any():
        flag = f"--crop_size {opts.crop_size}" if opts.crop_val else f"--val_split {opts.val_split}"
        raise InputError(f"{flag}: not one of the pixels to score is labelled; give another")
    return matrix


def option_differences(opts: argparse.Namespace, checkpoint: dict) -> list[str]:
    """Returns a line for each option whose value differs from the checkpoint's training."""
    stored, now = checkpoint["options"], vars(opts)
    names = DATA_FLAGS if opts.test_only else [name for name in now if name not in START_FLAGS | TEST_FLAGS.keys()]
    return [
        f"{name}: {stored[name]} in the checkpoint, {now[name]} now"
        for name in names
        if name in stored and stored[name] != now[name]
    ]


def get_parser() -> argparse.ArgumentParser:
    """Builds the parser of `main.py`. The defaults are the README's experiment on PASCAL VOC."""
    parser = Parser(
        prog="main.py",
        usage="main.py [--dataset voc|folder|shapes] [flags]",
        description="Train, evaluate and resume DeepLabV3 and DeepLabV3+.",
    )
    count, ratio, share = number(int, 1), number(float, 0), number(float, 0, 1)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="voc", help="folder: your own masks; shapes: generated, no download")
    text = "folder that holds VOCdevkit (voc), the data folder itself (folder), or where to draw (shapes)"
    add("--data_root", type=any_path, metavar="DIR", default="datasets/data", help=text)
    text = "VOC only; 2012_aug: 10,582 images with the masks of SBD"
    add("--year", choices=["2012", "2012_aug"], default="2012", help=text)
    add("--download", action="store_true", help="download VOC 2012 (2 GB) if it is missing")
    add("--train_split", type=inner_path, metavar="LIST", default="train", help="list of images to train on")
    add("--val_split", type=inner_path, metavar="LIST", default="val", help="list to validate on, or to test on")
    add("--allow_absent", action="store_true", help="train on your own masks although none shows some class")
    add("--skip_bad", action="store_true", help="check all files first; log damaged ones and leave them out")

    add = parser.add_argument_group("model").add_argument
    text = (
        f"deeplabv3plus_NAME or deeplabv3_NAME; NAME: {', '.join(TORCHVISION)} or any convolutional network of timm"
    )
    text += f" (default: the checkpoint's, or {MODEL_DEFAULTS['model']})"
    add("--model", type=_model, metavar="NAME", help=text)
    text = "stride of the last feature map; MobileNetV3 has 16 only (default: the checkpoint's, or 16)"
    add("--output_stride", type=int, choices=[16, 8], help=text)
    text = "separable convolutions in the head: smaller and faster (default: as the checkpoint)"
    add("--separable_conv", action="store_true", default=None, help=text)
    text = "imagenet (downloaded), none, or a FILE of torchvision or timm; ignored with --ckpt and --init_from"
    add("--backbone_weights", type=any_path, default="imagenet", metavar="FILE", help=text)

    add = parser.add_argument_group("training").add_argument
    add("--total_itrs", metavar="N", type=count, default=5000, help="iterations (optimizer steps) in all")
    add("--batch_size", metavar="N", type=count, default=8, help="images per step; 2 or more in each process")
    text = "split each step's batch into N parts, to save memory; batch norm sees one part at a time"
    add("--grad_accum", metavar="N", type=count, default=1, help=text)
    add("--crop_size", metavar="N", type=count, default=513, help="side of the training crop in pixels")
    text = "smallest and largest random scale"
    add("--train_scale", metavar="LOW,HIGH", type=_scales, default="0.5,2.0", help=text)
    text = "random change of brightness, contrast and saturation: 0 is none, 0.4 a lot"
    add("--color_jitter", metavar="X", type=share, default=0.0, help=text)
    add("--num_workers", metavar="N", type=number(int, 0), default=2, help="processes that load data")
    add("--lr", metavar="X", type=ratio, default=0.01, help="learning rate of the head")
    text = "backbone learning rate as a fraction of --lr"
    add("--backbone_lr_factor", metavar="X", type=ratio, default=0.1, help=text)
    add("--momentum", metavar="X", type=share, default=0.9, help="SGD momentum")
    add("--weight_decay", metavar="X", type=ratio, default=1e-4, help="L2 penalty on every parameter")
    add("--lr_policy", choices=["step", "poly"], default="step", help="StepLR, or poly: power 0.9, zero at the end")
    add("--step_size", metavar="N", type=count, default=1000, help="StepLR: iterations between drops")
    add("--gamma", metavar="X", type=share, default=0.9, help="StepLR: factor at each drop")
    add("--warmup_itrs", metavar="N", type=number(int, 0), default=0, help="iterations of linear warm-up")
    text = "keep the batch-norm statistics of the initial weights; still train scale and shift"
    add("--freeze_bn", action="store_true", help=text)
    add("--loss_type", choices=LOSSES, default="cross_entropy", help="utils/loss.py says when each helps")
    add("--focal_gamma", metavar="X", type=ratio, default=2.0, help="focal_loss: gamma; 0 is cross-entropy")
    text = "OHEM: a pixel is easy if its class is more probable than this"
    add("--ohem_threshold", metavar="X", type=share, default=0.7, help=text)
    add("--ohem_keep", metavar="X", type=share, default=0.25, help="OHEM: smallest share of the pixels to keep")
    text = "counted from the training masks, with mean 1 per pixel; not with lovasz_softmax"
    add("--class_weights", choices=["none", *CLASS_WEIGHTS], default="none", help=text)
    add("--val_interval", metavar="N", type=number(int, 0), default=0, help="iterations per validation; 0: one epoch")
    text = "stop after N validations without a better mIoU; 0: never"
    add("--patience", metavar="N", type=number(int, 0), default=0, help=text)
    add("--val_batch_size", metavar="N", type=count, default=8, help="images of one size per batch, at native size")
    add("--print_interval", metavar="N", type=count, default=10, help="iterations between loss lines")
    text = "seed of weights, order and augmentation"
    add("--random_seed", metavar="N", type=number(int, 0, 2**32 - 1), default=1, help=text)
    add("--device", metavar="NAME", default="auto", help="auto: cuda if available, otherwise cpu")
    text = "mixed precision; auto: bf16 where the device has it, fp16 on older GPUs with tensor cores, otherwise off"
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help=text)
    add("--compile", action="store_true", help="use torch.compile; if it fails, train without it")

    add = parser.add_argument_group("run").add_argument
    add("--run_name", type=inner_path, metavar="NAME", help="(default: MODEL_DATASET_osSTRIDE_LOSS)")
    add("--run_dir", type=any_path, metavar="DIR", default="runs", help="folder of all runs")
    text = "checkpoint to start from, test or resume, also a published one; voc: the bundled model; torchvision: "
    text += "downloads its DeepLabV3"
    add("--ckpt", type=any_path, metavar="FILE", help=text)
    add("--export", type=any_path, metavar="FILE.onnx", help="write --ckpt as ONNX and check it; no data needed")
    add("--export_opset", metavar="N", type=int, default=18, help="ONNX opset for --export: 18 to 23")
    text = "start from the tensors of this checkpoint that fit (other classes, another head); the log lists the rest"
    add("--init_from", type=any_path, metavar="FILE", help=text)
    add("--continue_training", action="store_true", help="resume from the run's latest.pth, or from --ckpt")
    add("--test_only", action="store_true", help="evaluate --ckpt (or the run's best.pth) on --val_split")
    add("--save_val_results", action="store_true", help="save predicted masks and overlays of the evaluated images")

    add = parser.add_argument_group("test (with --test_only)").add_argument
    add("--tta", metavar="LIST", type=_tta, help="average flip and scales, such as flip,0.5,0.75,1.0,1.25,1.5,1.75")
    add("--eval_output_stride", type=int, choices=[16, 8], help="output stride of the test (default: as trained)")
    text = "folder of another test of the same images: print the difference with its 95%% interval"
    add("--against", type=any_path, metavar="DIR", help=text)
    add("--crop_val", action="store_true", help="score centre crops of --crop_size; not comparable with whole images")

    add = parser.add_argument_group("dashboard").add_argument
    add("--enable_vis", action="store_true", help="send curves to a visdom server, see docs/dashboard.md")
    add("--tensorboard", action="store_true", help="write them to runs/NAME/tb for tensorboard --logdir runs")
    add("--vis_port", metavar="N", type=number(int, 1, 65535), default=8097, help="port of the server")
    add("--vis_env", metavar="NAME", default="main", help="visdom environment")
    text = "strips of image | ground truth | prediction"
    add("--vis_num_samples", metavar="N", type=number(int, 0), default=8, help=text)
    return parser


def _model(text: str) -> str:
    try:
        return require_model(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--model: ").removeprefix("--model ")) from None


def _scales(text: str) -> str:
    try:
        parse_scales(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--train_scale ")) from None
    return text


def _tta(text: str) -> str:
    try:
        parse_tta(text)  # options stay plain text, as options.json and checkpoints store them
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--tta ")) from None
    return text


def flags_page() -> str:
    """Returns docs/flags.md: a table of flag, default and help for each group of flags."""
    lines = ["# Flags of main.py", "", "`python -m utils.options > docs/flags.md` writes this page from the parser."]
    lines += ["`--help` prints the same texts. A flag without a default is off or unset."]
    for group in get_parser()._action_groups:
        rows = [action for action in group._group_actions if action.dest != "help"]
        if rows:
            lines += ["", f"## {group.title.capitalize()}", "", "| flag | default | help |", "| --- | --- | --- |"]
        for action in rows:
            values = action.metavar or r"\|".join(map(str, action.choices or ()))
            flag = f"{action.option_strings[0]} {values}".strip()
            default = "" if action.default is None or action.default is False else f"`{action.default}`"
            text = action.help.replace("|", r"\|").replace("%%", "%")
            lines += [f"| `{flag}` | {default} | {text} |"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(flags_page(), end="")
