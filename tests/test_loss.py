import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils import loss as loss_module
from utils.errors import InputError
from utils.loss import (
    LOSSES,
    build_loss,
    cross_entropy,
    dice_cross_entropy,
    focal_loss,
    lovasz_softmax,
    ohem_cross_entropy,
    summed_cross_entropy,
)

WEIGHTS = torch.tensor([0.5, 1.0, 3.0, 2.0])
WEIGHED = [name for name in LOSSES if name != "lovasz_softmax"]
# Settings under which each loss differs from the others at the predictions of `batch`.
SETTINGS = {"gamma": 1.5, "threshold": 0.4, "keep": 0.3}


def batch(void=0.3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 6, generator=generator, dtype=dtype) * 3
    target = torch.randint(0, 4, (2, 5, 6), generator=generator)
    target[torch.rand(2, 5, 6, generator=generator) < void] = 255
    return logits.requires_grad_(), target


def plain_pixels(logits, target):
    """Probabilities [P, C] and class ids [P] of the valid pixels alone, one by one."""
    logits, target = logits.detach().double().numpy(), target.numpy()
    probabilities = []
    for b, y, x in np.argwhere(target != 255):
        p = np.exp(logits[b, :, y, x] - logits[b, :, y, x].max())
        probabilities.append(p / p.sum())
    return np.array(probabilities), target[target != 255]


def plain_focal(logits, target, gamma, weights=None):
    losses = []
    for p, label in zip(*plain_pixels(logits, target), strict=True):
        weight = 1 if weights is None else weights[label].item()
        losses.append(weight * (1 - p[label]) ** gamma * -math.log(p[label]))
    return np.mean(losses)


def plain_ohem(logits, target, weights, *, threshold, keep):
    pixels = sorted((p[label], label) for p, label in zip(*plain_pixels(logits, target), strict=True))
    least = math.ceil(keep * len(pixels))
    kept = [(p, label) for rank, (p, label) in enumerate(pixels) if p <= threshold or rank < least]
    return np.mean([-math.log(p) * (1 if weights is None else weights[label].item()) for p, label in kept])


def plain_dice(logits, target):
    probabilities, labels = plain_pixels(logits, target)
    losses = []
    for c in np.unique(labels):
        p, g = probabilities[:, c], (labels == c).astype(float)
        losses.append(1 - 2 * (p * g).sum() / ((p**2).sum() + (g**2).sum()))
    return np.mean(losses)


def plain_lovasz(logits, target):
    """Follows the definition: counts the Jaccard loss of each set of the worst pixels from scratch."""
    probabilities, labels = plain_pixels(logits, target)
    losses = []
    for c in np.unique(labels):
        is_class = labels == c
        errors = np.abs(is_class - probabilities[:, c])
        wrong, before, loss = np.zeros(len(labels), bool), 0.0, 0.0
        for pixel in np.argsort(-errors):
            wrong[pixel] = True
            predicted = is_class ^ wrong
            after = 1 - (is_class & predicted).sum() / (is_class | predicted).sum()
            loss, before = loss + errors[pixel] * (after - before), after
        losses.append(loss)
    return np.mean(losses)


PLAIN = {
    "cross_entropy": lambda x, t, w: plain_focal(x, t, 0, w),
    "focal_loss": lambda x, t, w: plain_focal(x, t, 1.5, w),
    "ohem_cross_entropy": lambda x, t, w: plain_ohem(x, t, w, threshold=0.4, keep=0.3),
    "dice_cross_entropy": lambda x, t, w: plain_focal(x, t, 0, w) + plain_dice(x, t),
    "lovasz_softmax": lambda x, t, w: plain_lovasz(x, t),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_is_its_formula_over_the_valid_pixels(loss_type, seed):
    logits, target = batch(seed=seed)
    loss = build_loss(loss_type, **SETTINGS)(logits, target)
    assert loss.item() == pytest.approx(PLAIN[loss_type](logits, target, None), rel=1e-9)


@pytest.mark.parametrize("loss_type", WEIGHED)
def test_weighted_loss_is_its_formula_divided_by_the_valid_pixels(loss_type):
    logits, target = batch()
    loss = build_loss(loss_type, **SETTINGS, weights=WEIGHTS)(logits, target)
    assert loss.item() == pytest.approx(PLAIN[loss_type](logits, target, WEIGHTS), rel=1e-9)


@pytest.mark.parametrize("loss_type", WEIGHED)
def test_weights_of_one_change_nothing(loss_type):
    logits, target = batch()
    weighted = build_loss(loss_type, weights=torch.ones(4))(logits, target)
    assert weighted.item() == build_loss(loss_type)(logits, target).item()


def test_a_weight_counts_in_a_batch_of_one_class_too():
    logits, target = batch(void=0)
    target = torch.full_like(target, 2)
    weighted = cross_entropy(logits, target, weights=WEIGHTS)
    torch.testing.assert_close(weighted, 3 * cross_entropy(logits, target))


@pytest.mark.parametrize("loss_type", WEIGHED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_may_be_of_any_float_dtype(loss_type, dtype):
    logits, target = batch(dtype=torch.bfloat16)
    loss = build_loss(loss_type, weights=WEIGHTS.to(dtype))(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, build_loss(loss_type, weights=WEIGHTS)(logits.float(), target))


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


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (focal_loss, {"gamma": 0}),
        (ohem_cross_entropy, {"keep": 1}),
        (ohem_cross_entropy, {"threshold": 1, "keep": 0}),
    ],
)
def test_limits_of_the_other_losses_are_cross_entropy(loss, options, weights):
    logits, target = batch()
    expected = cross_entropy(logits, target, weights=weights)
    torch.testing.assert_close(loss(logits, target, **options, weights=weights), expected, rtol=1e-12, atol=0)


def test_gamma_defaults_to_2_and_its_flag_is_read():
    logits, target = batch()
    assert focal_loss(logits, target).item() == pytest.approx(plain_focal(logits, target, 2), rel=1e-9)
    flag = build_loss("focal_loss", gamma=3.0)(logits, target).item()
    assert flag == pytest.approx(plain_focal(logits, target, 3), rel=1e-9)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_void_pixels_do_not_change_the_loss(loss_type):
    logits, target = batch(void=0)
    more = torch.cat([target, torch.full_like(target, 255)])
    loss = build_loss(loss_type)
    torch.testing.assert_close(loss(torch.cat([logits, 5 * logits]), more), loss(logits, target))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_void_pixels_get_no_gradient(loss_type):
    logits, target = batch()
    build_loss(loss_type)(logits, target).backward()
    assert (logits.grad.transpose(0, 1)[:, target == 255] == 0).all() and (logits.grad != 0).any()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_void_batch_gives_zero_and_zero_gradients(loss_type, dtype):
    logits = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    loss = build_loss(loss_type)(logits, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("void", [0, 1, 29])
def test_batches_of_one_class_are_finite(loss_type, void):
    logits, _ = batch()
    target = torch.full((2, 5, 6), 3)
    target.view(2, 30)[:, :void] = 255
    loss = build_loss(loss_type)(logits, target)
    loss.backward()
    assert loss.isfinite() and loss > 0 and logits.grad.isfinite().all() and (logits.grad != 0).any()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [2, 200])
def test_gradients_are_finite_where_the_prediction_is_certain(loss_type, gamma, size):
    # Right, void, wrong, and undecided; the third class is neither present nor considered possible.
    logits = torch.tensor([[1.0, 1, 1, 0], [-1, -1, -1, 0], [-1, -1, -1, -2]]).view(1, 3, 1, 4) * size
    logits.requires_grad_()
    loss = build_loss(loss_type, gamma=gamma)(logits, torch.tensor([[[0, 255, 1, 1]]]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_gradients_are_those_of_the_function(loss_type, weights):
    logits, target = batch()
    if loss_type not in WEIGHED:
        weights = None
    for gamma in (0.5, 2.0):
        loss = build_loss(loss_type, gamma=gamma, weights=weights)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, target), logits)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_bfloat16_logits_are_computed_in_float32(loss_type):
    logits, target = batch(dtype=torch.bfloat16)
    loss = build_loss(loss_type)(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, build_loss(loss_type)(logits.float(), target))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_float32_is_as_good_as_float64(loss_type):
    logits, target = batch()
    loss = build_loss(loss_type)(logits.float(), target)
    torch.testing.assert_close(loss.double(), build_loss(loss_type)(logits, target), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_target_may_be_of_any_integer_dtype(loss_type, dtype):
    logits, target = batch()
    weights = WEIGHTS if loss_type in WEIGHED else None
    loss = build_loss(loss_type, weights=weights)
    assert loss(logits, target.to(dtype)).item() == loss(logits, target).item()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_host_never_waits_for_a_value(loss_type):
    logits = torch.empty(2, 4, 5, 6, device="meta", requires_grad=True)  # no values, so reading one fails
    weights = torch.empty(4, device="meta") if loss_type in WEIGHED else None
    target = torch.empty(2, 5, 6, device="meta", dtype=torch.uint8)
    build_loss(loss_type, weights=weights)(logits, target).backward()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_step_against_the_gradient_lowers_the_loss(loss_type):
    logits, target = batch()
    loss = build_loss(loss_type)
    before = loss(logits, target)
    before.backward()
    assert loss(logits - 0.1 * logits.grad, target) < before


def test_mining_leaves_easy_pixels_alone():
    logits = torch.tensor([4.0, 2, 0, -1]).view(1, 1, 1, 4).repeat(1, 2, 1, 1)
    logits[:, 1] = 0
    logits.requires_grad_()
    target = torch.zeros(1, 1, 4, dtype=torch.long)  # p of the target: 0.98, 0.88, 0.5, 0.27
    loss = ohem_cross_entropy(logits, target, threshold=0.7, keep=0)
    loss.backward()
    assert (logits.grad != 0).any(1).tolist() == [[[False, False, True, True]]]
    assert loss.item() == pytest.approx((math.log(2) + math.log(1 + math.e)) / 2)


@pytest.mark.parametrize(("keep", "kept"), [(0, 1), (0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1, 4)])
def test_mining_keeps_at_least_its_share_of_the_valid_pixels(keep, kept):
    logits = torch.tensor([9.0, 9, 9, 9, 8, 7, 6, 5]).view(1, 1, 2, 4).repeat(1, 2, 1, 1)
    logits[:, 1] = 0
    logits.requires_grad_()
    target = torch.tensor([[[255] * 4, [0] * 4]])
    ohem_cross_entropy(logits, target, threshold=0.7, keep=keep).backward()
    assert (logits.grad != 0).any(1).flatten().tolist() == [False] * (8 - kept) + [True] * kept


def test_mining_decides_on_the_probability_not_on_the_weight():
    logits = torch.tensor([[3.0, 0], [0, 0.1]]).view(1, 2, 1, 2).requires_grad_()  # p: 0.95 of 0, 0.52 of 1
    weights = torch.tensor([100.0, 1.0])
    ohem_cross_entropy(logits, torch.tensor([[[0, 1]]]), keep=0.5, weights=weights).backward()
    assert (logits.grad != 0).any(1).tolist() == [[[False, True]]]


def hard(labels, num_classes):
    """Returns the logits of a prediction that is certain."""
    return (F.one_hot(labels, num_classes).movedim(-1, 1) * 400.0 - 200).requires_grad_()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lovasz_softmax_of_a_hard_prediction_is_1_minus_mean_iou_of_the_classes_present(seed):
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, 5, (2, 4, 5), generator=generator)
    target = torch.randint(0, 4, (2, 4, 5), generator=generator)  # class 4 is predicted but absent
    target[0, 0] = 255
    valid = target != 255
    ious = [
        (((prediction == c) & (target == c)).sum() / (((prediction == c) & valid) | (target == c)).sum()).item()
        for c in target[valid].unique()
    ]
    assert lovasz_softmax(hard(prediction, 5), target).item() == pytest.approx(1 - np.mean(ious), abs=1e-6)


def test_lovasz_softmax_keeps_its_precision_among_many_pixels():
    # One pixel among 2^18 adds less to the Jaccard index than float32 resolves near 1.
    logits = torch.randn(1, 2, 512, 512, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.zeros(1, 512, 512, dtype=torch.uint8)
    target[:, :4] = 1
    gradients = []
    for dtype in (torch.float32, torch.float64):
        (gradient,) = torch.autograd.grad(lovasz_softmax(logits.to(dtype), target), logits)
        gradients.append(gradient)
    error = (gradients[0] - gradients[1]).abs() / gradients[1].abs()
    assert error.quantile(0.99) < 1e-3


@pytest.mark.parametrize("loss", [dice_cross_entropy, lovasz_softmax, cross_entropy, ohem_cross_entropy])
def test_a_perfect_prediction_costs_nothing(loss):
    _, target = batch()
    logits = hard(target.where(target != 255, 0), 4)
    assert loss(logits, target).item() == pytest.approx(0, abs=1e-6)


def test_dice_weighs_a_class_the_same_whatever_its_size():
    target = torch.zeros(1, 10, 10, dtype=torch.long)
    target[:, 0, 0] = 1
    missed = dice_cross_entropy(hard(torch.zeros_like(target), 2), target)
    dice = missed - cross_entropy(hard(torch.zeros_like(target), 2), target)
    assert dice.item() == pytest.approx((1 + 1 - 2 * 99 / 199) / 2, rel=1e-5)


def test_unknown_names_and_values_out_of_range_are_refused():
    with pytest.raises(InputError, match="--loss_type dice: .* choose one of cross_entropy"):
        build_loss("dice")
    for gamma in (-1, math.nan):
        with pytest.raises(InputError, match=f"--focal_gamma {gamma}: "):
            build_loss("focal_loss", gamma=gamma)
    for threshold in (0, -0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=f"--ohem_threshold {threshold}: must be above 0 and at most 1"):
            build_loss("ohem_cross_entropy", threshold=threshold)
    for keep in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=f"--ohem_keep {keep}: must be 0 to 1"):
            build_loss("ohem_cross_entropy", keep=keep)


def test_class_weights_of_lovasz_softmax_are_refused():
    with pytest.raises(ValueError, match="it takes no class weights"):
        build_loss("lovasz_softmax", weights=torch.ones(4))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_pieces_of_a_batch_give_what_the_whole_gives(loss_type, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 4, 6, 7, generator=generator).requires_grad_()
    target = torch.randint(0, 5, (5, 6, 7), generator=generator)
    target[target == 4] = 255
    results = []
    for size in (2**25, 2 * logits[0].nbytes, 1):
        monkeypatch.setattr(loss_module, "PIECE", size)
        value = build_loss(loss_type, **SETTINGS)(logits, target)
        results.append([value, *torch.autograd.grad(value, logits)])
    for whole, twos, ones in zip(*results, strict=True):
        assert torch.equal(whole, twos) and torch.equal(whole, ones)


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 6, 5), (2, 5)])
def test_logits_and_target_that_do_not_match_are_named_with_their_shapes(shape):
    with pytest.raises(ValueError, match=r"logits \(2, 4, 5, 6\) and target \("):
        cross_entropy(batch()[0], torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_summed_cross_entropy_is_the_sum_over_the_valid_pixels(memory_format, dtype):
    logits, target = batch(dtype=torch.float32)
    logits = logits.detach().contiguous(memory_format=memory_format)
    expected = F.cross_entropy(logits, target, ignore_index=255, reduction="sum")
    torch.testing.assert_close(summed_cross_entropy(logits, target.to(dtype)), expected)
    assert summed_cross_entropy(logits, torch.full_like(target, 255)) == 0
