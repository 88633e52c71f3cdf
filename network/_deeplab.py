"""Defines DeepLabV3 (Chen et al. 2017, arXiv 1706.05587) and DeepLabV3+ (Chen et al. 2018, arXiv 1802.02611).

Both take the backbone's features {"low_level": [B, L, H/4, W/4], "out": [B, F, H/s, W/s]}, s = output stride, and
differ in their heads only. Parameter names are those of the published PyTorch checkpoints.
"""

from typing import Self

import torch
from torch import nn
from torch.nn import functional as F


def upsample(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Resizes `[B, C, h, w]` bilinearly to `[B, C, *size]`: to a size, so that odd inputs get theirs back."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class SeparableConv2d(nn.Module):
    """An atrous separable 3x3 convolution (1802.02611, section 3.2): `[B, F, h, w]` to `[B, O, h, w]`.

    One 3x3 filter per channel, then a 1x1 convolution that mixes the channels.
    """

    def __init__(self, in_channels: int, out_channels: int, atrous_rate: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(
            in_channels, in_channels, 3, padding=atrous_rate, dilation=atrous_rate, groups=in_channels, bias=False
        )
        self.body = nn.Sequential(depthwise, nn.Conv2d(in_channels, out_channels, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)  # [B, O, h, w]


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int, atrous_rate: int = 1, separable: bool = False
) -> list[nn.Module]:
    """Returns a convolution that keeps height and width, batch normalisation and ReLU."""
    if separable and kernel_size == 3:
        conv: nn.Module = SeparableConv2d(in_channels, out_channels, atrous_rate)
    else:
        padding = atrous_rate * (kernel_size // 2)
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=atrous_rate, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class ASPPPooling(nn.Sequential):
    """Image-level features (1706.05587, section 3.3): the mean over the map, broadcast back to its size.

    `[B, F, h, w]` to `[B, out_channels, h, w]`. Training needs a batch of two or more: batch normalisation cannot
    estimate a standard deviation from one value.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, out_channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return upsample(super().forward(x), x.shape[-2:])  # [B, out_channels, 1, 1] -> [B, out_channels, h, w]


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (1706.05587, section 3.3): a 1x1 convolution, a 3x3 convolution per atrous rate
    and image pooling side by side, concatenated and projected. `[B, F, h, w]` to `[B, out_channels, h, w]`.
    """

    def __init__(
        self, in_channels: int, atrous_rates: tuple[int, ...], separable: bool = False, out_channels: int = 256
    ) -> None:
        super().__init__()
        atrous = [conv_bn_relu(in_channels, out_channels, 3, rate, separable) for rate in atrous_rates]
        self.convs = nn.ModuleList(
            [
                nn.Sequential(*conv_bn_relu(in_channels, out_channels, 1)),
                *(nn.Sequential(*branch) for branch in atrous),
                ASPPPooling(in_channels, out_channels),
            ]
        )
        self.project = nn.Sequential(*conv_bn_relu(len(self.convs) * out_channels, out_channels, 1), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = torch.cat([conv(x) for conv in self.convs], dim=1)  # [B, 5 * out_channels, h, w]
        return self.project(branches)  # [B, out_channels, h, w]


class DeepLabHead(nn.Module):
    """The V3 head: ASPP, a 3x3 convolution and the classifier, all at the backbone's output stride."""

    def __init__(
        self, in_channels: int, num_classes: int, atrous_rates: tuple[int, ...], separable: bool = False
    ) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            ASPP(in_channels, atrous_rates, separable),
            *conv_bn_relu(256, 256, 3, separable=separable),
            nn.Conv2d(256, num_classes, 1),
        )
        init_weights(self)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.classifier(features["out"])  # [B, C, H/s, W/s]


class DeepLabHeadPlus(nn.Module):
    """The V3+ head (1802.02611, section 3.1): the ASPP output is upsampled to stride 4 and concatenated with
    low-level features reduced to 48 channels; a 3x3 convolution from 304 to 256 channels and the classifier follow.

    The paper settles on two 3x3 convolutions (table 2). The published PyTorch weights have one, and so has this head.
    """

    def __init__(
        self,
        in_channels: int,
        low_level_channels: int,
        num_classes: int,
        atrous_rates: tuple[int, ...],
        separable: bool = False,
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(*conv_bn_relu(low_level_channels, 48, 1))
        self.aspp = ASPP(in_channels, atrous_rates, separable)
        decoder = conv_bn_relu(48 + 256, 256, 3, separable=separable)
        self.classifier = nn.Sequential(*decoder, nn.Conv2d(256, num_classes, 1))
        init_weights(self)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        low_level = self.project(features["low_level"])  # [B, 48, H/4, W/4]
        context = upsample(self.aspp(features["out"]), low_level.shape[-2:])  # [B, 256, H/4, W/4]
        return self.classifier(torch.cat([low_level, context], dim=1))  # [B, C, H/4, W/4]


class DeepLab(nn.Module):
    """A backbone and a head. Maps RGB `[B, 3, H, W]` of any height and width to float32 logits `[B, C, H, W]`.

    The input is uint8 and is normalised here with the backbone's mean and standard deviation (RGB in 0..1); a float
    input counts as normalised. With `freeze_bn`, batch norms use their running statistics in training too and do not
    update them; their scale and shift are still trained (1706.05587, section 4.1, second half of the training).
    """

    freeze_bn = False
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        # Not persistent: published state dicts do not have them. Checkpoints keep them under "normalization".
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)  # [3, 1, 1]
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None], persistent=False)  # [3, 1, 1]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Converts uint8 RGB `[B, 3, H, W]` to float32 with mean 0 and standard deviation 1, on the same device."""
        return (images.float() - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.normalize(images) if images.dtype == torch.uint8 else images  # [B, 3, H, W]
        logits = self.classifier(self.backbone(x))  # [B, C, H/4, W/4] (V3+) or [B, C, H/s, W/s] (V3)
        # Upsampled in float32: in bfloat16 the logits of neighbouring pixels would tie.
        return upsample(logits.float(), x.shape[-2:])  # [B, C, H, W]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def init_weights(head: nn.Module) -> None:
    """Initialises convolutions as in He et al. 2015 (arXiv 1502.01852); batch norms start as the identity."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
