"""Makes the same network faster; nobody needs to read this file to understand the model.

`speed_up(model)` swaps layer classes in place for versions that save work on a CPU. `fold_batchnorm(model)` makes a
copy for evaluation in which each batch norm is part of the convolution before it. Parameters and their names stay,
and so do the results, up to rounding. `build_model` gives the plain layers; training with `--compile`, ONNX export
and FLOP counts use those.
"""

import copy
import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from network._deeplab import ASPP, DeepLab, DeepLabHeadPlus, upsample

Network = TypeVar("Network", bound=nn.Module)
log = logging.getLogger("deeplab")


def speed_up(model: Network) -> Network:
    """Swaps layers in place for faster ones if the model is on a CPU; returns the model."""
    if next(model.parameters()).device.type != "cpu":
        return model
    for module in model.modules():
        if type(module) is ASPP:
            for conv in (branch[0] for branch in module.convs[1:-1]):  # the atrous branches
                if type(conv) is nn.Conv2d:  # separable convolutions are fast as they are
                    conv.__class__ = FastAtrousConv2d
        elif type(module) is DeepLabHeadPlus:
            if type(module.classifier[0]) is nn.Conv2d:
                module.__class__ = FastDeepLabHeadPlus
        elif type(module) is DeepLab:
            module.__class__ = FastDeepLab
    return model


def fold_batchnorm(model: Network) -> Network:
    """Copies a model for evaluation, with each batch norm folded into the convolution declared right before it.

    Nearly always that convolution also runs right before it. The copy is compared with the model on one small input;
    if it differs by more than rounding, a warning says so and the copy is a plain one. It is in evaluation mode,
    channels last and without gradients. The model itself does not change.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    folded = copy.deepcopy(plain)
    for parent in list(folded.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                # timm's BatchNormAct2d is a BatchNorm2d that also drops and activates.
                rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
                parent.register_module(conv_name, fuse_conv_bn_eval(conv, norm))
                parent.register_module(norm_name, nn.Sequential(*rest).eval())
    folded.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        image = torch.linspace(-2, 2, 3 * 65 * 65, device=next(plain.parameters()).device).view(1, 3, 65, 65)
        expected, found = plain(image), folded(image)
    if (found - expected).abs().max() > 1e-2 * expected.abs().max():
        log.warning("batch norms could not be folded into this model's convolutions; it is evaluated as it is")
        return plain
    return folded


class FastDeepLab(DeepLab):
    """DeepLab that normalises whole rows: three channels at a time are too few for the CPU and take twice as long."""

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = (value.flatten().repeat(images.shape[-1]) for value in (self.mean, self.std))  # [3 W]
        rows = images.permute(0, 2, 3, 1).flatten(2).float()  # [B, H, 3 W]
        return rows.sub_(mean).div_(std).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)  # [B, 3, H, W]


class FastDeepLabHeadPlus(DeepLabHeadPlus):
    """The V3+ head, which convolves the ASPP output before upsampling it wherever that is faster.

    Median ms, 48 low-level and 256 other channels to 256, on 2 cores with AVX-512 BF16 (AMD EPYC, torch 2.15),
    forward and with the backward pass; the shares are those of the products left, for the upsampled map and in all:

    | maps, batch         | products left | float32: after | before    | bfloat16: after | before    |
    | 33x33 to 129x129, 1 |    14%    28% |     52.2   200 | 26.3   62 |      26.6    96 |  9.8   29 |
    | 65x65 to 257x257, 1 |    21%    34% |      257   872 |  165  372 |       138   451 |   64  154 |
    | 33x33 to 65x65, 2   |    37%    47% |     25.2    86 | 19.2   50 |      13.4    48 |  9.0   25 |
    | 65x65 to 129x129, 1 |    47%    55% |     52.0   200 | 69.7  156 |      26.6    98 | 20.0   57 |
    | 129 to 257, 1       |    67%    72% |      287   939 |  404  965 |       139   464 |  186  412 |
    | 5x5 to 17x17, 2     |    10%    24% |     1.77   6.3 | 0.89  3.4 |      1.06   4.3 | 0.76  3.2 |
    | 2x2 to 5x5, 1       |    17%    30% |     0.29  1.08 | 0.30 1.52 |      0.20  1.11 | 0.45 2.06 |
    """

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        low_level = self.project(features["low_level"])  # [B, 48, H/4, W/4]
        context = self.aspp(features["out"])  # [B, 256, H/s, W/s]
        pays = pays_before_upsampling(low_level, context)
        convolve = conv_before_upsampling if pays else conv_after_upsampling
        x = convolve(low_level, context, self.classifier[0].weight, self.classifier[0].bias)
        return self.classifier[1:](x)  # [B, C, H/4, W/4]


def pays_before_upsampling(low_level: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether convolving before upsampling is faster, by the table in `FastDeepLabHeadPlus`."""
    (_, channels, height, width), (rows, columns) = x.shape, low_level.shape[-2:]
    before = 9 * height * width * (channels + columns) + 3 * height * rows * columns
    after = 9 * channels * rows * columns
    enough = 0.4 if autocast_dtype(x) == torch.float32 else 0.5
    return before < enough * after and rows * columns >= 16 * 16


def conv_after_upsampling(
    low_level: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Computes the decoder's first convolution as in the paper: upsample, concatenate, convolve.

    `[B, L, H, W]` and `[B, C, h, w]` to `[B, O, H, W]`.
    """
    return F.conv2d(torch.cat([low_level, upsample(x, low_level.shape[-2:])], dim=1), weight, bias, padding=1)


def conv_before_upsampling(
    low_level: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Computes `conv_after_upsampling` up to rounding with fewer products; both maps have the same dtype.

    Upsampling mixes pixels and each weight of the kernel mixes channels, so the two can be swapped: all nine weights
    are applied to x at its own size. Two products with the interpolation weights follow, one along each side. They
    enlarge the nine maps to the size of the low-level features, shift each to its place and add them up.
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
    """Returns the weights of `length` pixels, at each of the kernel's three places, in `size` pixels.

    `[size, length * 3]`: the weights of bilinear interpolation, shifted by one pixel per place, 0 for the padding.
    They have the dtype and device of `like` and are rounded so that the two weights of a pixel add up to 1 exactly.
    """
    exact = torch.eye(length, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    weights = F.interpolate(exact[None], size=size, mode="linear", align_corners=False)[0].T  # [size, length]
    step = torch.finfo(like.dtype).eps / 2
    weights = (weights / step).round() * step
    return F.pad(weights, (0, 0, 1, 1)).unfold(0, 3, 1).reshape(size, length * 3).to(like.dtype)


class FastAtrousConv2d(nn.Conv2d):
    """A 3x3 atrous convolution (1706.05587, section 3.3) that skips products with padding: `[B, F, h, w]` to
    `[B, O, h, w]`. At rates near the size of the map these are most of the products.

    Rows and columns of the kernel that only ever meet padding are left out. Where the kernel's extent, 2 rate + 1,
    exceeds the map's shorter side, the library leaves its fast path. There gradients come from `AtrousProducts`,
    unless only the centre of the kernel remains. The convolution itself stays the library's, which keeps up with a
    matrix product, except in bfloat16 with AMX. Median ms in bfloat16 for 256 outputs on 2 cores with AVX-512
    BF16 (AMD EPYC, torch 2.15); with AMX, products were 3 to 10 times as fast as the library on an earlier machine:

    | channels, map, batch | rate | forward: library | kernel cut | products | and backward: library | ours |
    | 2048, 33x33, 1       |   12 |             10.9 |       11.0 |     10.6 |                  34.6 | 34.9 |
    | 2048, 33x33, 1       |   18 |              9.0 |        9.0 |      8.1 |                  69.4 | 25.1 |
    | 2048, 33x33, 1       |   36 |              4.7 |        1.9 |      2.5 |                  52.6 | 10.1 |
    | 2048, 17x17, 2       |    6 |              7.5 |        7.5 |      6.7 |                  25.3 | 25.4 |
    | 2048, 17x17, 2       |   12 |              5.6 |        5.5 |      4.2 |                  48.0 | 14.4 |
    |  960, 33x33, 2       |   18 |              6.2 |        6.0 |      7.9 |                  39.3 | 21.3 |
    | 2048, 65x65, 1       |   24 |             34.7 |       35.0 |     41.3 |                   152 |  150 |
    | 2048, 65x65, 1       |   36 |             25.7 |       25.3 |     27.8 |                   261 |  117 |
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Cast here, because autocast does not reach into a custom autograd function.
        dtype = autocast_dtype(x)
        x, weight = x.to(dtype), self.weight.to(dtype)
        bias, rate, size = None if self.bias is None else self.bias.to(dtype), self.dilation[0], x.shape[-2:]
        by_products = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        if by_products or (torch.is_grad_enabled() and min(size) < 2 * rate + 1 and rate < max(size)):
            return AtrousProducts.apply(x, weight, bias, rate, by_products)
        return cut_conv2d(x, weight, bias, rate)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which a convolution of x computes on the CPU."""
    enabled = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64  # autocast leaves float64 alone
    return torch.get_autocast_dtype("cpu") if enabled else x.dtype


def cut_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rate: int) -> torch.Tensor:
    """Computes F.conv2d with padding = dilation = rate: `[B, F, h, w]` and `[O, F, 3, 3]` to `[B, O, h, w]`.

    Where the rate reaches the map's height or width, it uses only the middle row or column of the kernel.
    """
    rows, columns = (slice(None) if rate < side else slice(1, 2) for side in x.shape[-2:])
    padding = [rate if rate < side else 0 for side in x.shape[-2:]]
    return F.conv2d(x, weight[:, :, rows, columns], bias, padding=padding, dilation=rate)


class AtrousProducts(torch.autograd.Function):
    """Runs `cut_conv2d` or `sum_of_products` forward and `gradients_of_products` backward.

    Plain autograd through the products takes up to 1.7 times as long (forward and backward) and keeps copies of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rate: int, by_products: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rate, ctx.has_bias = rate, bias is not None
        return (sum_of_products if by_products else cut_conv2d)(x, weight, bias, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_weight = gradients_of_products(grad, *ctx.saved_tensors, ctx.rate)
        return grad_x, grad_weight, grad.sum(dim=(0, 2, 3)) if ctx.has_bias else None, None, None


def sum_of_products(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rate: int) -> torch.Tensor:
    """Computes `cut_conv2d` as one matrix product per kernel weight, each over the pixels that it reaches.

    Products have x's dtype, are summed in float32 or better and rounded once more.
    """
    x, matrices = x.permute(0, 2, 3, 1).contiguous(), weight.permute(2, 3, 1, 0)  # [B, h, w, F], [3, 3, F, O]
    batch, height, width, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(batch, height, width, weight.shape[0], dtype=dtype)
    if bias is not None:
        total += bias
    for column, out_columns, in_columns in reach(width, rate):
        strip = x[:, :, in_columns].contiguous()
        for row, out_rows, in_rows in reach(height, rate):
            product = strip[:, in_rows].reshape(-1, channels) @ matrices[row, column]  # [B * n * m, O]
            part = total[:, out_rows, out_columns]  # [B, n, m, O]
            part += product.view(part.shape)
    return total.to(x.dtype).permute(0, 3, 1, 2)  # [B, O, h, w]


def gradients_of_products(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rate: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of `cut_conv2d` for x and weight, from that of its result, `[B, O, h, w]`."""
    grad, x = grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1).contiguous()  # [B, h, w, O], [B, h, w, F]
    _, height, width, channels = x.shape
    matrices = weight.permute(2, 3, 0, 1)  # [3, 3, O, F]
    grad_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    grad_weight = torch.zeros_like(weight)
    for column, out_columns, in_columns in reach(width, rate):
        strip, grad_strip = x[:, :, in_columns].contiguous(), grad[:, :, out_columns].contiguous()
        for row, out_rows, in_rows in reach(height, rate):
            out = grad_strip[:, out_rows].flatten(0, 2)  # [B * n * m, O]
            part = grad_x[:, in_rows, in_columns]  # [B, n, m, F]
            part += (out @ matrices[row, column]).view(part.shape)
            grad_weight[:, :, row, column] = out.T @ strip[:, in_rows].reshape(-1, channels)
    return grad_x.to(x.dtype).permute(0, 3, 1, 2), grad_weight


def reach(side: int, rate: int) -> Iterator[tuple[int, slice, slice]]:
    """Yields each of the kernel's three places along one side that meets pixels.

    That is its index, the pixels of the result that it contributes to, and the pixels of the input that it meets.
    """
    for place, shift in enumerate((-rate, 0, rate)):
        start, stop = max(0, -shift), min(side, side - shift)
        if start < stop:
            yield place, slice(start, stop), slice(start + shift, stop + shift)
