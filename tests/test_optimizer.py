import argparse

import pytest
import torch

from network import build_model
from utils.optimizer import build_optimizer


@pytest.fixture(scope="module")
def model():
    return build_model("deeplabv3_mobilenet_v3_large", num_classes=2)


def options(**changes):
    defaults = {"lr": 0.01, "backbone_lr_factor": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "lr_policy": "step"}
    defaults |= {"step_size": 1000, "gamma": 0.9, "warmup_itrs": 0, "total_itrs": 5000}
    return argparse.Namespace(**(defaults | changes))


def head_rates(model, itrs, **changes):
    optimizer, scheduler = build_optimizer(options(**changes), model)
    rates = []
    for _ in range(itrs):
        rates.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[-1]["lr"] * 0.1)
    return rates


def test_every_parameter_is_in_one_group_and_the_backbone_is_slower(model):
    optimizer, _ = build_optimizer(options(), model)
    backbone, head = optimizer.param_groups
    assert (backbone["lr"], head["lr"]) == (pytest.approx(0.001), 0.01)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert all((g["momentum"], g["weight_decay"]) == (0.9, 1e-4) for g in optimizer.param_groups)
    assert isinstance(optimizer, torch.optim.SGD)


def test_step_policy_drops_by_gamma_every_step_size_iterations(model):
    rates = head_rates(model, 9, step_size=4, gamma=0.9)
    assert rates == pytest.approx([0.01] * 4 + [0.009] * 4 + [0.0081])


def test_poly_policy_reaches_zero_and_stays_there(model):
    rates = head_rates(model, 14, lr_policy="poly", total_itrs=10)
    expected = [0.01 * max(0, 1 - itr / 10) ** 0.9 for itr in range(14)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert all(isinstance(rate, float) for rate in rates)


@pytest.mark.parametrize("policy", ["step", "poly"])
def test_warm_up_rises_linearly_to_the_policys_rate(model, policy):
    plain = head_rates(model, 8, lr_policy=policy, total_itrs=20)
    warm = head_rates(model, 8, lr_policy=policy, total_itrs=20, warmup_itrs=4)
    assert [w / p for w, p in zip(warm, plain, strict=True)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("device", "scaled", "fused"), [("cpu", False, None), ("cuda", False, True), ("cuda", True, None)]
)
def test_sgd_is_fused_on_a_gpu_where_no_scaler_may_skip_its_first_step(model, monkeypatch, device, scaled, fused):
    monkeypatch.setattr(type(model), "device", torch.device(device))
    asked = {}

    def sgd(groups, **keywords):
        asked.update(keywords)
        return torch.optim.SGD(groups, **keywords | {"fused": None})

    monkeypatch.setattr("utils.optimizer.SGD", sgd)
    build_optimizer(options(), model, scaled=scaled)
    assert asked["fused"] is fused
