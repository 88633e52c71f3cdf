"""The flags of `main.py`, and what a checkpoint has to say about them."""

import argparse
from pathlib import Path

from datasets import DATASETS
from network import MODELS
from utils.checkpoint import load_checkpoint, load_newest, previous_of, require_training_state
from utils.cli import Parser, any_path, inner_path, number
from utils.engine import parse_tta
from utils.errors import InputError
from utils.loss import CLASS_WEIGHTS, LOSSES
from utils.run import Run
from utils.weights.onnx import DEFAULT_OPSET, OPSETS

MODEL_DEFAULTS = {"model": "deeplabv3plus_resnet50", "output_stride": 16}  # where no checkpoint decides
ABOUT_THE_DATA = ("dataset", "data_root", "year")
# What may differ between two starts of one run without changing what it computes.
ABOUT_THE_START = {"continue_training", "test_only", "ckpt", "download", "run_name", "run_dir", "num_workers"}
ABOUT_THE_START |= {"print_interval", "enable_vis", "vis_port", "vis_env", "vis_num_samples"}
ABOUT_THE_START |= {"backbone_weights", "init_from"}
ABOUT_THE_TEST = {"tta": None, "eval_output_stride": None, "crop_val": False}  # with their defaults


def default_run_name(opts: argparse.Namespace, checkpoint: dict | None) -> str:
    known = checkpoint["options"] if checkpoint else {}
    model, stride = (getattr(opts, name) or known.get(name, default) for name, default in MODEL_DEFAULTS.items())
    weights = "" if opts.class_weights == "none" else f"_{opts.class_weights}"
    return f"{model}_{opts.dataset}_os{stride}_{opts.loss_type}{weights}"


def folder_of_test(opts: argparse.Namespace, trained: dict) -> str:
    """`test_<split>`, with what is not the plain evaluation on the data of the training, whose options `trained` are:
    one does not overwrite the other."""
    now, then = ((known.get("dataset"), known.get("data_root")) for known in (vars(opts), trained))
    data = "" if None in then or now == then else f"_{opts.dataset}_{Path(opts.data_root).resolve().name}"
    stride = f"_os{opts.eval_output_stride}" if opts.eval_output_stride else ""
    tta = ""
    if opts.tta:
        flip, scales = parse_tta(opts.tta)
        tta = "_tta" + "_flip" * flip + "".join(f"_{scale:g}" for scale in sorted(scales))
    return f"test_{opts.val_split}{data}{stride}{tta}" + (f"_crop{opts.crop_size}" if opts.crop_val else "")


def require_fitting(opts: argparse.Namespace, *, processes: int = 1) -> None:
    """Raises InputError for flags that do not go with each other, or with so many processes."""
    if opts.test_only and opts.continue_training:
        raise InputError("--test_only: goes without --continue_training; leave one of them out")
    part, rest = divmod(opts.batch_size, opts.grad_accum)
    if rest:
        raise InputError(
            f"--grad_accum {opts.grad_accum}: does not divide --batch_size {opts.batch_size}; change one"
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
            f"--batch_size {opts.batch_size} --grad_accum {opts.grad_accum}{share}: after the ASPP's global pooling, "
            "batch normalisation would have one value a channel to take mean and deviation of; give 2 images or more "
            "a part, or --freeze_bn"
        )
    if opts.export and (not opts.ckpt or opts.test_only or opts.continue_training):
        raise InputError("--export: takes a --ckpt, and neither --test_only nor --continue_training; change that")
    if opts.init_from and (opts.ckpt or opts.test_only):
        raise InputError("--init_from: starts a training, without --ckpt and --test_only; leave one of them out")
    if opts.class_weights != "none" and opts.loss_type == "lovasz_softmax":
        raise InputError(
            f"--class_weights {opts.class_weights}: lovasz_softmax weighs classes alike by itself; use none"
        )
    for name, default in ABOUT_THE_TEST.items():
        if getattr(opts, name) != default and not opts.test_only:
            raise InputError(f"--{name}: is for --test_only; validation in training is plain; leave it out")


def settle_model(opts: argparse.Namespace, checkpoint: dict | None) -> None:
    """Fills in model and output stride: the checkpoint's, or the defaults.

    Raises InputError where a flag given on the command line contradicts the checkpoint.
    """
    for name, default in MODEL_DEFAULTS.items():
        given, stored = getattr(opts, name), checkpoint["options"][name] if checkpoint else None
        is_guess = checkpoint and name == "output_stride" and "published" in checkpoint  # such files do not tell
        if checkpoint and given is not None and given != stored and not is_guess:
            raise InputError(f"--{name} {given}: contradicts {opts.ckpt}, which has {stored}; leave the flag out")
        setattr(opts, name, given or stored or default)


def find_run(opts: argparse.Namespace, *, processes: int = 1) -> tuple[Run, dict | None]:
    """The folder to write to, and the checkpoint to begin with, None to begin from scratch.

    Fills in `opts.model`, `opts.output_stride`, `opts.run_name` and `opts.ckpt`.
    """
    require_fitting(opts, processes=processes)
    checkpoint = load_checkpoint(opts.ckpt, model=opts.model) if opts.ckpt else None
    opts.run_name = opts.run_name or default_run_name(opts, checkpoint)
    run = Run(Path(opts.run_dir) / opts.run_name)

    own = run.folder / ("best.pth" if opts.test_only else "latest.pth")
    if run.is_of_this_job and not opts.test_only:  # torchrun has started it anew
        opts.continue_training |= own.exists() or previous_of(own).exists()
    elif run.exists and not opts.continue_training and not opts.test_only:
        raise InputError(f"{run.folder}: that run exists; --continue_training goes on, --run_name starts another")
    if opts.test_only and checkpoint is None:
        opts.ckpt, checkpoint = str(own), load_checkpoint(own)
    elif opts.continue_training and (own.exists() or previous_of(own).exists()):
        newest, loaded, damage = load_newest(own)
        if damage:
            run.log(f"warning: {str(damage).removeprefix('--ckpt ')}; the run goes on from {newest}")
            run.damaged = own
        elif checkpoint and Path(opts.ckpt) != own:
            run.log(f"{own} is there: the run goes on from it, not from {opts.ckpt}")
        opts.ckpt, checkpoint = str(newest), loaded
    elif opts.continue_training and checkpoint is None:
        known = sorted(path.parent.name for path in run.folder.parent.glob("*/latest.pth"))
        others = f" (there are {', '.join(known[:10])})" if known else ""
        run.log(f"{own} is not there: the run starts from the beginning{others}")
    if checkpoint and opts.continue_training:
        require_training_state(checkpoint, opts.ckpt)
    settle_model(opts, checkpoint)
    if opts.eval_output_stride == 8 and "mobilenet" in opts.model:
        raise InputError("--eval_output_stride 8: MobileNetV3 has 16 only; leave it out, or use a ResNet")

    if opts.test_only:  # beside the checkpoint's own run, where it belongs to one, and on its division of the data
        opts.random_seed = checkpoint["options"].get("random_seed", opts.random_seed)
        beside = Path(opts.ckpt).parent
        folder = beside if (beside / "options.json").is_file() else run.folder
        run = Run(folder / folder_of_test(opts, checkpoint["options"]))
    return run, checkpoint


def differences(opts: argparse.Namespace, checkpoint: dict) -> list[str]:
    """A line per option whose value is not what the checkpoint was trained with."""
    stored, now = checkpoint["options"], vars(opts)
    names = [name for name in now if name not in ABOUT_THE_START | ABOUT_THE_TEST.keys()]
    names = ABOUT_THE_DATA if opts.test_only else names
    return [
        f"{name}: {stored[name]} in the checkpoint, {now[name]} now"
        for name in names
        if name in stored and stored[name] != now[name]
    ]


def get_parser() -> argparse.ArgumentParser:
    """The flags of `main.py`: the defaults are the experiment of the README on PASCAL VOC."""
    parser = Parser(
        prog="main.py",
        usage="main.py [--dataset voc|folder|shapes] [flags]",
        description="Train, evaluate and resume DeepLabV3 and DeepLabV3+.",
    )
    count, ratio = number(int, 1), number(float, 0)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="voc", help="shapes is generated: nothing to download")
    text = "of voc: what holds VOCdevkit; of folder: itself"
    add("--data_root", type=any_path, metavar="DIR", default="datasets/data", help=text)
    add("--year", choices=["2012", "2012_aug"], default="2012", help="of voc")
    add("--download", action="store_true", help="fetch VOC 2012 (2 GB) unless it is there")
    add("--train_split", type=inner_path, metavar="LIST", default="train", help="a list in ImageSets/Segmentation")
    text = "the list to validate or, with --test_only, to test on"
    add("--val_split", type=inner_path, metavar="LIST", default="val", help=text)
    add("--skip_bad", action="store_true", help="look at all files first and leave out those that are damaged")

    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        choices=MODELS,
        metavar="NAME",
        help=f"{', '.join(MODELS)} (default: the checkpoint's, or {MODEL_DEFAULTS['model']})",
    )
    add("--output_stride", type=int, choices=[16, 8], help="(default: the checkpoint's, or 16)")
    text = "imagenet (downloaded), none, or a FILE"
    add("--backbone_weights", type=any_path, default="imagenet", metavar="FILE", help=text)

    add = parser.add_argument_group("training").add_argument
    add("--total_itrs", metavar="N", type=count, default=5000, help="iterations (optimizer steps) in all")
    add("--batch_size", metavar="N", type=count, default=8, help="images a step, over all processes")
    add("--grad_accum", metavar="N", type=count, default=1, help="parts of a step's batch, where memory is small")
    add("--crop_size", metavar="N", type=count, default=513, help="pixels, of the square training crop")
    add("--num_workers", metavar="N", type=number(int, 0), default=2, help="processes that load data")
    add("--lr", metavar="X", type=ratio, default=0.01, help="learning rate of the head")
    add("--backbone_lr_factor", metavar="X", type=ratio, default=0.1, help="lr of the backbone over --lr")
    add("--momentum", metavar="X", type=number(float, 0, 1), default=0.9, help="of SGD")
    add("--weight_decay", metavar="X", type=ratio, default=1e-4, help="on every parameter")
    add("--lr_policy", choices=["step", "poly"], default="step", help="poly: power 0.9")
    add("--step_size", metavar="N", type=count, default=1000, help="of step: iterations between two drops")
    add("--gamma", metavar="X", type=number(float, 0, 1), default=0.9, help="of step: factor at each drop")
    add("--warmup_itrs", metavar="N", type=number(int, 0), default=0, help="iterations of linear warm-up")
    share = number(float, 0, 1)
    add("--freeze_bn", action="store_true", help="batch norms keep the statistics that the weights came with")
    add("--loss_type", choices=LOSSES, default="cross_entropy", help="see utils/loss.py")
    add("--focal_gamma", metavar="X", type=ratio, default=2.0, help="of focal_loss; 0 is cross-entropy")
    add("--ohem_threshold", metavar="X", type=share, default=0.7, help="of ohem: pixels of a higher p are easy")
    add("--ohem_keep", metavar="X", type=share, default=0.25, help="of ohem: least share of the pixels to keep")
    text = "from the training set's pixels; not for lovasz_softmax"
    add("--class_weights", choices=["none", *CLASS_WEIGHTS], default="none", help=text)
    add("--val_interval", metavar="N", type=number(int, 0), default=0, help="iterations; 0: every epoch")
    add("--val_batch_size", metavar="N", type=count, default=8, help="images, of one size, at native size")
    add("--print_interval", metavar="N", type=count, default=10, help="iterations between two loss lines")
    seed = number(int, 0, 2**32 - 1)
    add("--random_seed", metavar="N", type=seed, default=1, help="of weights, order and augmentation")
    add("--device", metavar="NAME", default="auto", help="auto: cuda where there is one, otherwise cpu")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the training step; falls back with a warning")

    add = parser.add_argument_group("run").add_argument
    add("--run_name", type=inner_path, metavar="NAME", help="(default: <model>_<dataset>_os<stride>_<loss>)")
    add("--run_dir", type=any_path, metavar="DIR", default="runs", help="where runs are kept")
    text = "weights to start from, to test, or to go on from; torchvision: its DeepLabV3, downloaded"
    add("--ckpt", type=any_path, metavar="FILE", help=text)
    add("--export", type=any_path, metavar="FILE.onnx", help="write --ckpt as ONNX, check it, and do no more")
    text = f"of --export: {OPSETS[0]} to {OPSETS[-1]}"
    add("--export_opset", metavar="N", type=int, default=DEFAULT_OPSET, help=text)
    text = "start from what fits of a checkpoint, on other classes or with the other head"
    add("--init_from", type=any_path, metavar="FILE", help=text)
    add("--continue_training", action="store_true", help="go on from the run's latest.pth, or --ckpt")
    add("--test_only", action="store_true", help="score --ckpt (or the run's best.pth) on --val_split")
    add("--save_val_results", action="store_true", help="save id masks and overlays of the pictures")

    add = parser.add_argument_group("test (with --test_only)").add_argument
    add("--tta", metavar="LIST", type=_tta, help="mean over flip and scales: flip,0.5,0.75,1.0,1.25,1.5,1.75")
    text = "test at another stride than the model was trained at"
    add("--eval_output_stride", type=int, choices=[16, 8], help=text)
    add("--crop_val", action="store_true", help="centre crops of --crop_size: comparable with other such scores only")

    add = parser.add_argument_group("dashboard").add_argument
    add("--enable_vis", action="store_true", help="send curves to a visdom server")
    add("--vis_port", metavar="N", type=number(int, 1, 65535), default=8097, help="the server's")
    add("--vis_env", metavar="NAME", default="main", help="the dashboard's environment")
    add("--vis_num_samples", metavar="N", type=number(int, 0), default=8, help="image | truth | prediction strips")
    return parser


def _tta(text: str) -> str:
    try:
        parse_tta(text)  # options stay plain text, as options.json and checkpoints keep them
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--tta ")) from None
    return text
