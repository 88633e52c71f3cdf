import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from network import build_model, upsample
from network._deeplab import DeepLabHeadPlus
from network.upsample import (
    DecoderConv2d,
    conv_after_upsampling,
    conv_before_upsampling,
    interpolation,
    pays_before_upsampling,
)

sides = st.integers(1, 12)
cases = given(
    st.tuples(sides, sides), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 3), st.booleans()
)


def tensors(size, low_level_size, batch, *, has_bias, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(batch, 3, *low_level_size), (batch, 5, *size), (4, 8, 3, 3), (4,)]
    low_level, x, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return low_level, x, weight, bias if has_bias else None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@settings(max_examples=40, deadline=None)
@cases
def test_before_upsampling_is_after_upsampling(dtype, tolerance, order, size, low_level_size, batch, has_bias):
    low_level, x, weight, bias = tensors(size, low_level_size, batch, has_bias=has_bias)
    expected = conv_after_upsampling(low_level, x, weight, bias)
    low_level, x, weight = (t.to(dtype).contiguous(memory_format=order) for t in (low_level, x, weight))
    result = conv_before_upsampling(low_level, x, weight, bias.to(dtype) if has_bias else None)
    assert result.shape == expected.shape and result.dtype == dtype
    assert (result - expected).norm() <= tolerance * expected.norm()


@settings(max_examples=40, deadline=None)
@cases
def test_in_bfloat16_it_is_off_by_its_rounding(size, low_level_size, batch, has_bias):
    inputs = tensors(size, low_level_size, batch, has_bias=has_bias, dtype=torch.bfloat16)
    exact = conv_after_upsampling(*(None if t is None else t.double() for t in inputs))
    # Each of a few roundings is by up to 2^-9 of a value, and weights of the interpolation are off by as much.
    for form in (conv_after_upsampling, conv_before_upsampling):
        result = form(*inputs)
        assert result.dtype == torch.bfloat16
        assert (result.double() - exact).norm() <= 2**-7 * exact.norm().clamp_min(1)


@settings(max_examples=40, deadline=None)
@cases
def test_gradients_are_those_of_the_convolution_after_upsampling(size, low_level_size, batch, has_bias):
    inputs = [t for t in tensors(size, low_level_size, batch, has_bias=has_bias) if t is not None]
    gradients = []
    for form in (conv_after_upsampling, conv_before_upsampling):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = form(*leaves, *([] if has_bias else [None]))
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradients.append(torch.autograd.grad(out, leaves, upstream))
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("length", "size"), [(33, 129), (65, 257), (17, 65), (9, 33), (24, 94), (5, 5), (7, 3), (1, 4)]
)
def test_weights_of_a_pixel_add_up_to_one_so_that_an_even_map_stays_even(length, size, dtype):
    middle = interpolation(length, size, torch.empty(0, dtype=dtype)).view(size, length, 3)[:, :, 1]
    assert middle.dtype == dtype and (middle.double().sum(dim=1) == 1).all()
    assert (middle >= 0).all() and ((middle > 0).sum(dim=1) <= 2).all()


@pytest.fixture
def forms(monkeypatch):
    """The names of the forms that were used, in order."""
    used = []
    for name in ("conv_before_upsampling", "conv_after_upsampling"):
        form = getattr(upsample, name)
        monkeypatch.setattr(upsample, name, lambda *args, name=name, form=form: (used.append(name), form(*args))[1])
    return used


@pytest.mark.parametrize(
    ("size", "low_level_size", "autocast", "before"),
    [
        (33, 129, False, True),
        (33, 129, True, True),
        (65, 129, False, False),  # half of the multiplications: enough in bfloat16 alone
        (65, 129, True, True),
        (129, 257, True, False),
        (2, 5, True, False),  # too small to pay
        (5, 17, True, True),
    ],
)
def test_form_goes_by_size_and_dtype(size, low_level_size, autocast, before):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        low_level, x = torch.empty(1, 48, low_level_size, low_level_size), torch.empty(1, 256, size, size)
        assert pays_before_upsampling(low_level, x) is before


def test_network_uses_it_and_has_the_logits_and_gradients_that_it_had(forms, monkeypatch):
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_mobilenet_v3_large", num_classes=3).double()
    images = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    results = []
    for pays in (pays_before_upsampling, lambda *maps: False):
        monkeypatch.setattr(upsample, "pays_before_upsampling", pays)
        model.seed_dropout(1)
        logits = model(images)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
    assert forms == ["conv_before_upsampling", "conv_after_upsampling"]
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)  # logits are float32


def test_compiled_or_exported_graphs_hold_the_plain_form(forms, monkeypatch):
    conv, maps = DecoderConv2d(3, 64, 4), (torch.randn(1, 3, 33, 33), torch.randn(1, 64, 9, 9))
    expected = conv(maps)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(conv(maps), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    conv(maps)
    assert forms == ["conv_before_upsampling", "conv_after_upsampling", "conv_after_upsampling"]


def test_decoder_convolution_can_be_copied_and_pickled_and_saves_as_any_other():
    conv = DecoderConv2d(3, 64, 4, bias=False)
    maps = torch.randn(1, 3, 17, 17), torch.randn(1, 64, 5, 5)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(maps), conv(maps))
    torch.nn.Conv2d(67, 4, 3, padding=1, bias=False).load_state_dict(conv.state_dict())


def test_other_devices_upsample_first(forms):
    with torch.device("meta"):
        head = DeepLabHeadPlus(8, 6, 5, (6,))
        logits = head({"out": torch.empty(2, 8, 9, 9), "low_level": torch.empty(2, 6, 33, 33)})
    assert logits.shape == (2, 5, 33, 33) and forms == ["conv_after_upsampling"]
