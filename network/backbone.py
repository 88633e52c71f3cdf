"""torchvision's ImageNet networks as backbones: stride traded for dilation, tapped at two depths."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torchvision import models

# torchvision's own segmentation models tap their backbones with it, and parameter names stay as published.
from torchvision.models._utils import IntermediateLayerGetter

from utils.checkpoint import load_file
from utils.errors import InputError


class Backbone(NamedTuple):
    """`features` maps `[B, 3, H, W]` to {"low_level": `[B, low_level_channels, H/4, W/4]`, "out":
    `[B, out_channels, H/s, W/s]`}, sizes rounded up, s = output stride."""

    features: nn.Module
    low_level_channels: int
    out_channels: int


def resnet(name: str, *, output_stride: int, backbone_weights: str) -> Backbone:
    """A ResNet with layer 4 (output stride 16) or layers 3 and 4 (8) dilated."""
    network = models.get_model(name, replace_stride_with_dilation=[False, output_stride == 8, True])
    load_backbone(network, backbone_weights, models.get_model_weights(name).IMAGENET1K_V1)
    return Backbone(IntermediateLayerGetter(network, {"layer1": "low_level", "layer4": "out"}), 256, 2048)


def mobilenet_v3(name: str, *, output_stride: int, backbone_weights: str) -> Backbone:
    """A MobileNetV3-Large with its last stage dilated, as in torchvision's DeepLabV3; output stride 16 only."""
    if output_stride != 16:
        raise InputError(f"--output_stride {output_stride}: MobileNetV3 has 16 only; use it, or a ResNet")
    network = models.get_model(name, dilated=True)
    load_backbone(network, backbone_weights, models.get_model_weights(name).IMAGENET1K_V1)
    # Block 3 is the last one at stride 4, block 16 the last of all.
    return Backbone(IntermediateLayerGetter(network.features, {"3": "low_level", "16": "out"}), 24, 960)


def load_backbone(network: nn.Module, source: str, imagenet: models.WeightsEnum) -> None:
    """Loads "imagenet", a file, or, for "none", nothing into a torchvision classification network.

    The classification layer is left out, whatever its number of classes. Raises InputError for a failed
    download and for weights that are not the network's.
    """
    if source == "none":
        return
    state = download(imagenet) if source == "imagenet" else load_file(Path(source), "--backbone_weights")
    unused = ("fc.", "classifier.")  # the ImageNet classifier of a ResNet and of a MobileNet
    state = {name: value for name, value in state.items() if not name.startswith(unused)}
    own = {name: value for name, value in network.state_dict().items() if not name.startswith(unused)}
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # older files have none
    wrong = [name for name in own if name not in state.keys() | counters]
    wrong += [name for name in own.keys() & state.keys() if state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        kind = type(network).__name__
        raise InputError(
            f"--backbone_weights {source}: not the weights of this {kind} ({wrong[0]} is missing, unknown or of "
            f"another shape; {len(wrong)} in all); give a state dict of torchvision's network"
        )
    network.load_state_dict(state, strict=False)


def download(imagenet: models.WeightsEnum) -> dict[str, torch.Tensor]:
    """torchvision's weights, from its cache where they are there. Raises InputError if they cannot be had."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(imagenet.url).name
    was_there = cached.is_file()
    try:
        return imagenet.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, a wrong hash, or anything that a damaged file raises
        if was_there:
            raise InputError(f"--backbone_weights imagenet: {cached} is damaged; delete it and run again") from None
        raise InputError(
            f"--backbone_weights imagenet: {imagenet.url} could not be downloaded ({error}); put the file into "
            f"{cached.parent}, or give --backbone_weights FILE, or none to start from random weights"
        ) from None
