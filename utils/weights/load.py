"""Reads checkpoints and weight files without executing anything in them, and loads weights into models."""

import argparse
import json
import logging
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision import models

from datasets.files import is_file, is_folder
from network import TORCHVISION, build_model
from network._deeplab import DeepLab
from network.backbone import IMAGENET_MEAN, IMAGENET_STD
from network.fast import fold_batchnorm, speed_up
from utils.errors import InputError
from utils.weights.published import (
    convert,
    download,
    download_torchvision,
    model_of,
    timm_weights,
    unnamed,
    weights_in,
)

KEYS = {"model_state", "optimizer_state", "scheduler_state", "scaler_state", "cur_itrs", "best_score"}
OWN_KEYS = {"best_itr", "scores", "options", "class_names", "palette"}  # files from elsewhere have none of these
KEYS |= OWN_KEYS
KINDS = {"model_state": dict, "optimizer_state": dict, "scheduler_state": dict, "scaler_state": dict, "cur_itrs": int}
KINDS |= {"best_score": (int, float), "best_itr": int, "options": dict, "class_names": list, "palette": list}
COUNTERS = "num_batches_tracked"  # in batch norms: unused with a fixed momentum, and absent from older files
PLAIN_SCALARS = set("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())  # NumPy's booleans, integers and floats
WEIGHTS = "torch.save(model.state_dict(), 'weights.pth')"
SAVE = "where the file came from, save the weights alone:"
BUNDLED = Path(__file__).parents[2] / "network/pretrained/deeplabv3plus_tf_efficientnet_lite0_voc.safetensors"
# Unless a checkpoint decides.
MODEL_DEFAULTS = {"model": "deeplabv3plus_resnet50", "output_stride": 16, "separable_conv": False}
CPU = torch.device("cpu")
log = logging.getLogger("deeplab")


class TrainedModel(NamedTuple):
    """A model rebuilt from a checkpoint, with what belongs to it."""

    model: DeepLab  # in evaluation mode, on its device
    class_names: list[str]
    palette: np.ndarray  # [256, 3] uint8 RGB
    options: dict  # the training's


def load_model(path: str | Path, device: torch.device = CPU) -> TrainedModel:
    """Rebuilds a model from a checkpoint alone: no data set, no download.

    path: as in `load_checkpoint`; "voc" is the bundled model. Raises InputError if the file is missing, damaged or
    something else.
    """
    return restore_model(load_checkpoint(path), path, device)


def restore_model(checkpoint: dict, path: str | Path, device: torch.device) -> TrainedModel:
    """Rebuilds a model from a checkpoint that is already in memory; `path` is for messages."""
    options, class_names = checkpoint["options"], checkpoint["class_names"]
    model = build_model(
        options["model"],
        num_classes=len(class_names),
        output_stride=options["output_stride"],
        separable_conv=options.get("separable_conv", False),
    )
    load_model_state(model, checkpoint, str(path))
    model = speed_up(model.to(device, memory_format=torch.channels_last).eval())
    # As in `engine.evaluate`.
    model = fold_batchnorm(model) if device.type == "cpu" else model
    return TrainedModel(model, class_names, np.array(checkpoint["palette"], np.uint8), options)


def resolve_model(opts: argparse.Namespace, checkpoint: dict | None) -> None:
    """Fills in `opts.model`, `opts.output_stride` and `opts.separable_conv`: the checkpoint's, or else the defaults.

    Without --model, --init_from decides like a checkpoint, but flags may differ from it. Raises InputError for a flag
    that contradicts the checkpoint, or a test stride that the backbone does not support.
    """
    start = {} if checkpoint else options_of_init(opts)
    for name, default in MODEL_DEFAULTS.items():
        given, stored = (
            getattr(opts, name),
            checkpoint["options"].get(name, default) if checkpoint else start.get(name),
        )
        # A published checkpoint does not state its stride.
        is_guess = checkpoint and name == "output_stride" and "published" in checkpoint
        if checkpoint and given is not None and given != stored and not is_guess:
            raise InputError(f"--{name} {given}: contradicts {opts.ckpt}, which has {stored}; leave the flag out")
        setattr(opts, name, given or stored or default)
    if opts.eval_output_stride == 8 and opts.model.endswith("_mobilenet_v3_large"):
        raise InputError("--eval_output_stride 8: MobileNetV3 supports 16 only; leave it out, or use a ResNet")


def options_of_init(opts: argparse.Namespace) -> dict:
    """Returns the options of `--init_from`'s checkpoint if they decide the model, because --model is not given."""
    if opts.init_from is None or opts.model is not None:
        return {}
    return load_checkpoint(opts.init_from, flag="--init_from")["options"]


def initial_model(
    opts: argparse.Namespace, checkpoint: dict | None, class_names: list[str], device: torch.device
) -> DeepLab:
    """Builds the model of `opts` on its device with the weights to start from.

    These are the checkpoint's, or those of `--init_from` or `--backbone_weights`. The head's random weights follow
    from `--random_seed`.
    """
    torch.manual_seed(opts.random_seed)
    # The weights fit either stride.
    stride = opts.eval_output_stride or opts.output_stride
    model = build_model(
        opts.model, num_classes=len(class_names), output_stride=stride, separable_conv=opts.separable_conv
    )
    model.freeze_bn = opts.freeze_bn
    if checkpoint:
        require_classes(checkpoint["class_names"], class_names, opts.ckpt)
        load_model_state(model, checkpoint, opts.ckpt)
        log.info("\n  ".join([f"Model restored from {opts.ckpt}", *checkpoint.get("notes", [])]))
    elif opts.init_from:
        log.info("\n".join(init_from(model, opts.init_from)))
    else:
        load_backbone(model, opts.model, opts.backbone_weights)
        if opts.freeze_bn:
            log.warning("--freeze_bn keeps the new batch norms at mean 0 and deviation 1; give --ckpt")
    model = model.to(device, memory_format=torch.channels_last)
    return model if opts.compile else speed_up(model)


def load_checkpoint(path: str | Path, *, flag: str = "--ckpt", model: str | None = None) -> dict:
    """Reads a checkpoint of this project, or a published one as `published.convert` presents it (key `published`).

    path: a file; "voc", the bundled model; or "torchvision" for its weights of `model` (None: DeepLabV3 ResNet-50),
    downloaded. A file with one of these names is `./voc`. Raises InputError for a missing or damaged file and for
    weights that fit no model here.
    """
    if str(path) == "torchvision":
        return download_torchvision(model, flag)
    content = load_file(BUNDLED if str(path) == "voc" else Path(path), flag)
    missing = sorted(KEYS - content.keys())
    if missing and OWN_KEYS & content.keys():
        raise InputError(f"{flag} {path}: not a checkpoint of main.py, {', '.join(missing)} is missing; give another")
    if missing:
        return convert(content, f"{flag} {path}")
    if odd := [name for name, kind in KINDS.items() if not isinstance(content[name], kind)]:
        raise InputError(f"{flag} {path}: not a checkpoint of main.py, its {odd[0]} has the wrong type; give another")
    if lacking := {"model", "output_stride"} - content["options"].keys():
        raise InputError(f"{flag} {path}: not a checkpoint of main.py, its options lack {min(lacking)}; give another")
    return content


def load_file(path: Path, flag: str) -> dict:
    """Reads a `torch.save` or `.safetensors` file on the CPU: tensors and builtins only.

    Two more kinds pass, because other training scripts save them beside the weights: `argparse.Namespace`, and
    NumPy's booleans, integers and floats, which become Python's. Anything else could be code and is refused by name.
    Raises InputError, naming the flag that the file came from.
    """
    if is_folder(path):
        raise InputError(f"{flag} {path}: this is a folder; name a file in it, such as best.pth")
    if not is_file(path):
        raise InputError(f"{flag} {path}: no such file; check the path")
    try:
        content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except ImportError:
        raise InputError(f"{flag} {path}: the package safetensors is missing; pip install safetensors") from None
    except pickle.UnpicklingError as error:
        where = f"{flag} {path}: holds more than tensors and builtins"
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(f"{where} ({named[1][:100]}), which could be code; {SAVE} {WEIGHTS}") from None
        raise InputError(f"{where}, or is not a checkpoint; give a file that this line wrote: {WEIGHTS}") from None
    except Exception as error:  # a damaged file can raise anything
        if "TorchScript" in str(error):
            line = WEIGHTS.replace("model", "torch.jit.load('model.pt')")
            raise InputError(f"{flag} {path}: is a TorchScript archive, which holds code; {SAVE} {line}") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{flag} {path}: cannot be read ({reason}); it may be incomplete") from None
    if not isinstance(content, dict):
        raise InputError(f"{flag} {path}: holds a {type(content).__name__}, not a dictionary; give another")
    return content


def _load_safetensors(path: Path) -> dict:
    """Reads a state dict, or a whole checkpoint as `utils.weights.bundle` writes it: the rest is in the metadata."""
    from safetensors import safe_open  # only such files and Segment Anything need it

    with safe_open(path, framework="pt") as file:
        state, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    if "deeplab" not in about:
        return state
    # Half precision is for the file alone.
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return {"model_state": state, **json.loads(about["deeplab"])}


def _load_pickle(path: Path) -> Any:
    scalar = [(_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")]  # NumPy 2 and NumPy 1
    allowed = torch.serialization.safe_globals([*scalar, (_DType, "numpy.dtype"), argparse.Namespace])
    # torch warns about pickle protocols, but the file loads or is refused.
    with allowed, warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


class _DType:
    """Replaces `numpy.dtype`, so that a file cannot make NumPy build types."""

    __slots__ = ("kind", "order")

    def __init__(self, kind: str, *_: object) -> None:
        self.kind, self.order = kind, "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _scalar(dtype: _DType, content: bytes) -> bool | int | float:
    """Replaces NumPy's function, which would make scalars of any type."""
    is_plain = isinstance(dtype, _DType) and dtype.kind in PLAIN_SCALARS and dtype.order in ("<", ">", "|")
    if not is_plain or not isinstance(content, bytes) or len(content) != int(dtype.kind[1:]):
        raise pickle.UnpicklingError("GLOBAL numpy.dtype of another kind")
    return np.frombuffer(content, dtype.order + dtype.kind).item()


def load_model_state(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Loads a checkpoint's weights. Raises InputError if they belong to another model."""
    state = weights_in({"model_state": checkpoint["model_state"]}, f"--ckpt {path}")
    if wrong := incompatible_keys(model.state_dict(), state):
        name, why = next(iter(wrong.items()))
        raise InputError(
            f"--ckpt {path}: the weights do not fit the model ({name}: {why}; {len(wrong)} such tensors in all)"
        )
    # Not strict, because older files lack the counters of batch norms.
    model.load_state_dict(state, strict=False)
    set_normalization(model, checkpoint)


def set_normalization(model: DeepLab, checkpoint: dict) -> None:
    """Gives a model the input normalisation that its weights were trained with; without a record ImageNet's."""
    stored = checkpoint.get("normalization", {"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    for buffer, name in ((model.mean, "mean"), (model.std, "std")):
        buffer.copy_(255 * torch.tensor(stored[name])[:, None, None])  # [3, 1, 1]


def incompatible_keys(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> dict[str, str]:
    """Returns the problem with each tensor that does not fit, by name: missing, of another shape, or unexpected."""
    wrong = {}
    for name, value in own.items():
        if name not in given:
            wrong |= {} if name.endswith(COUNTERS) else {name: "missing"}
        elif given[name].shape != value.shape:
            wrong[name] = f"shape {list(given[name].shape)} instead of {list(value.shape)}"
    return wrong | {name: "unexpected" for name in given if name not in own}


def load_backbone(model: DeepLab, name: str, source: str) -> None:
    """Loads `--backbone_weights` into the backbone of the model called `name`.

    source: "imagenet" (downloaded), "none" (nothing happens), or a file. A file has the names of torchvision's or
    timm's classification network, or it is a DeepLab with that backbone. Its classification layer is not used.
    Raises InputError for a failed download and for weights of another network.
    """
    if source == "none":
        return
    backbone, where = name.partition("_")[2], f"--backbone_weights {source}"
    if backbone not in TORCHVISION:
        content = None if source == "imagenet" else load_file(Path(source), "--backbone_weights")
        state = content and weights_in(content, where)
        inside = {key: value for key, value in (state or {}).items() if key.startswith("backbone.network.")}
        if not inside:
            model.backbone.network.load_state_dict(timm_weights(backbone, state, where))
            return
        state = inside
    elif source == "imagenet":
        instead = "give --backbone_weights FILE, or none to start from random weights"
        state = download(models.get_model_weights(backbone).IMAGENET1K_V1, where=where, instead=instead)
    else:
        state = weights_in(load_file(Path(source), "--backbone_weights"), where)
        state = {key: value for key, value in state.items() if key.startswith("backbone.")} or state
    state = {
        key.removeprefix("backbone.").removeprefix("features."): value  # MobileNet's names begin with features.
        for key, value in state.items()
        if not key.startswith(("fc.", "classifier."))
    }
    if wrong := incompatible_keys(model.backbone.state_dict(), state):
        key, why = next(iter(wrong.items()))
        raise InputError(
            f"{where}: not weights of {backbone} ({key}: {why}; {len(wrong)} such tensors in all); give a state dict "
            "of torchvision's or timm's network"
        )
    model.backbone.load_state_dict(state, strict=False)


def init_from(model: DeepLab, path: str | Path) -> list[str]:
    """Loads the tensors of `--init_from` that fit by name and shape; all others keep their values.

    path: any checkpoint that `load_checkpoint` reads, with any classes and head.
    Returns log lines: how much was loaded, each tensor that was not and why, how many tensors of the file are unused.
    Raises InputError, and does not change the model, if nothing in the backbone fits.
    """
    own = model.state_dict()
    name = model_of(own)
    # torchvision has V3 only.
    torchvision_name = name.replace("deeplabv3plus", "deeplabv3") if name else None
    checkpoint = load_checkpoint(path, flag="--init_from", model=torchvision_name)
    given = weights_in({"model_state": checkpoint["model_state"]}, f"--init_from {path}")
    wrong = incompatible_keys(own, given)
    fitting = {key: value for key, value in given.items() if key not in wrong}
    if not any(key.startswith("backbone.") and not key.endswith(COUNTERS) for key in fitting):
        key, why = next(iter(wrong.items()))
        raise InputError(
            f"--init_from {path}: this is {model_of(given) or 'another network'}, and no tensor fits the backbone "
            f"({key}: {why}); give a checkpoint with the same backbone, or another --model"
        )
    model.load_state_dict(fitting, strict=False)
    set_normalization(model, checkpoint)
    return [
        f"{path}: {len(fitting)} of the model's {len(own)} tensors loaded, {len(given) - len(fitting)} of the file's "
        "not used",
        *(note for note in checkpoint.get("notes", []) if note.startswith("left out")),
        *(f"random initialisation: {key} ({why})" for key, why in wrong.items() if key in own),
    ]


def require_classes(theirs: list[str], class_names: list[str], path: str) -> None:
    """Raises InputError, naming both lists, unless the checkpoint's classes are those of the data set.

    A published checkpoint without class names only needs the same number of classes.
    """
    nameless = list(theirs) == unnamed(len(theirs))
    if nameless and len(theirs) == len(class_names):
        return
    if theirs != list(class_names):
        named = "names unknown" if nameless else ", ".join(theirs)
        raise InputError(
            f"--ckpt {path}: was trained on {len(theirs)} classes ({named}), but the data set has "
            f"{len(class_names)} ({', '.join(class_names)}); use the data set that it was trained on, or "
            "train on this one with --init_from"
        )


def describe(checkpoint: dict) -> dict[str, str]:
    """Describes a checkpoint by what it records about itself, as headings and texts. Published ones say less."""
    options, scores, names = checkpoint["options"], checkpoint["scores"], checkpoint["class_names"]
    about = checkpoint.get("about", {})  # absent from older checkpoints
    facts = {
        "made by": checkpoint.get("published", "main.py"),
        "model": f"{options['model']}, output stride {options['output_stride']}",
        "classes": f"{len(names)}: {', '.join(names)}",
    }
    if scores:
        facts |= {
            "data": " in ".join(options[name] for name in ("dataset", "data_root") if name in options)
            + f", {options['train_split']}",
            "training": f"{checkpoint['cur_itrs']:,} iterations of {options['batch_size']} crops of "
            f"{options['crop_size']} pixels, {options['loss_type']}, learning rate {options['lr']:g}",
            "scores": f"mIoU {scores['Mean IoU']:.4f}, Overall Acc {scores['Overall Acc']:.4f} "
            f"on {options['val_split']}",
        }
    if about:
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        facts |= {"saved": about["saved"], "device": about["device_name"], "versions": versions}
        facts |= {"commit": about["git_commit"] or "unknown"}
    return facts
