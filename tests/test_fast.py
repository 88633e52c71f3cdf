import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from network import build_model, fast
from network._deeplab import DeepLab, DeepLabHeadPlus
from network.fast import (
    AtrousProducts,
    FastAtrousConv2d,
    FastDeepLab,
    FastDeepLabHeadPlus,
    conv_after_upsampling,
    conv_before_upsampling,
    cut_conv2d,
    fold_batchnorm,
    interpolation,
    pays_before_upsampling,
    reach,
    speed_up,
    sum_of_products,
)

NAMES = ["deeplabv3plus_resnet50", "deeplabv3_resnet50", "deeplabv3plus_mobilenet_v3_large"]


# --- speed_up ---


def trained(name, **keywords):
    """A model whose batch norms are far from where they start, so that leaving out any part of one shows."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, **keywords).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, std=0.3)
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.5, 2.0)
    return model


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", NAMES)
def test_speed_up_swaps_layers_and_keeps_the_state_dict(name):
    model = build_model(name, num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert speed_up(model) is model and type(model) is FastDeepLab and isinstance(model, DeepLab)
    rates = [module.dilation[0] for module in model.modules() if isinstance(module, FastAtrousConv2d)]
    assert rates == [6, 12, 18]
    assert isinstance(model.classifier, FastDeepLabHeadPlus) == name.startswith("deeplabv3plus")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    build_model(name, num_classes=3).load_state_dict(after)


@pytest.mark.parametrize("name", NAMES)
def test_faster_layers_give_the_logits_and_gradients_of_the_plain_ones(name):
    plain = without_dropout(trained(name)).double().train()
    faster = speed_up(copy.deepcopy(plain))
    images, results = torch.randn(2, 3, 65, 97, dtype=torch.float64), []
    for model in (plain, faster):
        logits = model(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for expected, result in zip(*results, strict=True):
        assert (result - expected).norm() <= 1e-4 * expected.norm() + 1e-6  # logits are float32


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_images_are_normalised_the_same(order):
    model = build_model(NAMES[-1], num_classes=2)
    images = torch.randint(0, 256, (2, 3, 9, 13), dtype=torch.uint8).contiguous(memory_format=order)
    expected = model.normalize(images)
    torch.testing.assert_close(speed_up(model).normalize(images), expected)
    assert expected.dtype == torch.float32 and images.dtype == torch.uint8


def test_other_devices_keep_their_layers():
    with torch.device("meta"):
        model = build_model(NAMES[0], num_classes=3)
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in speed_up(model).modules()] == kinds


def test_a_faster_model_can_be_copied_and_pickled():
    model = speed_up(trained(NAMES[-1]))
    images = torch.randint(0, 256, (1, 3, 33, 49), dtype=torch.uint8)
    with torch.inference_mode():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), model(images))


# --- fold_batchnorm ---


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    model = trained(request.param)
    return model, fold_batchnorm(speed_up(copy.deepcopy(model)))


def test_a_folded_network_has_the_same_logits(pair):
    model, fold = pair
    x = torch.randn(2, 3, 65, 49)
    with torch.inference_mode():
        expected, logits = model(x), fold(x)
    assert expected.std() > 0.1 or expected.abs().max() > 0.1
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


def test_a_folded_network_under_autocast_is_as_close_to_float32_as_the_network(pair):
    model, fold = pair
    x = torch.randn(2, 3, 65, 49)
    with torch.inference_mode():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            plain, logits = model(x), fold(x)
    assert logits.dtype == torch.float32
    # bfloat16 has 8 bits, and some sixty layers round one after the other.
    assert (logits - expected).norm() <= 1.5 * (plain - expected).norm() + 2**-8 * expected.norm()


def test_a_folded_network_has_no_batch_norm_left_and_does_not_train(pair):
    _, fold = pair
    assert not [module for module in fold.modules() if isinstance(module, nn.BatchNorm2d) or module.training]
    assert not any(parameter.requires_grad for parameter in fold.parameters())
    weights = [module.weight for module in fold.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    rates = [module.dilation[0] for module in fold.modules() if isinstance(module, FastAtrousConv2d)]
    assert rates == [6, 12, 18] and type(fold) is FastDeepLab


@pytest.mark.parametrize("training", [True, False])
def test_folding_does_not_change_the_network_itself(training):
    model = trained(NAMES[-1]).train(training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    fold = fold_batchnorm(model)
    with torch.no_grad():
        for parameter in fold.parameters():
            parameter.zero_()
    assert model.training is training and [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and (p.grad == 1).all() for p in model.parameters())


def test_only_a_batch_norm_right_after_a_convolution_is_folded():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    assert [type(module) for module in fold_batchnorm(model)] == [type(module) for module in model]


# --- atrous convolutions ---


map_sides = st.integers(1, 20)
atrous_cases = given(
    st.tuples(map_sides, map_sides), st.integers(1, 24), st.integers(1, 3), st.booleans(), st.booleans()
)


def atrous_tensors(size, batch, *, channels_last, has_bias, dtype=torch.float64):
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


@pytest.mark.parametrize("form", [cut_conv2d, sum_of_products, by_function(True), by_function(False)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@settings(max_examples=40, deadline=None)
@atrous_cases
def test_every_form_is_the_convolution(form, dtype, tolerance, size, rate, batch, channels_last, has_bias):
    x, weight, bias = atrous_tensors(size, batch, channels_last=channels_last, has_bias=has_bias)
    expected = reference(x, weight, bias, rate)
    result = form(*(None if t is None else t.to(dtype) for t in (x, weight, bias)), rate)
    assert result.shape == expected.shape and result.dtype == dtype
    assert (result - expected).norm() <= tolerance * expected.norm()


@settings(max_examples=40, deadline=None)
@atrous_cases
def test_products_in_bfloat16_are_off_by_its_rounding_as_the_convolution_is(
    size, rate, batch, channels_last, has_bias
):
    x, weight, bias = atrous_tensors(
        size, batch, channels_last=channels_last, has_bias=has_bias, dtype=torch.bfloat16
    )
    exact = reference(x.double(), weight.double(), None if bias is None else bias.double(), rate)
    for form in (reference, cut_conv2d, sum_of_products):
        result = form(x, weight, bias, rate)
        assert result.dtype == torch.bfloat16
        # Each product is rounded by up to 2^-9 of itself, and the sum once more.
        assert (result.double() - exact).norm() <= 2**-8 * exact.norm().clamp_min(1)


@pytest.mark.parametrize("by_products", [True, False])
@settings(max_examples=40, deadline=None)
@atrous_cases
def test_gradients_are_those_of_the_convolution(by_products, size, rate, batch, channels_last, has_bias):
    inputs = [t for t in atrous_tensors(size, batch, channels_last=channels_last, has_bias=has_bias) if t is not None]
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
    inputs = atrous_tensors(size, 2, channels_last=True, has_bias=True)
    inputs = [t[:, :2].clone() if t.dim() == 4 else t for t in inputs]
    assert torch.autograd.gradcheck(by_function(by_products), (*(t.requires_grad_() for t in inputs), rate))


def test_gradients_in_bfloat16_are_off_by_its_rounding():
    x, weight, _ = atrous_tensors((9, 12), 2, channels_last=True, has_bias=False, dtype=torch.bfloat16)
    gradients = []
    for form, dtype in ((reference, torch.float64), (by_function(False), torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        form(*leaves, None, 6).sum().backward()
        gradients.append([leaf.grad.double() for leaf in leaves])
    for expected, gradient in zip(*gradients, strict=True):
        assert (gradient - expected).norm() <= 2**-7 * expected.norm()


@given(map_sides, st.integers(1, 24))
def test_each_weight_meets_each_pixel_once_and_no_padding(side, rate):
    met = {
        (o, tap): i
        for tap, out, into in reach(side, rate)
        for o, i in zip(range(side)[out], range(side)[into], strict=True)
    }
    assert met == {
        (o, tap): o + (tap - 1) * rate for o in range(side) for tap in range(3) if 0 <= o + (tap - 1) * rate < side
    }


# --- the atrous layer ---


def atrous_conv(in_channels, out_channels, rate, *, bias=True):
    return FastAtrousConv2d(in_channels, out_channels, 3, padding=rate, dilation=rate, bias=bias)


@pytest.fixture
def chosen(monkeypatch):
    """What computed a convolution: "library", or the flag of AtrousProducts. Without AMX unless a test says so."""
    seen, library, products = [], fast.cut_conv2d, AtrousProducts.apply

    def record_products(*arguments):
        seen.append(arguments[-1])
        return products(*arguments)

    def record_library(*arguments):
        seen.append("library")
        return library(*arguments)

    monkeypatch.setattr(AtrousProducts, "apply", record_products)
    monkeypatch.setattr(fast, "cut_conv2d", record_library)
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
    conv, x = atrous_conv(2, 3, rate, bias=False), torch.randn(2, 2, *size)
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
    conv, x = atrous_conv(2, 3, 2), torch.randn(1, 2, 9, 9)
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
    conv = atrous_conv(4, 3, rate)
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
    conv, x = atrous_conv(2, 3, 4), torch.randn(1, 2, 5, 6)
    assert isinstance(conv, torch.nn.Conv2d) and list(conv.state_dict()) == ["weight", "bias"]
    assert list(atrous_conv(2, 3, 4, bias=False).state_dict()) == ["weight"]
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x), conv(x))


# --- the convolution of the decoder ---


small_sides = st.integers(1, 12)
decoder_cases = given(
    st.tuples(small_sides, small_sides),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 3),
    st.booleans(),
)


def decoder_tensors(size, low_level_size, batch, *, has_bias, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(batch, 3, *low_level_size), (batch, 5, *size), (4, 8, 3, 3), (4,)]
    low_level, x, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return low_level, x, weight, bias if has_bias else None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@settings(max_examples=40, deadline=None)
@decoder_cases
def test_before_upsampling_is_after_upsampling(dtype, tolerance, order, size, low_level_size, batch, has_bias):
    low_level, x, weight, bias = decoder_tensors(size, low_level_size, batch, has_bias=has_bias)
    expected = conv_after_upsampling(low_level, x, weight, bias)
    low_level, x, weight = (t.to(dtype).contiguous(memory_format=order) for t in (low_level, x, weight))
    result = conv_before_upsampling(low_level, x, weight, bias.to(dtype) if has_bias else None)
    assert result.shape == expected.shape and result.dtype == dtype
    assert (result - expected).norm() <= tolerance * expected.norm()


@settings(max_examples=40, deadline=None)
@decoder_cases
def test_in_bfloat16_it_is_off_by_its_rounding(size, low_level_size, batch, has_bias):
    inputs = decoder_tensors(size, low_level_size, batch, has_bias=has_bias, dtype=torch.bfloat16)
    exact = conv_after_upsampling(*(None if t is None else t.double() for t in inputs))
    # Each of a few roundings is by up to 2^-9 of a value, and weights of the interpolation are off by as much.
    for form in (conv_after_upsampling, conv_before_upsampling):
        result = form(*inputs)
        assert result.dtype == torch.bfloat16
        assert (result.double() - exact).norm() <= 2**-7 * exact.norm().clamp_min(1)


@settings(max_examples=40, deadline=None)
@decoder_cases
def test_gradients_are_those_of_the_convolution_after_upsampling(size, low_level_size, batch, has_bias):
    inputs = [t for t in decoder_tensors(size, low_level_size, batch, has_bias=has_bias) if t is not None]
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


@pytest.mark.parametrize(("size", "before"), [((129, 129), True), ((9, 9), False)])
def test_the_head_convolves_before_upsampling_where_it_pays(monkeypatch, size, before):
    used = []
    for name in ("conv_before_upsampling", "conv_after_upsampling"):
        form = getattr(fast, name)
        monkeypatch.setattr(fast, name, lambda *args, name=name, form=form: (used.append(name), form(*args))[1])
    head = DeepLabHeadPlus(8, 6, 5, (6,)).eval()
    features = {"out": torch.randn(1, 8, *(-(-side // 4) for side in size)), "low_level": torch.randn(1, 6, *size)}
    with torch.inference_mode():
        expected = head(features)
        head.__class__ = FastDeepLabHeadPlus
        torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)
    assert used == ["conv_before_upsampling" if before else "conv_after_upsampling"]
