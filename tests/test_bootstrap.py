import math

import numpy as np
import pytest
import torch

from tests.test_card import random_ids
from utils.bootstrap import bootstrap_interval, cautions, format_differences, mean_iou, paired_differences
from utils.card import image_counts
from utils.metrics import scores

NAMES = ["sky", "road", "car"]


# --- one model ---


def matrices_and_counts(number=12, num_classes=5):
    """Confusion matrices per image, with a class that is rare (2), only predicted (3), nowhere (4); their counts."""
    rng = np.random.default_rng(1)
    matrices = rng.integers(0, 50, (number, num_classes, num_classes)) * (rng.random((number, 1, 1)) < 0.9)
    matrices[1:, 2], matrices[1:, :, 2] = 0, 0  # in the first image alone: absent from some resamples
    matrices[:, 3:], matrices[:, :, 4], matrices[2:, :, 3] = 0, 0, 0
    matrices[:, 0, 0] += 1
    diagonal = np.diagonal(matrices, axis1=1, axis2=2)
    return matrices, np.stack([diagonal, matrices.sum(axis=2), matrices.sum(axis=1)], axis=1).astype(float)


def test_interval_is_that_of_a_plain_loop_over_resamples():
    matrices, counts = matrices_and_counts()
    rng, means = np.random.default_rng(7), []
    for _ in range(250):
        draw = rng.integers(len(matrices), size=len(matrices))
        means.append(scores(torch.from_numpy(matrices[draw].sum(axis=0)))["Mean IoU"])
    expected = np.percentile(means, 2.5), np.percentile(means, 97.5)
    assert bootstrap_interval(counts, resamples=250, seed=7) == pytest.approx(expected, rel=1e-12)
    assert expected[0] < scores(torch.from_numpy(matrices.sum(axis=0)))["Mean IoU"] < expected[1]


def test_mean_of_counts_follows_the_rule_for_absent_classes():
    matrices, counts = matrices_and_counts()
    expected = [scores(torch.from_numpy(matrix))["Mean IoU"] for matrix in matrices]
    assert mean_iou(counts) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(mean_iou(np.zeros((3, 5))))


def test_interval_of_one_image_is_its_score():
    _, counts = matrices_and_counts()
    assert bootstrap_interval(counts[:1]) == pytest.approx([mean_iou(counts[0])] * 2)


def test_interval_of_no_labelled_image_is_refused():
    with pytest.raises(ValueError, match="no image has a labelled pixel"):
        bootstrap_interval(np.zeros((0, 3, 5)))


def test_interval_narrows_with_the_number_of_images():
    widths = []
    for number in (10, 1000):
        masks, predictions = random_ids(number, size=(4, 4))
        low, high = bootstrap_interval(image_counts(masks, predictions, 4).double().numpy())
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


# --- two models ---


def counts_of(right, target, predicted, images=1):
    """Counts of so many equal images."""
    return np.tile(np.array([right, target, predicted], np.int32), (images, 1, 1))


def random_counts(images=60, seed=0, num_classes=3):
    masks, predictions = random_ids(images, num_classes, seed=seed)
    return image_counts(masks, predictions, num_classes).numpy().astype(np.int32)


def test_a_model_against_itself_differs_by_exactly_0():
    counts = random_counts()
    for found in paired_differences(counts, counts.copy(), NAMES):
        assert (found.value, found.low, found.high, found.better, found.without) == (0, 0, 0, 0, 0)


def test_a_difference_that_is_the_same_on_every_image_has_an_interval_of_no_width():
    # IoU 60 / 100 against 50 / 100 for sky, equal for road; car is in no mask.
    a = counts_of([60, 80, 0], [80, 100, 0], [80, 80, 20], images=70)
    b = counts_of([50, 80, 0], [70, 100, 0], [80, 80, 0], images=70)
    b[:, 1] = a[:, 1]
    b[:, 2, 0] = 70
    mean, sky, road, car = paired_differences(a, b, NAMES)
    assert (sky.value, sky.low, sky.high) == pytest.approx((0.1, 0.1, 0.1)) and sky.better == 1
    assert (road.value, road.low, road.high, road.better) == (0, 0, 0, 0)
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.05, 0.05, 0.05)) and mean.images == 70
    assert math.isnan(car.value) and math.isnan(car.low) and math.isnan(car.better) and car.images == 0


def test_the_other_way_round_the_difference_changes_its_sign():
    a, b = random_counts(seed=0), random_counts(seed=0)
    b[:, 0] = b[:, 0] * 9 // 10
    for there, back in zip(paired_differences(a, b, NAMES), paired_differences(b, a, NAMES), strict=True):
        assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
        assert there.value > 0 and (there.better, back.better) == (1, 0)


def test_differences_are_those_of_a_plain_loop_over_resamples():
    a, b = random_counts(images=12, seed=1), random_counts(images=12, seed=1)
    b[:, 0] = b[:, 0] * np.random.default_rng(2).random((12, 1)) * 0.9
    for each in (a, b):  # car is in one image, predicted there and elsewhere
        each[1:, :2, 2] = 0
    rng, differences = np.random.default_rng(5), []
    for _ in range(300):
        draw = rng.integers(12, size=12)
        (right, target, predicted), (other, _, others) = (each[draw].sum(axis=0).astype(float) for each in (a, b))
        ious = right / (target + predicted - right) - other / (target + others - other)
        ious[target == 0] = np.nan
        differences.append([np.nanmean(ious), *ious])
    found = paired_differences(a, b, NAMES, resamples=300, seed=5)
    for each, values in zip(found, np.transpose(differences), strict=True):
        values = values[~np.isnan(values)]
        assert (each.low, each.high) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))), rel=1e-9)
        assert each.without == 300 - len(values) and each.better == (values > 0).mean()
    assert 0 < found[3].without < 300 and found[3].images == 1 and [each.without for each in found[:3]] == [0] * 3


def test_images_without_a_labelled_pixel_change_nothing():
    a, b = random_counts(seed=3), random_counts(seed=3)
    b[:, 0] = b[:, 0] // 2
    empty = np.zeros((5, 3, 3), np.int32)
    with_empty = [np.concatenate([empty, each, empty]) for each in (a, b)]
    assert paired_differences(*with_empty, NAMES) == paired_differences(a, b, NAMES)
    with pytest.raises(ValueError, match="no image has a labelled pixel"):
        paired_differences(empty, empty, NAMES)


def test_few_images_and_rare_classes_are_warned_of():
    counts = random_counts(images=50)
    assert cautions(paired_differences(counts, counts, NAMES)) == []
    few = counts[:49]
    assert cautions(paired_differences(few, few, NAMES)) == [
        "49 images are few: below 50 a 95% interval tends to be too narrow"
    ]
    counts[9:, :, 2] = 0
    counts[:, :, 0] = 0
    (line,) = cautions(paired_differences(counts, counts, NAMES))
    assert line.startswith("classes in fewer than 10 images") and line.endswith(": car (9)")


def test_a_comparison_is_printed_in_points():
    a = counts_of([60, 80, 0], [80, 100, 0], [80, 80, 20], images=70)
    b = a.copy()
    b[:, 0, 0] -= 10
    b[1:, :, 1], a[1:, :, 1] = 0, 0
    assert format_differences(paired_differences(a, b, NAMES), "runs/B/test_val") == [
        "mIoU +7.27 points over runs/B/test_val, 95% interval 7.27 to 14.55; better in 100.0% of resamples "
        "(1,000 of 70 images)",
        "  sky    +14.55    14.55 to 14.55  better in 100.0%",
        "  road    +0.00      0.00 to 0.00  better in 0.0% (359 resamples without it dropped)",
        "  car   in no annotation",
    ]


# --- coverage ---

SHARES = np.array([1.0, 0.6, 0.3, 0.15, 0.1])  # of the images that show each class


def simulated_pair(rng, images):
    """Two models on random images: hard ones are hard for both, and the first model gets more pixels right."""
    shown = rng.random((images, 5)) < SHARES
    target = np.where(shown, rng.lognormal(7.5, 0.8, (images, 5)).astype(int) + 1, 0)
    hard, pair = rng.normal(size=(images, 1)), []
    for better in (0.1, 0.0):
        logits = 0.8 + better + hard + 0.5 * rng.normal(size=(images, 5))
        right = rng.binomial(target, 1 / (1 + np.exp(-logits)))
        wrong = rng.multinomial((target - right).sum(axis=1), np.full(5, 0.2))
        pair.append(np.stack([right, target, right + wrong], axis=1))
    return pair


@pytest.mark.parametrize(
    ("images", "expected", "expected_of_the_rarest"),
    [(20, 0.874, 0.695), (50, 0.916, 0.844), (100, 0.934, 0.896), (200, 0.936, 0.924)],
)
def test_how_many_of_500_simulated_intervals_cover_the_true_difference(images, expected, expected_of_the_rarest):
    """The figures of docs/results.md. The true differences are those of 200,000 images; 1.9 points in mIoU."""
    pair = simulated_pair(np.random.default_rng(10**6), 200_000)
    true, covered = paired_differences(*pair, list("abcde"), resamples=1), []
    for seed in range(500):
        found = paired_differences(*simulated_pair(np.random.default_rng(seed), images), list("abcde"))
        hits = [each.low <= right.value <= each.high for each, right in zip(found, true, strict=True)]
        covered.append([hit if each.images else np.nan for each, hit in zip(found, hits, strict=True)])
    shares = np.nanmean(np.array(covered, float), axis=0)
    assert shares[[0, -1]] == pytest.approx([expected, expected_of_the_rarest], abs=0.02), (true[0], shares)
