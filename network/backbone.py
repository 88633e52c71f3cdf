"""Turns ImageNet networks into backbones: stride traded for dilation, tapped at two depths."""

import difflib
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torchvision import models

# Torchvision's segmentation models tap their backbones with it; it keeps the published parameter names.
from torchvision.models._utils import IntermediateLayerGetter

from utils.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1, as torchvision's weights expect their input
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(NamedTuple):
    """A network that is tapped at two depths, the channels of both taps, and the normalisation of its input.

    `features` maps `[B, 3, H, W]` to {"low_level": `[B, low_level_channels, H/4, W/4]`, "out":
    `[B, out_channels, H/s, W/s]`} with s = output stride; sizes are rounded up, by some networks of timm down.
    """

    features: nn.Module
    low_level_channels: int
    out_channels: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def resnet(name: str, *, output_stride: int) -> Backbone:
    """Builds a ResNet with layer 4 (output stride 16) or layers 3 and 4 (output stride 8) dilated."""
    network = models.get_model(name, replace_stride_with_dilation=[False, output_stride == 8, True])
    return Backbone(IntermediateLayerGetter(network, {"layer1": "low_level", "layer4": "out"}), 256, 2048)


def mobilenet_v3(name: str, *, output_stride: int) -> Backbone:
    """Builds a MobileNetV3-Large, output stride 16, with its last stage dilated as in torchvision's DeepLabV3."""
    if output_stride != 16:
        raise InputError(f"--output_stride {output_stride}: MobileNetV3 supports 16 only; use 16, or a ResNet")
    network = models.get_model(name, dilated=True)
    # Block 3 is the last one at stride 4, block 16 the last of all.
    return Backbone(IntermediateLayerGetter(network.features, {"3": "low_level", "16": "out"}), 24, 960)


class TimmFeatures(nn.Module):
    """Picks two of the feature maps of a timm network, by their position in its list."""

    def __init__(self, network: nn.Module, low_level: int) -> None:
        super().__init__()
        self.network, self.low_level = network, low_level

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.network(x)
        return {"low_level": maps[self.low_level], "out": maps[-1]}


def from_timm(name: str, *, output_stride: int) -> Backbone:
    """Builds any network of timm that gives a map at stride 4 and can be dilated to the output stride."""
    import timm  # takes a second, and torchvision's backbones do not need it

    require_timm_name(name)
    try:
        with warnings.catch_warnings(action="ignore"):
            network = timm.create_model(name, features_only=True, output_stride=output_stride)
    except Exception:  # transformers raise TypeError, HRNet and VGG AssertionError, others whatever they like
        network = None
    reductions = network.feature_info.reduction() if network else []
    if 4 not in reductions or reductions[-1] != output_stride:
        raise InputError(
            f"--model: timm's {name} cannot be dilated to output stride {output_stride} and tapped at stride 4; "
            "choose a convolutional network, such as resnet18d, convnext_tiny or tf_efficientnet_lite0"
        )
    low_level = len(reductions) - 1 - reductions[::-1].index(4)  # the deepest map at stride 4
    channels = network.feature_info.channels()
    config = network.pretrained_cfg
    return Backbone(
        TimmFeatures(network, low_level),
        channels[low_level],
        channels[-1],
        tuple(config["mean"]),
        tuple(config["std"]),
    )


def require_timm_name(name: str) -> None:
    """Raises InputError, with similar names, unless timm has a network of that name."""
    import timm

    if "/" in name or ":" in name:
        raise InputError(f"--model: {name} is an address; give the name of a network in timm, such as resnet18d")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"similar names: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise InputError(f"--model: neither torchvision nor timm has a backbone {name}; {hint}")
