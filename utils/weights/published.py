"""Reads published checkpoints as if they were ours: VainF's, torchvision's, Lightning's, bare state dicts.

    python main.py --test_only --ckpt best_deeplabv3plus_resnet101_voc_os16.pth
    python main.py --test_only --ckpt torchvision                     # trained on COCO with the VOC classes

Their modules have the same names as ours, or names that differ by a prefix. Model, depth and number of classes follow
from the names and shapes of the weights.
"""

import contextlib
import logging
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
WRAPPERS = ("model_state", "model", "state_dict", "model_state_dict")  # VainF; torchvision; Lightning and timm
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # DataParallel, torch.compile; a Lightning module's
HUB_TIMEOUT = 5  # seconds
MAX_CLASSES = 255  # ids are uint8, and 255 is void
READABLE = "give DeepLabV3 or V3+ on ResNet-50 or -101, with the names of VainF's code or torchvision"
SEPARABLE = re.compile(r"classifier\..*\.body\.0\.weight")  # names of the separable convolutions in a head
NOT_READABLE = {  # by how a name begins
    r"backbone\.(low|high)_level_features\.": "a DeepLab on MobileNetV2",
    r"backbone\.stage2\.": "a DeepLab on HRNet",
    r"backbone\.block1\.": "a DeepLab on Xception",
    r"segmentation_head\.": "a model from segmentation_models_pytorch",
    r"classifier\.(cbr|low_classifier)\.": "torchvision's LRASPP",
    r"classifier\.0\.weight": "torchvision's FCN",
    r"(conv1|layer1|features\.0)\.": "a network without a segmentation head (for --backbone_weights)",
}


def weights_in(content: dict, where: str) -> dict[str, torch.Tensor]:
    """Returns the state dict in a file's content, out of its wrapper and without the prefixes of wrapped modules.

    `where`: flag and file, for the message. Raises InputError if there is no usable state dict.
    """
    state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    odd = [name for name, value in state.items() if not (isinstance(name, str) and _is_plain(value))]
    if odd or not state:
        problem = f"its {str(odd[0])[:80]!r} is not a plain tensor" if odd else "it is empty"
        raise InputError(f"{where}: holds no state dict, {problem}; give a file of weights")
    if broken := next((name for name, value in state.items() if not value.isfinite().all()), None):
        raise InputError(f"{where}: has weights that are not finite ({broken[:80]}); give an earlier checkpoint")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _is_plain(value: object) -> bool:
    """Whether the value is numbers in memory: not sparse, not quantised, not on the meta device."""
    is_dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
    return is_dense and value.device.type == "cpu" and not value.is_complex()


def convert(content: dict, where: str) -> dict:
    """Presents a published file's content as a checkpoint with our keys (`load.KEYS`) and two more.

    `model_state` has our names. `options` has only what the model needs. No file states its stride, so it is
    the one that such models were trained with (torchvision 8, others 16). The weights work with either. The states of
    optimizer, schedule and scaler and the scores are None, the iterations 0. 21 classes count as VOC's, others are
    `unnamed`. `published` is the file's origin. `notes` are log lines: what was assumed and what was left out.
    `where`: flag and file, for the message. Raises InputError for models other than ours.
    """
    state, notes = weights_in(content, where), []
    source = "VainF/DeepLabV3Plus-Pytorch" if "model_state" in content else "bare weights"
    if "classifier.0.project.0.weight" in state:
        source, auxiliary = "torchvision", [name for name in state if name.startswith("aux_classifier.")]
        state = {_renamed(name): value for name, value in state.items() if name not in auxiliary}
        if auxiliary:
            notes = [f"left out: aux_classifier, {len(auxiliary)} tensors of a head that only training uses"]
    model = model_of(state)
    recognised = (kind for start, kind in NOT_READABLE.items() if any(re.match(start, name) for name in state))
    if kind := next(recognised, None):
        raise InputError(f"{where}: this is {kind}; {READABLE}")
    if model is None:
        names = ", ".join(name[:80] for name in list(state)[:2])
        raise InputError(f"{where}: no model here has its weights ({names}..., {len(state)} in all); {READABLE}")
    if source == "torchvision" and not model.endswith(tuple(DEPTHS.values())):
        raise InputError(
            f"{where}: this is torchvision's DeepLabV3 on MobileNetV3, with other atrous rates than ours; {READABLE}"
        )

    last = LAST_LAYERS[model.partition("_")[0]]
    if last not in state or state[last].ndim != 4 or not 0 < len(state[last]) <= MAX_CLASSES:
        found = f"has shape {list(state[last].shape)}" if last in state else "is missing"
        raise InputError(f"{where}: {last} {found}; it must have 1 to {MAX_CLASSES} classes")
    num_classes, stride = len(state[last]), 8 if source == "torchvision" else 16
    separable = {"separable_conv": True} if any(SEPARABLE.fullmatch(name) for name in state) else {}
    voc = num_classes == len(VOC_CLASSES)
    names = "taken to be PASCAL VOC's" if voc else "without names: the data set must have the same number"
    notes = [
        f"{source}: {model} with {num_classes} classes, {names}",
        f"the file does not state its output stride: using {stride} unless --output_stride is given",
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
        "options": {"model": model, "output_stride": stride, **separable},
        "class_names": list(VOC_CLASSES) if voc else unnamed(num_classes),
        "palette": voc_colormap().tolist(),
        "published": source,
        "notes": notes,
    }


def _renamed(name: str) -> str:
    """Renames torchvision's head, the sequence inside ours: `classifier.0` is our `classifier.classifier.0`."""
    return f"classifier.{name}" if name.startswith("classifier.") else name


def model_of(names: Collection[str]) -> str | None:
    """Recognises a model, one of `network.MODELS`, by the names of its parameters; None if it is another."""
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
    """Returns the class names of a checkpoint that has none."""
    return [f"class {index}" for index in range(num_classes)]


def download_torchvision(model: str | None = None, flag: str = "--ckpt") -> dict:
    """Loads torchvision's DeepLabV3, trained on COCO with the VOC classes, from its cache or the network.

    model: None means ResNet-50. Raises InputError for a model that torchvision does not have and for a failed
    download.
    """
    model = model or TORCHVISION[0]
    if model not in TORCHVISION:
        raise InputError(f"{flag} torchvision: has no {model}; give --model {' or '.join(TORCHVISION)}")
    weights = models.get_model_weights(model).COCO_WITH_VOC_LABELS_V1
    where = f"{flag} torchvision"
    return convert(download(weights, where=where, instead=f"give {flag} FILE"), where)


def timm_weights(name: str, state: dict[str, torch.Tensor] | None, where: str) -> dict[str, torch.Tensor]:
    """Returns the weights of timm's network `name` under the names that they have in its feature extractor.

    state: a file's tensors under the names that timm knows, or those of the packages `efficientnet-liteN`; None
    downloads timm's own. Raises InputError for a failed download and for weights of another network.
    """
    import timm  # takes a second, and torchvision's backbones do not need it

    if state is None:
        overlay = _timm_download(name, where)
    else:
        with torch.device("meta"):
            names = list(timm.create_model(name).state_dict())
        if len(state) > len(names):
            raise InputError(
                f"{where}: not weights of timm's {name} ({len(state)} tensors, more than its {len(names)}); give "
                "others, or none"
            )
        if "_conv_stem.weight" in state and len(names) == len(state):
            state = dict(zip(names, state.values(), strict=True))  # other names in the same order
        overlay = {"state_dict": state}
    logging.getLogger("timm").setLevel(logging.ERROR)  # it lists the classifier that nobody asked for
    try:
        network = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{where}: not weights of timm's {name} ({reason}); give others, or none") from None
    loaded = network.state_dict()
    if state is not None and (lacking := _not_from(state, loaded)):
        raise InputError(
            f"{where}: not weights of timm's {name} ({lacking[0]} is not in it; {len(lacking)} such tensors in all); "
            "give others, or none"
        )
    return loaded


def _not_from(state: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> list[str]:
    """Returns the tensors whose values are not in the file: timm says nothing about weights that it did not load."""
    given: dict[int, list[torch.Tensor]] = {}
    for value in state.values():
        given.setdefault(value.numel(), []).append(value.flatten())
    return [
        name
        for name, value in loaded.items()
        if value.is_floating_point()
        and not any(torch.equal(value.flatten(), other.to(value.dtype)) for other in given.get(value.numel(), []))
    ]


def _timm_download(name: str, where: str) -> dict:
    """Returns what timm must know to load its own weights: the hub is asked once, otherwise its cache is used."""
    import timm
    from huggingface_hub import HfApi, hf_hub_download

    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if config is None or not (config.hf_hub_id or config.url):
        raise InputError(f"{where}: timm has no weights for {name}; give a FILE, or none")
    if not config.hf_hub_id:
        return {}
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for file in ("model.safetensors", "pytorch_model.bin"):
        with contextlib.suppress(Exception):
            return {"file": hf_hub_download(config.hf_hub_id, file, local_files_only=True)}
    try:
        # A download alone would try several times, for a minute.
        HfApi().model_info(config.hf_hub_id, timeout=HUB_TIMEOUT)
    except Exception as error:  # which types depends on the HTTP library behind it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{where}: {config.hf_hub_id} could not be downloaded ({reason}); give --backbone_weights FILE, or none "
            "to start from random weights"
        ) from None
    return {}


def download(weights: models.WeightsEnum, *, where: str, instead: str) -> dict[str, torch.Tensor]:
    """Loads torchvision's weights, from its cache if they are there. Raises InputError if that fails."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    was_there = cached.is_file()
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, a wrong hash, or anything that a damaged file raises
        if was_there:
            raise InputError(f"{where}: {cached} is damaged; delete it and run again") from None
        failure = f"{weights.url} could not be downloaded ({error})"
        raise InputError(f"{where}: {failure}; put the file into {cached.parent}, or {instead}") from None
