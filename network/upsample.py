"""Bilinear upsampling, and the convolution after it computed before it, where there are fewer pixels."""

import torch
from torch import nn
from torch.nn import functional as F


def upsample(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Bilinear to a size, so that odd inputs come back at their own. `[B, C, h, w]` to `[B, C, *size]`."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class DecoderConv2d(nn.Conv2d):
    """The 3x3 convolution in the decoder of V3+ (Chen et al. 2018, arXiv 1802.02611, section 3.1): of low-level
    features `[B, L, H, W]` beside a map `[B, C, h, w]` that is upsampled to their size, to `[B, O, H, W]`. Parameters
    are those of nn.Conv2d(L + C, O, 3, padding=1).

    On the CPU the map is convolved before it is upsampled where that saves enough multiplications to pay. Medians in
    ms, L = 48, C = O = 256, 2 cores with AVX-512 BF16 (AMD EPYC, torch 2.15), forward and with the backward pass; the
    shares are those of the multiplications, of the map's alone and of the whole convolution:

    | maps, batch         | products left | float32: after | before    | bfloat16: after | before    |
    | 33x33 to 129x129, 1 |    14%    28% |     52.2   200 | 26.3   62 |      26.6    96 |  9.8   29 |
    | 65x65 to 257x257, 1 |    21%    34% |      257   872 |  165  372 |       138   451 |   64  154 |
    | 33x33 to 65x65, 2   |    37%    47% |     25.2    86 | 19.2   50 |      13.4    48 |  9.0   25 |
    | 65x65 to 129x129, 1 |    47%    55% |     52.0   200 | 69.7  156 |      26.6    98 | 20.0   57 |
    | 129 to 257, 1       |    67%    72% |      287   939 |  404  965 |       139   464 |  186  412 |
    | 5x5 to 17x17, 2     |    10%    24% |     1.77   6.3 | 0.89  3.4 |      1.06   4.3 | 0.76  3.2 |
    | 2x2 to 5x5, 1       |    17%    30% |     0.29  1.08 | 0.30 1.52 |      0.20  1.11 | 0.45 2.06 |
    """

    def __init__(self, low_level_channels: int, channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(low_level_channels + channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, maps: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        low_level, x = maps
        in_graph = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()  # which holds for other sizes too
        before = x.device.type == "cpu" and not in_graph and pays_before_upsampling(low_level, x)
        convolve = conv_before_upsampling if before else conv_after_upsampling
        return convolve(low_level, x, self.weight, self.bias)


def pays_before_upsampling(low_level: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether it is faster on a CPU, by the table in `DecoderConv2d`."""
    (_, channels, height, width), (rows, columns) = x.shape, low_level.shape[-2:]
    before = 9 * height * width * (channels + columns) + 3 * height * rows * columns
    after = 9 * channels * rows * columns
    enough = 0.4 if compute_dtype(x) == torch.float32 else 0.5
    return before < enough * after and rows * columns >= 16 * 16


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """In which a convolution of x computes."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def conv_after_upsampling(
    low_level: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As the paper has it: upsampled, concatenated, convolved."""
    return F.conv2d(torch.cat([low_level, upsample(x, low_level.shape[-2:])], dim=1), weight, bias, padding=1)


def conv_before_upsampling(
    low_level: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`conv_after_upsampling` up to rounding, with fewer multiplications; the maps are of one dtype.

    Upsampling mixes pixels and a weight of the kernel mixes channels, so the two change places: all nine weights
    are applied to x at its own size, and two products with the weights of the interpolation, along each side, bring
    the nine maps to the size of the low-level features, each to its place, and add them up.
    """
    (batch, channels, height, width), (rows, columns), out = x.shape, low_level.shape[-2:], len(weight)
    low_level_weight, x_weight = weight.tensor_split([weight.shape[1] - channels], dim=1)
    taps = F.conv2d(x, x_weight.permute(2, 3, 0, 1).reshape(9 * out, channels, 1, 1))  # [B, 9 O, h, w]
    taps = taps.permute(0, 2, 3, 1).reshape(batch, height, width, 3, 3, out)  # [B, h, w, 3, 3, O]
    taps = taps.transpose(2, 3).reshape(batch * height * 3, width * 3, out)  # [B * h * 3, w * 3, O]
    wide = interpolation(width, columns, taps) @ taps  # [B * h * 3, W, O]
    wide = wide.view(batch, height * 3, columns * out)  # [B, h * 3, W * O]
    part = F.conv2d(low_level, low_level_weight, bias, padding=1).permute(0, 2, 3, 1)  # [B, H, W, O]
    matrix = interpolation(height, rows, taps).expand(batch, -1, -1)  # [B, H, h * 3]
    whole = torch.baddbmm(part.reshape(batch, rows, columns * out), matrix, wide)  # [B, H, W * O]
    return whole.view(part.shape).permute(0, 3, 1, 2)  # [B, O, H, W]


def interpolation(length: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """The weights with which `length` pixels, at each of the kernel's three places, count for `size` pixels,
    `[size, length * 3]`: those of bilinear interpolation, one pixel further for each place, and 0 from the padding.

    Of the dtype and device of `like`, and rounded so that a pixel's two weights add up to 1 in that dtype.
    """
    exact = torch.eye(length, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    weights = F.interpolate(exact[None], size=size, mode="linear", align_corners=False)[0].T  # [size, length]
    step = torch.finfo(like.dtype).eps / 2
    weights = (weights / step).round() * step
    return F.pad(weights, (0, 0, 1, 1)).unfold(0, 3, 1).reshape(size, length * 3).to(like.dtype)
