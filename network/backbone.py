"""torchvision's ImageNet networks as backbones: stride traded for dilation, tapped at two depths."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torchvision import models

# torchvision's own segmentation models tap their backbones with it, and parameter names stay as published.
from torchvision.models._utils import IntermediateLayerGetter

from utils.checkpoint import load_file, misfits
from utils.errors import InputError
from utils.weights.published import download, weights_in


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

    A file has torchvision's names, which are timm's for the plain ResNets too, or it is a DeepLab whose backbone
    is such a network. The classification layer is left out, whatever its number of classes. Raises InputError for
    a failed download and for weights that are not the network's.
    """
    if source == "none":
        return
    where = f"--backbone_weights {source}"
    if source == "imagenet":
        instead = "give --backbone_weights FILE, or none to start from random weights"
        state = download(imagenet, where=where, instead=instead)
    else:
        state = _of_segmentation(network, weights_in(load_file(Path(source), "--backbone_weights"), where))
    unused = ("fc.", "classifier.")  # the ImageNet classifier of a ResNet and of a MobileNet
    state = {name: value for name, value in state.items() if not name.startswith(unused)}
    own = {name: value for name, value in network.state_dict().items() if not name.startswith(unused)}
    if wrong := misfits(own, state):
        name, why = next(iter(wrong.items()))
        raise InputError(
            f"{where}: not the weights of this {type(network).__name__} ({name}: {why}; {len(wrong)} such tensors in "
            "all); give a state dict of torchvision's network, or of timm's plain ResNet"
        )
    network.load_state_dict(state, strict=False)


def _of_segmentation(network: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone alone, where the weights are a whole DeepLab's, under the network's names."""
    inside = "features." if isinstance(network, models.MobileNetV3) else ""
    of_backbone = {name: value for name, value in state.items() if name.startswith("backbone.")}
    return {inside + name.removeprefix("backbone."): value for name, value in of_backbone.items()} or state
