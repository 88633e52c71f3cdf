"""Checkpoints that others published, read as ours are: VainF/DeepLabV3Plus-Pytorch, torchvision, bare weights.

    python main.py --test_only --ckpt best_deeplabv3plus_resnet101_voc_os16.pth
    python main.py --test_only --ckpt torchvision                     # trained on COCO with the classes of VOC

Their modules carry the names that ours have, or names that differ by a prefix; so model, depth and number of
classes are read off the names and shapes of the weights.
"""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torchvision import models

from datasets.voc import VOC_CLASSES, voc_colormap
from utils.errors import InputError

TORCHVISION = ("deeplabv3_resnet50", "deeplabv3_resnet101")
DEPTHS = {6: "resnet50", 23: "resnet101"}  # by the number of blocks in layer 3
LAST_LAYERS = {"deeplabv3": "classifier.classifier.4.weight", "deeplabv3plus": "classifier.classifier.3.weight"}
WRAPPERS = ("model_state", "model", "state_dict", "model_state_dict")  # VainF; torchvision; timm and most others
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
MAX_CLASSES = 255  # ids are uint8, and 255 is void
READ = "DeepLabV3 and V3+ on ResNet-50 or ResNet-101 are read, named as VainF/DeepLabV3Plus-Pytorch or torchvision do"
NOT_READ = {  # by what a name begins with
    r"classifier\..*\.body\.0\.weight": "a head of separable convolutions",
    r"backbone\.(low|high)_level_features\.": "a DeepLab on MobileNetV2",
    r"backbone\.stage2\.": "a DeepLab on HRNet",
    r"backbone\.block1\.": "a DeepLab on Xception",
    r"segmentation_head\.": "a model of segmentation_models_pytorch",
    r"classifier\.(cbr|low_classifier)\.": "torchvision's LRASPP",
    r"classifier\.0\.weight": "torchvision's FCN",
    r"(conv1|layer1|features\.0)\.": "a network without a segmentation head (for --backbone_weights)",
}


def weights_in(content: dict, where: str) -> dict[str, torch.Tensor]:
    """The state dict in what a file holds, out of its wrapper and without the prefixes of wrapped modules.

    `where`: flag and file, for the message. Raises InputError if there is none.
    """
    state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    odd = [name for name, value in state.items() if not (isinstance(name, str) and _is_plain(value))]
    if odd or not state:
        what = f"{str(odd[0])[:80]!r} in it is no plain tensor" if odd else "there is none in it"
        raise InputError(f"{where}: holds no state dict, for {what}; give a file of weights")
    if broken := next((name for name, value in state.items() if not value.isfinite().all()), None):
        raise InputError(f"{where}: holds weights that are not finite ({broken[:80]}); give an earlier checkpoint")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _is_plain(value: object) -> bool:
    """Whether it is numbers in memory: not sparse, not quantised, not without content."""
    is_dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
    return is_dense and value.device.type == "cpu" and not value.is_complex()


def convert(content: dict, where: str) -> dict:
    """A published file's content as a checkpoint with the keys of ours (`utils.checkpoint.KEYS`), and two more.

    `model_state` has our names; `options` has `model` and `output_stride` alone, the stride assumed, for no file
    tells: 8 for torchvision's and 16 for others, as they were trained, and either can be computed with. There are no
    states of optimizer, schedule and scaler (None), no scores (None), no iterations (0). 21 classes are taken as
    VOC's; others are `unnamed`. `published` is where the file comes from, `notes` are lines for the log: what
    was assumed, and what was left out.

    `where`: flag and file, for the message. Raises InputError for models other than ours.
    """
    state, notes = weights_in(content, where), []
    source = "VainF/DeepLabV3Plus-Pytorch" if "model_state" in content else "bare weights"
    if "classifier.0.project.0.weight" in state:
        source, auxiliary = "torchvision", [name for name in state if name.startswith("aux_classifier.")]
        state = {_renamed(name): value for name, value in state.items() if name not in auxiliary}
        if auxiliary:
            notes = [f"left out: aux_classifier, {len(auxiliary)} tensors of a head for training alone"]
    model = model_of(state)
    recognised = (what for start, what in NOT_READ.items() if any(re.match(start, name) for name in state))
    if what := next(recognised, None):
        raise InputError(f"{where}: is {what}; {READ}")
    if model is None:
        names = ", ".join(name[:80] for name in list(state)[:2])
        raise InputError(f"{where}: holds {len(state)} tensors ({names}...) that no model here has; {READ}")
    if source == "torchvision" and not model.endswith(tuple(DEPTHS.values())):
        raise InputError(
            f"{where}: is torchvision's DeepLabV3 on MobileNetV3, of atrous rates that ours lacks; {READ}"
        )

    last = LAST_LAYERS[model.partition("_")[0]]
    if last not in state or state[last].ndim != 4 or not 0 < len(state[last]) <= MAX_CLASSES:
        found = list(state[last].shape) if last in state else "not there"
        raise InputError(f"{where}: {last} is {found}; it takes one of 1 to {MAX_CLASSES} classes")
    num_classes, stride = len(state[last]), 8 if source == "torchvision" else 16
    voc = num_classes == len(VOC_CLASSES)
    names = "taken for PASCAL VOC's" if voc else "whose names it does not tell: a data set must have as many"
    notes = [
        f"{source}: {model} of {num_classes} classes, {names}",
        f"the file does not tell its output stride: {stride}, unless --output_stride says otherwise",
        *notes,
    ]
    if isinstance(score := content.get("best_score"), float) and isinstance(itr := content.get("cur_itrs"), int):
        notes.append(f"best mIoU {score:.4f} by its own evaluation, saved at iteration {itr}")
    return {
        "model_state": state,
        "optimizer_state": None,
        "scheduler_state": None,
        "scaler_state": None,
        "cur_itrs": 0,
        "best_score": -1.0,
        "best_itr": 0,
        "scores": None,
        "options": {"model": model, "output_stride": stride},
        "class_names": list(VOC_CLASSES) if voc else unnamed(num_classes),
        "palette": voc_colormap().tolist(),
        "published": source,
        "notes": notes,
    }


def _renamed(name: str) -> str:
    """torchvision's head is the sequence that ours has inside: `classifier.0` is our `classifier.classifier.0`."""
    return f"classifier.{name}" if name.startswith("classifier.") else name


def model_of(names: Collection[str]) -> str | None:
    """One of `network.MODELS`, by the names of its parameters."""
    if "classifier.aspp.project.0.weight" in names:
        head = "deeplabv3plus"
    elif "classifier.classifier.0.project.0.weight" in names:
        head = "deeplabv3"
    else:
        return None
    if "backbone.16.0.weight" in names and "backbone.0.0.weight" in names:
        return f"{head}_mobilenet_v3_large"
    blocks = {name.split(".")[2] for name in names if name.startswith("backbone.layer3.")}
    known = "backbone.conv1.weight" in names and len(blocks) in DEPTHS
    return f"{head}_{DEPTHS[len(blocks)]}" if known else None


def unnamed(num_classes: int) -> list[str]:
    """The class names of a checkpoint that has none."""
    return [f"class {index}" for index in range(num_classes)]


def download_torchvision(model: str | None = None, flag: str = "--ckpt") -> dict:
    """torchvision's DeepLabV3, trained on COCO with the classes of VOC: from its cache, or downloaded.

    model: None for ResNet-50. Raises InputError for a model that torchvision has not, and for a failed download.
    """
    model = model or TORCHVISION[0]
    if model not in TORCHVISION:
        raise InputError(f"{flag} torchvision: has {' and '.join(TORCHVISION)}, no {model}; give --model one of them")
    weights = models.get_model_weights(model).COCO_WITH_VOC_LABELS_V1
    where = f"{flag} torchvision"
    return convert(download(weights, where=where, instead=f"give {flag} FILE"), where)


def download(weights: models.WeightsEnum, *, where: str, instead: str) -> dict[str, torch.Tensor]:
    """torchvision's weights, from its cache where they are there. Raises InputError if they cannot be had."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    was_there = cached.is_file()
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, a wrong hash, or anything that a damaged file raises
        if was_there:
            raise InputError(f"{where}: {cached} is damaged; delete it and run again") from None
        failure = f"{weights.url} could not be downloaded ({error})"
        raise InputError(f"{where}: {failure}; put the file into {cached.parent}, or {instead}") from None
