import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from network import _deeplab, atrous
from network.atrous import AtrousConv2d, AtrousProducts, live_conv2d, sum_of_products, taps

sides = st.integers(1, 20)
cases = given(st.tuples(sides, sides), st.integers(1, 24), st.integers(1, 3), st.booleans(), st.booleans())


def tensors(size, batch, *, channels_last, has_bias, dtype=torch.float64):
    torch.manual_seed(0)
    x, weight = torch.randn(batch, 5, *size, dtype=torch.float64), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64) if has_bias else None
    order = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = x.to(dtype).contiguous(memory_format=order), weight.to(dtype).contiguous(memory_format=order)
    return x, weight, None if bias is None else bias.to(dtype)


def reference(x, weight, bias, rate):
    return F.conv2d(x, weight, bias, padding=rate, dilation=rate)


def by_function(by_products):
    return lambda x, weight, bias, rate: AtrousProducts.apply(x, weight, bias, rate, by_products)


@pytest.mark.parametrize("form", [live_conv2d, sum_of_products, by_function(True), by_function(False)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@settings(max_examples=40, deadline=None)
@cases
def test_every_form_is_the_convolution(form, dtype, tolerance, size, rate, batch, channels_last, has_bias):
    x, weight, bias = tensors(size, batch, channels_last=channels_last, has_bias=has_bias)
    expected = reference(x, weight, bias, rate)
    result = form(*(None if t is None else t.to(dtype) for t in (x, weight, bias)), rate)
    assert result.shape == expected.shape and result.dtype == dtype
    assert (result - expected).norm() <= tolerance * expected.norm()


@settings(max_examples=40, deadline=None)
@cases
def test_products_in_bfloat16_are_off_by_its_rounding_as_the_convolution_is(
    size, rate, batch, channels_last, has_bias
):
    x, weight, bias = tensors(size, batch, channels_last=channels_last, has_bias=has_bias, dtype=torch.bfloat16)
    exact = reference(x.double(), weight.double(), None if bias is None else bias.double(), rate)
    for form in (reference, live_conv2d, sum_of_products):
        result = form(x, weight, bias, rate)
        assert result.dtype == torch.bfloat16
        # Each product is rounded by up to 2^-9 of itself, and the sum once more.
        assert (result.double() - exact).norm() <= 2**-8 * exact.norm().clamp_min(1)


@pytest.mark.parametrize("by_products", [True, False])
@settings(max_examples=40, deadline=None)
@cases
def test_gradients_are_those_of_the_convolution(by_products, size, rate, batch, channels_last, has_bias):
    inputs = [t for t in tensors(size, batch, channels_last=channels_last, has_bias=has_bias) if t is not None]
    results = []
    for form in (reference, by_function(by_products)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = form(*leaves, *([None] if not has_bias else []), rate)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append(torch.autograd.grad(out, leaves, upstream))
    for expected, gradient in zip(*results, strict=True):
        assert gradient.shape == expected.shape
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("by_products", [True, False])
@pytest.mark.parametrize(("size", "rate"), [((4, 5), 3), ((3, 6), 4), ((2, 2), 2)])
def test_gradients_pass_gradcheck(size, rate, by_products):
    inputs = tensors(size, 2, channels_last=True, has_bias=True)
    inputs = [t[:, :2].clone() if t.dim() == 4 else t for t in inputs]
    assert torch.autograd.gradcheck(by_function(by_products), (*(t.requires_grad_() for t in inputs), rate))


def test_gradients_in_bfloat16_are_off_by_its_rounding():
    x, weight, _ = tensors((9, 12), 2, channels_last=True, has_bias=False, dtype=torch.bfloat16)
    gradients = []
    for form, dtype in ((reference, torch.float64), (by_function(False), torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        form(*leaves, None, 6).sum().backward()
        gradients.append([leaf.grad.double() for leaf in leaves])
    for expected, gradient in zip(*gradients, strict=True):
        assert (gradient - expected).norm() <= 2**-7 * expected.norm()


@given(sides, st.integers(1, 24))
def test_taps_meet_each_pixel_that_is_there_once_and_no_padding(side, rate):
    met = {
        (o, tap): i
        for tap, out, into in taps(side, rate)
        for o, i in zip(range(side)[out], range(side)[into], strict=True)
    }
    assert met == {
        (o, tap): o + (tap - 1) * rate for o in range(side) for tap in range(3) if 0 <= o + (tap - 1) * rate < side
    }


# The module


@pytest.fixture
def chosen(monkeypatch):
    """What computed a convolution: "library", or the flag of AtrousProducts. Without AMX unless a test says so."""
    seen, library, products = [], atrous.live_conv2d, AtrousProducts.apply

    def record_products(*arguments):
        seen.append(arguments[-1])
        return products(*arguments)

    def record_library(*arguments):
        seen.append("library")
        return library(*arguments)

    monkeypatch.setattr(AtrousProducts, "apply", record_products)
    monkeypatch.setattr(atrous, "live_conv2d", record_library)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return seen


@pytest.mark.parametrize(
    ("size", "rate", "by_function"),
    [
        ((33, 33), 12, False),
        ((33, 33), 16, False),  # an extent of 33
        ((33, 33), 18, True),
        ((33, 33), 33, False),  # the middle of the kernel remains
        ((20, 40), 9, False),
        ((20, 40), 10, True),
        ((40, 20), 39, True),
        ((20, 40), 40, False),
        ((1, 1), 6, False),
    ],
)
@pytest.mark.parametrize("amp", [True, False])
def test_gradients_come_from_products_where_the_kernel_is_larger_than_the_map(chosen, size, rate, by_function, amp):
    conv, x = AtrousConv2d(2, 3, rate, bias=False), torch.randn(2, 2, *size)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        conv(x)
        assert chosen.pop(0) is False if by_function else chosen == ["library"]
        chosen.clear()
        with torch.no_grad():
            conv(x)
        with torch.inference_mode():
            conv(x)
    assert chosen == ["library", "library"]


def test_with_amx_everything_in_bfloat16_is_products(chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    conv, x = AtrousConv2d(2, 3, 2), torch.randn(1, 2, 9, 9)
    with torch.inference_mode():
        conv(x)
        with torch.autocast("cpu", torch.bfloat16):
            conv(x)
        conv.bfloat16()(x.bfloat16())
    assert chosen == ["library", True, True]


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("rate", [1, 6, 12])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_gives_the_dtype_and_the_sum_of_a_plain_convolution(monkeypatch, has_amx, rate, grad):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    torch.manual_seed(0)
    conv = AtrousConv2d(4, 3, rate)
    plain = torch.nn.Conv2d(4, 3, 3, padding=rate, dilation=rate)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 9, 12)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        expected, result = plain(x), conv(x)
    assert result.dtype == expected.dtype == torch.bfloat16 and result.requires_grad is grad
    torch.testing.assert_close(result, expected, rtol=2**-6, atol=2**-6)
    if grad:
        result.float().square().mean().backward()
        expected.float().square().mean().backward()
        for ours, theirs in zip(conv.parameters(), plain.parameters(), strict=True):
            assert ours.grad.dtype == torch.float32
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=2**-5, atol=2**-5)


def test_parameters_are_those_of_a_convolution_and_copies_compute_the_same():
    conv, x = AtrousConv2d(2, 3, 4), torch.randn(1, 2, 5, 6)
    assert isinstance(conv, torch.nn.Conv2d) and list(conv.state_dict()) == ["weight", "bias"]
    assert list(AtrousConv2d(2, 3, 4, bias=False).state_dict()) == ["weight"]
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x), conv(x))


def test_exported_graphs_hold_a_plain_convolution():
    branch = _deeplab.ASPPConv(2, 3, 4).eval()
    graph = torch.export.export(branch, (torch.randn(1, 2, 5, 6),))
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "conv" in target] == ["aten.conv2d.default"]
    assert not [target for target in targets if "slice" in target]
