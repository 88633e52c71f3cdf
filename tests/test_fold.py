import copy

import pytest
import torch
from torch import nn

from network import build_model
from network.atrous import AtrousConv2d
from network.fold import folded

NAMES = ["deeplabv3plus_resnet50", "deeplabv3_resnet50", "deeplabv3plus_mobilenet_v3_large"]


def trained(name):
    """Batch norms that are far from where they start, so that leaving out any part of one shows."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=5).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, std=0.3)
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    model = trained(request.param)
    return model, folded(model)


def test_folded_network_has_the_same_logits(pair):
    model, fold = pair
    x = torch.randn(2, 3, 65, 49)
    with torch.inference_mode():
        expected, logits = model(x), fold(x)
    assert expected.std() > 0.1 or expected.abs().max() > 0.1
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


def test_folded_network_under_autocast_is_as_close_to_float32_as_the_network(pair):
    model, fold = pair
    x = torch.randn(2, 3, 65, 49)
    with torch.inference_mode():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            plain, logits = model(x), fold(x)
    assert logits.dtype == torch.float32
    # bfloat16 has 8 bits, and some sixty layers round one after the other.
    assert (logits - expected).norm() <= 1.5 * (plain - expected).norm() + 2**-8 * expected.norm()


def test_folded_network_has_no_batch_norm_left_and_does_not_train(pair):
    model, fold = pair
    assert not [module for module in fold.modules() if isinstance(module, nn.BatchNorm2d) or module.training]
    assert not any(parameter.requires_grad for parameter in fold.parameters())
    weights = [module.weight for module in fold.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    rates = [module.dilation[0] for module in fold.modules() if isinstance(module, AtrousConv2d)]
    assert rates == [6, 12, 18] and type(fold) is type(model)


@pytest.mark.parametrize("training", [True, False])
def test_network_itself_is_left_alone(training):
    model = trained(NAMES[-1]).train(training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    fold = folded(model)
    with torch.no_grad():
        for parameter in fold.parameters():
            parameter.zero_()
    assert model.training is training and [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and (p.grad == 1).all() for p in model.parameters())


def test_only_a_batch_norm_right_after_a_convolution_is_folded():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    assert [type(module) for module in folded(model)] == [type(module) for module in model]
