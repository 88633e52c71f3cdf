import time

import pytest
import torch
from torch import nn
from torchvision import models

from network import build_model
from utils import environment
from utils.environment import model_cost


@pytest.fixture(autouse=True)
def nothing_cached():
    model_cost.cache_clear()
    yield
    model_cost.cache_clear()


def test_operations_are_those_of_the_convolution_and_a_multiply_add_is_two(monkeypatch):
    monkeypatch.setattr(environment, "build_model", lambda *_, **__: nn.Conv2d(3, 4, 3, padding=1))
    cost = model_cost("one layer", num_classes=4, output_stride=16, height=10, width=20)
    assert cost == {"parameters": 3 * 4 * 9 + 4, "gflops": 2 * 10 * 20 * 3 * 4 * 9 / 1e9}


def test_parameters_are_those_of_torchvisions_deeplabv3():
    theirs = models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21)
    cost = model_cost("deeplabv3_resnet50", num_classes=21, output_stride=8)
    assert cost["parameters"] == sum(parameter.numel() for parameter in theirs.parameters())


def test_operations_are_counted_without_computing_and_leave_the_random_numbers_alone():
    before, began = torch.get_rng_state(), time.perf_counter()
    cost = model_cost("deeplabv3plus_resnet50", num_classes=21, output_stride=16)
    assert round(cost["gflops"], 1) == 124.8 and round(cost["parameters"] / 1e6, 1) == 39.8
    assert time.perf_counter() - began < 5
    assert torch.equal(before, torch.get_rng_state())


def test_operations_do_not_depend_on_where_the_model_is():
    model = build_model("deeplabv3plus_mobilenet_v3_large", num_classes=4).eval()
    with environment.FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 65, 97))
    cost = model_cost("deeplabv3plus_mobilenet_v3_large", num_classes=4, output_stride=16, height=65, width=97)
    assert cost["gflops"] == counter.get_total_flops() / 1e9
