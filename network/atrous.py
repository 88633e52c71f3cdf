"""The 3x3 atrous convolutions of ASPP (Chen et al. 2017, arXiv 1706.05587, section 3.1) without what they do for
nothing: at rates of the map's size most of their products are with padding."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class AtrousConv2d(nn.Conv2d):
    """A 3x3 convolution at an atrous rate that keeps height and width: `[B, F, h, w]` to `[B, O, h, w]`, dtype and
    parameters as in nn.Conv2d.

    On every device, rows and columns of the kernel that only ever meet padding are left out (rates of the map's
    height or width and more): the sum is the same.

    On the CPU gradients come from `AtrousProducts` where the kernel's extent, 2 rate + 1, is more than the map's
    shorter side, for there the library leaves its fast path, and more than the middle of the kernel remains. The
    convolution itself stays the library's, which keeps up with a matrix product, except in bfloat16 with AMX, where
    it does not. Medians in ms, bfloat16, 256 outputs, 2 cores with AVX-512 BF16 (AMD EPYC, torch 2.15); there are no
    figures with AMX but those of an earlier machine, where products were 3 to 10 times as fast as the library:

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

    def __init__(self, in_channels: int, out_channels: int, rate: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=rate, dilation=rate, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
            return super().forward(x)  # a graph holds for other sizes too
        weight, bias, rate, size = self.weight, self.bias, self.dilation[0], x.shape[-2:]
        if x.device.type != "cpu":
            return live_conv2d(x, weight, bias, rate)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        by_products = x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        if by_products or (torch.is_grad_enabled() and min(size) < 2 * rate + 1 and rate < max(size)):
            return AtrousProducts.apply(x, weight, bias, rate, by_products)
        return live_conv2d(x, weight, bias, rate)


def live_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rate: int) -> torch.Tensor:
    """F.conv2d with padding = dilation = rate and a 3x3 kernel, of which the middle row, column or both are enough
    where the rate is of the map's height, width or both. `[B, F, h, w]`, `[O, F, 3, 3]` to `[B, O, h, w]`."""
    rows, columns = (slice(None) if rate < side else slice(1, 2) for side in x.shape[-2:])
    padding = [rate if rate < side else 0 for side in x.shape[-2:]]
    return F.conv2d(x, weight[:, :, rows, columns], bias, padding=padding, dilation=rate)


class AtrousProducts(torch.autograd.Function):
    """`live_conv2d`, or `sum_of_products` in its place, with `gradients_of_products`.

    Plain autograd through the products takes up to 1.7 times as long (forward and backward), and keeps copies of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rate: int, by_products: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rate, ctx.has_bias = rate, bias is not None
        return (sum_of_products if by_products else live_conv2d)(x, weight, bias, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_weight = gradients_of_products(grad, *ctx.saved_tensors, ctx.rate)
        return grad_x, grad_weight, grad.sum(dim=(0, 2, 3)) if ctx.has_bias else None, None, None


def sum_of_products(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rate: int) -> torch.Tensor:
    """`live_conv2d` as one matrix product for each of the nine weights, of the pixels that it reaches.

    Products come in x's dtype, are added up in float32 or better and rounded once more.
    """
    x, matrices = x.permute(0, 2, 3, 1).contiguous(), weight.permute(2, 3, 1, 0)  # [B, h, w, F], [3, 3, F, O]
    batch, height, width, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(batch, height, width, weight.shape[0], dtype=dtype)
    if bias is not None:
        total += bias
    for column, out_columns, in_columns in taps(width, rate):
        strip = x[:, :, in_columns].contiguous()
        for row, out_rows, in_rows in taps(height, rate):
            product = strip[:, in_rows].reshape(-1, channels) @ matrices[row, column]  # [B * n * m, O]
            part = total[:, out_rows, out_columns]  # [B, n, m, O]
            part += product.view(part.shape)
    return total.to(x.dtype).permute(0, 3, 1, 2)  # [B, O, h, w]


def gradients_of_products(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rate: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `live_conv2d` with respect to x and weight, where grad, `[B, O, h, w]`, is that of its result."""
    grad, x = grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1).contiguous()  # [B, h, w, O], [B, h, w, F]
    _, height, width, channels = x.shape
    matrices = weight.permute(2, 3, 0, 1)  # [3, 3, O, F]
    grad_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    grad_weight = torch.zeros_like(weight)
    for column, out_columns, in_columns in taps(width, rate):
        strip, grad_strip = x[:, :, in_columns].contiguous(), grad[:, :, out_columns].contiguous()
        for row, out_rows, in_rows in taps(height, rate):
            out = grad_strip[:, out_rows].flatten(0, 2)  # [B * n * m, O]
            part = grad_x[:, in_rows, in_columns]  # [B, n, m, F]
            part += (out @ matrices[row, column]).view(part.shape)
            grad_weight[:, :, row, column] = out.T @ strip[:, in_rows].reshape(-1, channels)
    return grad_x.to(x.dtype).permute(0, 3, 1, 2), grad_weight


def taps(side: int, rate: int) -> Iterator[tuple[int, slice, slice]]:
    """Along one side, each of the kernel's three places that meets pixels: its index, which pixels of the result it
    counts for, and which of the input it meets there."""
    for tap, shift in enumerate((-rate, 0, rate)):
        start, stop = max(0, -shift), min(side, side - shift)
        if start < stop:
            yield tap, slice(start, stop), slice(start + shift, stop + shift)
