"""DeepLabV3 (Chen et al. 2017, arXiv 1706.05587) and DeepLabV3+ (Chen et al. 2018, arXiv 1802.02611).

Both take the backbone's features {"low_level": [B, L, H/4, W/4], "out": [B, F, H/s, W/s]}, s = output stride,
and differ by their head alone. Names of parameters are those of the published PyTorch checkpoints.
"""

from typing import Self

import numpy as np
import torch
from torch import nn

from network.atrous import AtrousConv2d
from network.upsample import DecoderConv2d, upsample


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> list[nn.Module]:
    """A convolution that keeps height and width, batch normalisation and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class ASPPConv(nn.Sequential):
    """One atrous branch: a 3x3 convolution at the given rate. `[B, F, h, w]` to `[B, out_channels, h, w]`."""

    def __init__(self, in_channels: int, out_channels: int, atrous_rate: int) -> None:
        conv = AtrousConv2d(in_channels, out_channels, atrous_rate, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class ASPPPooling(nn.Sequential):
    """Image-level features (1706.05587, section 3.3): the mean over the map, broadcast back to its size.

    `[B, F, h, w]` to `[B, out_channels, h, w]`. In training it needs a batch of two or more, for batch
    normalisation cannot estimate a deviation from one value.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, out_channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-2:]
        return upsample(super().forward(x), size)  # [B, out_channels, 1, 1] -> [B, out_channels, h, w]


class ImageDropout(nn.Dropout):
    """Dropout whose mask for an image depends on a seed and on the image's place in the batch of the step alone: not
    on how many processes share the batch, or in how many parts it is computed. Without a seed it is torch's own.
    """

    seed: tuple[int, ...] | None = None
    place = 0  # of the next image

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._dropped(x) if self.training else x

    @torch.compiler.disable  # whole: compiled code would be compiled anew for each seed
    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if self.seed is None:
            return super().forward(x)
        mask, generator = torch.empty_like(x), torch.Generator(x.device)
        for image in mask:
            stream = np.random.SeedSequence((*self.seed, self.place)).generate_state(1)
            image.bernoulli_(1 - self.p, generator=generator.manual_seed(int(stream[0])))
            self.place += 1
        return x * mask * (1 / (1 - self.p))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (1706.05587, section 3.3): a 1x1 convolution, one 3x3 convolution per
    atrous rate and image pooling side by side, concatenated and projected. `[B, F, h, w]` to
    `[B, out_channels, h, w]`.
    """

    def __init__(self, in_channels: int, atrous_rates: tuple[int, ...], out_channels: int = 256) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Sequential(*conv_bn_relu(in_channels, out_channels, 1)),
                *(ASPPConv(in_channels, out_channels, rate) for rate in atrous_rates),
                ASPPPooling(in_channels, out_channels),
            ]
        )
        self.project = nn.Sequential(
            *conv_bn_relu(len(self.convs) * out_channels, out_channels, 1), ImageDropout(0.1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = torch.cat([conv(x) for conv in self.convs], dim=1)  # [B, 5 * out_channels, h, w]
        return self.project(branches)  # [B, out_channels, h, w]


class DeepLabHead(nn.Module):
    """The head of V3: ASPP, a 3x3 convolution and the classifier at the backbone's output stride."""

    def __init__(self, in_channels: int, num_classes: int, atrous_rates: tuple[int, ...]) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            ASPP(in_channels, atrous_rates), *conv_bn_relu(256, 256, 3), nn.Conv2d(256, num_classes, 1)
        )
        init_weights(self)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.classifier(features["out"])  # [B, C, H/s, W/s]


class DeepLabHeadPlus(nn.Module):
    """The head of V3+ (1802.02611, section 3.1): the ASPP's output, upsampled to stride 4, meets low-level
    features that are reduced to 48 channels; then a 3x3 convolution of 304 to 256 and the classifier.

    The paper settles on two 3x3 convolutions (table 2) and the published PyTorch weights have one: one here.
    """

    def __init__(
        self, in_channels: int, low_level_channels: int, num_classes: int, atrous_rates: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(*conv_bn_relu(low_level_channels, 48, 1))
        self.aspp = ASPP(in_channels, atrous_rates)
        self.classifier = nn.Sequential(
            DecoderConv2d(48, 256, 256, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, num_classes, 1),
        )
        init_weights(self)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        low_level = self.project(features["low_level"])  # [B, 48, H/4, W/4]
        return self.classifier((low_level, self.aspp(features["out"])))  # [B, C, H/4, W/4]


class DeepLab(nn.Module):
    """A backbone and a head: float `[B, 3, H, W]`, normalised, of any H and W, to logits `[B, C, H, W]`.

    `freeze_bn`: in training, too, batch norms use the running statistics that they have and leave them alone; their
    scale and shift are trained as before (Chen et al. 2017, arXiv 1706.05587, section 4.1, where it is the second
    half of the training).
    """

    freeze_bn = False

    def __init__(self, backbone: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(self.backbone(x))
        return upsample(logits.float(), x.shape[-2:])  # in bfloat16 neighbouring logits would tie

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def seed_dropout(self, *seed: int, place: int = 0) -> None:
        """Decides the dropout of the next step's images, of which the first has that place in the whole batch."""
        for module in self.modules():
            if isinstance(module, ImageDropout):
                module.seed, module.place = seed, place


def init_weights(head: nn.Module) -> None:
    """He initialisation of the convolutions (He et al. 2015, arXiv 1502.01852); batch norms start at identity."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
