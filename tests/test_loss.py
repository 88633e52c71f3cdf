import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils.errors import InputError
from utils.loss import LOSSES, build_loss, cross_entropy, focal_loss


def batch(void=0.3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 6, generator=generator, dtype=dtype) * 3
    target = torch.randint(0, 4, (2, 5, 6), generator=generator)
    target[torch.rand(2, 5, 6, generator=generator) < void] = 255
    return logits.requires_grad_(), target


def plain_focal(logits, target, gamma):
    """Pixel by pixel, after the formula."""
    logits, target = logits.detach().double().numpy(), target.numpy()
    losses = []
    for b, y, x in np.argwhere(target != 255):
        p = np.exp(logits[b, :, y, x] - logits[b, :, y, x].max())
        p = p[target[b, y, x]] / p.sum()
        losses.append(-((1 - p) ** gamma) * np.log(p))
    return np.mean(losses)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_is_the_mean_of_the_formula_over_valid_pixels(gamma):
    logits, target = batch()
    assert focal_loss(logits, target, gamma=gamma).item() == pytest.approx(
        plain_focal(logits, target, gamma), rel=1e-9
    )


def test_cross_entropy_is_torchs_mean_over_valid_pixels():
    logits, target = batch()
    expected = F.cross_entropy(logits, target, ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, target), expected)


def test_focal_loss_with_gamma_0_is_cross_entropy():
    logits, target = batch()
    torch.testing.assert_close(focal_loss(logits, target, gamma=0), cross_entropy(logits, target))


def test_gamma_defaults_to_2_and_its_flag_is_read():
    logits, target = batch()
    assert focal_loss(logits, target).item() == pytest.approx(plain_focal(logits, target, 2), rel=1e-9)
    flag = build_loss("focal_loss", focal_gamma=3.0)(logits, target).item()
    assert flag == pytest.approx(plain_focal(logits, target, 3), rel=1e-9)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_void_pixels_do_not_dilute_the_loss(loss_type):
    logits, target = batch(void=0)
    half = torch.cat([target, torch.full_like(target, 255)])
    loss = build_loss(loss_type)
    torch.testing.assert_close(loss(torch.cat([logits, logits]), half), loss(logits, target))


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_void_batch_gives_zero_and_zero_gradients(loss_type, dtype):
    logits = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    loss = build_loss(loss_type)(logits, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_gradients_are_finite_where_the_prediction_is_certain(gamma):
    logits = torch.tensor([[200.0, 0.0, -200.0, 0.0]]).view(1, 2, 1, 2).requires_grad_()
    loss = focal_loss(logits, torch.tensor([[[0, 255]]]), gamma=gamma)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradients_are_those_of_the_function(loss_type, gamma):
    logits, target = batch()
    assert torch.autograd.gradcheck(lambda x: build_loss(loss_type, focal_gamma=gamma)(x, target), logits)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_bfloat16_logits_are_computed_in_float32(loss_type):
    logits, target = batch(dtype=torch.bfloat16)
    loss = build_loss(loss_type)(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, build_loss(loss_type)(logits.float(), target))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_target_may_be_of_any_integer_dtype(dtype):
    logits, target = batch()
    torch.testing.assert_close(cross_entropy(logits, target.to(dtype)), cross_entropy(logits, target))


def test_unknown_loss_and_negative_gamma_are_refused():
    with pytest.raises(InputError, match="--loss_type dice: there are cross_entropy"):
        build_loss("dice")
    with pytest.raises(InputError, match="--focal_gamma -1"):
        build_loss("focal_loss", focal_gamma=-1)
