"""A network for evaluation alone: there a batch norm is a part of the convolution before it."""

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Network = TypeVar("Network", bound=nn.Module)


def folded(model: Network) -> Network:
    """A copy in evaluation mode, in channels-last order, without gradients, each batch norm folded into the
    convolution that is declared right before it (in torchvision's networks and ours the one that runs before it).

    It computes the same up to rounding. The model itself is left alone.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for parent in list(model.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent.register_module(conv_name, fuse_conv_bn_eval(conv, norm))
                parent.register_module(norm_name, nn.Identity().eval())
    return model.to(memory_format=torch.channels_last)
