import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    jaccard_score,
    precision_recall_fscore_support,
)

from utils import metrics
from utils.errors import InputError
from utils.metrics import BoundaryIoU, ConfusionMatrix, boundary, format_class_table, format_scores, scores


def scored(target, prediction, num_classes):
    confusion = ConfusionMatrix(num_classes)
    confusion.update(torch.as_tensor(target), torch.as_tensor(prediction))
    return confusion


def test_scores_of_a_matrix_worked_by_hand():
    # target 0: 3 right, 1 predicted as 1; target 1: 2 right, 2 predicted as 0
    result = scores(torch.tensor([[3, 1], [2, 2]]))
    assert result["Overall Acc"] == pytest.approx(5 / 8)
    assert result["Mean Acc"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert result["Class IoU"] == pytest.approx([3 / 6, 2 / 5])
    assert result["Mean IoU"] == pytest.approx((3 / 6 + 2 / 5) / 2)
    assert result["FreqW Acc"] == pytest.approx(0.5 * 3 / 6 + 0.5 * 2 / 5)


def test_precision_recall_and_f1_of_a_matrix_worked_by_hand():
    # Class 2 is only predicted, class 3 is only annotated, class 4 is neither.
    matrix = torch.tensor([[3, 1, 0, 0, 0], [2, 2, 1, 0, 0], [0, 0, 0, 0, 0], [0, 4, 0, 0, 0], [0, 0, 0, 0, 0]])
    result = scores(matrix)
    assert result["Class Precision"] == pytest.approx([3 / 5, 2 / 7, 0, 0, math.nan], nan_ok=True)
    assert result["Class Recall"] == pytest.approx([3 / 4, 2 / 5, 0, 0, math.nan], nan_ok=True)
    assert result["Class F1"] == pytest.approx([6 / 9, 4 / 12, 0, 0, math.nan], nan_ok=True)
    assert result["Mean Precision"] == pytest.approx((3 / 5 + 2 / 7) / 4)  # over the classes of the mean IoU
    assert result["Mean Recall"] == pytest.approx((3 / 4 + 2 / 5) / 4)
    assert result["Mean F1"] == pytest.approx((6 / 9 + 4 / 12) / 4)


def test_rows_are_targets_and_columns_predictions():
    assert scored([[0, 0, 1]], [[1, 1, 0]], 2).matrix().tolist() == [[0, 2], [1, 0]]


@pytest.mark.parametrize("num_classes", [2, 21, 127, 128, 255])
def test_agrees_with_scikit_learn(num_classes):
    rng = np.random.default_rng(num_classes)
    target = rng.integers(0, num_classes, 20_000).astype(np.uint8)
    prediction = np.where(rng.random(20_000) < 0.6, target, rng.integers(0, num_classes, 20_000)).astype(np.uint8)
    confusion = scored(target, prediction, num_classes)
    expected = confusion_matrix(target, prediction, labels=range(num_classes))
    assert (confusion.matrix().numpy() == expected).all()
    result = confusion.compute()
    assert result["Overall Acc"] == pytest.approx(accuracy_score(target, prediction))
    assert result["Mean Acc"] == pytest.approx(balanced_accuracy_score(target, prediction))
    assert result["Mean IoU"] == pytest.approx(jaccard_score(target, prediction, average="macro"))
    assert result["FreqW Acc"] == pytest.approx(jaccard_score(target, prediction, average="weighted"))
    expected = precision_recall_fscore_support(target, prediction, labels=range(num_classes), zero_division=0)
    for name, values in zip(("Precision", "Recall", "F1"), expected, strict=False):
        assert result[f"Class {name}"] == pytest.approx(values)
        assert result[f"Mean {name}"] == pytest.approx(values.mean())


def test_void_is_counted_nowhere():
    with_void = scored([[0, 1, 255, 255]], [[0, 0, 0, 1]], 2)
    assert with_void.matrix().tolist() == [[1, 0], [1, 0]]


def test_class_in_neither_target_nor_prediction_is_left_out_of_the_mean():
    result = scored([[0, 0, 1, 1]], [[0, 0, 1, 0]], 4).compute()
    assert math.isnan(result["Class IoU"][2]) and math.isnan(result["Class IoU"][3])
    assert result["Mean IoU"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_class_predicted_but_never_in_the_target_counts_0():
    result = scored([[0, 0, 1, 1]], [[0, 0, 1, 2]], 3).compute()
    assert result["Class IoU"] == pytest.approx([1, 1 / 2, 0])
    assert result["Mean IoU"] == pytest.approx(1.5 / 3)
    assert result["Mean Acc"] == pytest.approx((1 + 1 / 2) / 2)  # over the classes of the target


def test_images_count_the_same_one_by_one_or_at_once():
    generator = torch.Generator().manual_seed(0)
    target, prediction = torch.randint(0, 5, (2, 6, 9, 7), generator=generator, dtype=torch.uint8)
    together, apart = scored(target, prediction, 5), ConfusionMatrix(5)
    for t, p in zip(target, prediction, strict=True):
        apart.update(t, p)
    assert torch.equal(together.matrix(), apart.matrix())


def test_no_labelled_pixel_gives_nan_not_a_score():
    result = scored([[255, 255]], [[0, 1]], 2).compute()
    assert all(math.isnan(result[name]) for name in ("Overall Acc", "Mean Acc", "FreqW Acc", "Mean IoU"))


@pytest.mark.parametrize("label", [2, 254])
def test_label_out_of_range_is_refused_with_its_value(label):
    with pytest.raises(InputError, match=f"a label of {label}"):
        scored([[0, label]], [[0, 0]], 2).matrix()


@pytest.mark.parametrize("prediction", [2, 255])
def test_prediction_out_of_range_is_refused_with_its_value(prediction):
    with pytest.raises(InputError, match=f"a prediction of {prediction}"):
        scored([[0, 1]], [[prediction, 0]], 2).compute()


@pytest.mark.parametrize("value", [-1, 256])
def test_integers_outside_uint8_are_refused_not_wrapped(value):
    with pytest.raises(InputError, match="class ids must be in 0..255"):
        scored([[0, value]], [[0, 0]], 2)
    with pytest.raises(InputError, match="class ids must be in 0..255"):
        scored([[0, 0]], [[0, value]], 2)


def test_mismatched_shapes_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        scored([[0, 1]], [[0, 1, 1]], 2)
    with pytest.raises(ValueError, match="must be integers"):
        scored([[0.0, 1.0]], [[0, 1]], 2)


def test_empty_update_counts_nothing():
    empty = torch.zeros(0, 3, dtype=torch.uint8)
    assert scored(empty, empty, 2).matrix().sum() == 0


def test_scores_are_printed_in_the_fields_form():
    result = scores(torch.tensor([[3, 1], [2, 2]]))
    assert format_scores(result) == [
        "Overall Acc: 0.625000",
        "Mean Acc: 0.625000",
        "FreqW Acc: 0.450000",
        "Mean IoU: 0.450000",
    ]
    absent = scores(torch.tensor([[1, 0], [0, 0]]))
    assert format_class_table({"Class IoU": [1, math.nan]}, ["road", "car"]) == [  # of an older checkpoint
        "class     IoU",
        "road   1.0000",
        "car         -",
        "mean   1.0000",
    ]
    assert format_class_table(absent, ["road", "car"], [0.25, math.nan]) == [
        "class     IoU  Precision  Recall      F1  boundary IoU",
        "road   1.0000     1.0000  1.0000  1.0000        0.2500",
        "car         -          -       -       -             -",
        "mean   1.0000     1.0000  1.0000  1.0000        0.2500",
    ]


def eroded(mask, times):
    """Erodes by a 3x3 square repeatedly, as the published code does; nothing is set beyond the image edge."""
    mask = mask.float()[None, None]
    for _ in range(times):
        mask = -F.max_pool2d(-F.pad(mask, [1] * 4), 3, stride=1)
    return mask[0, 0].bool()


def patchy(height, width, num_ids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num_ids, (1, 1, -(-height // 9), -(-width // 9)), generator=generator)
    return F.interpolate(ids.float(), scale_factor=9)[0, 0, :height, :width].to(torch.uint8)


@pytest.mark.parametrize(
    ("size", "reach"), [((1, 1), 1), ((7, 3), 1), ((60, 80), 2), ((120, 160), 4), ((30, 400), 8)]
)
def test_boundary_is_what_erosions_remove_from_each_class(size, reach):
    ids = patchy(*size, 4)
    ids[ids == 3] = 255
    near = boundary(ids)
    for class_id in range(3):
        mask = ids == class_id
        expected = mask & ~eroded(mask, reach)
        assert torch.equal(near & mask, expected) and torch.equal(boundary(mask), expected)
    assert not near[ids == 255].any()


def test_boundary_iou_counts_the_pixels_near_the_outlines_of_both_maps():
    target, prediction = patchy(60, 80, 3), patchy(60, 80, 4, seed=1)
    prediction = torch.where(torch.rand(60, 80) < 0.7, target, prediction)
    target[:9, :9] = 255
    measure = BoundaryIoU(5)
    measure.update(target, prediction)
    prediction[:9, :9] = 255  # a class ends where void begins
    for class_id, iou in enumerate(measure.compute()["Class Boundary IoU"]):
        a, b = (mask & ~eroded(mask, 2) for mask in (target == class_id, prediction == class_id))
        expected = (a & b).sum() / (a | b).sum()
        assert iou == pytest.approx(expected.item(), nan_ok=True)


def test_boundary_iou_of_a_batch_is_that_of_its_images():
    targets = torch.stack([patchy(40, 52, 3, seed=seed) for seed in range(3)])
    predictions = torch.stack([patchy(40, 52, 3, seed=seed) for seed in (0, 5, 6)])
    targets[:, 20:23] = 255
    together, apart = BoundaryIoU(3), BoundaryIoU(3)
    together.update(targets, predictions)
    for target, prediction in zip(targets, predictions, strict=True):
        apart.update(target, prediction)
    assert together.compute() == apart.compute()
    assert 0 < together.compute()["Mean Boundary IoU"] < 1
    with pytest.raises(ValueError, match="must both be"):
        together.update(targets, predictions[0])


def test_counting_on_a_gpu_waits_for_nothing_and_counts_the_same():
    confusion = ConfusionMatrix(21, "meta")  # no values, so waiting for one fails
    confusion.update(*(torch.zeros(2, 5, 7, dtype=torch.uint8, device="meta") for _ in range(2)))
    index = torch.randint(0, 5376, (10_000,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    assert (metrics.scattered_occurrences(index, 5376) == torch.bincount(index, minlength=5376)).all()


@pytest.mark.parametrize("size", [256, 5376, 38_400])
@pytest.mark.parametrize("number", [0, 1, 3, 4, 10_001])
def test_counting_in_turns_counts_the_same(size, number):
    dtype = torch.int16 if size < 2**15 else torch.int32
    index = torch.randint(0, size, (number,), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = index.clone()
    assert torch.equal(metrics.occurrences(index, size), torch.bincount(index, minlength=size))
    assert torch.equal(index, before)
