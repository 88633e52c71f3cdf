"""Turns torchvision's ImageNet networks into backbones: stride traded for dilation, tapped at two depths."""

from typing import NamedTuple

from torch import nn
from torchvision import models

# Torchvision's segmentation models tap their backbones with it; it keeps the published parameter names.
from torchvision.models._utils import IntermediateLayerGetter

from utils.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1, as torchvision's weights expect their input
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(NamedTuple):
    """A network that is tapped at two depths, and the channels of both taps.

    `features` maps `[B, 3, H, W]` to {"low_level": `[B, low_level_channels, H/4, W/4]`, "out":
    `[B, out_channels, H/s, W/s]`} with s = output stride; sizes are rounded up.
    """

    features: nn.Module
    low_level_channels: int
    out_channels: int


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
