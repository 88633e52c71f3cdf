import csv
import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import build_dataset
from datasets.loader import SameSizeBatches
from network import build_model
from utils.against import read_counts
from utils.card import Card, format_card, image_counts, write_card
from utils.engine import evaluate
from utils.metrics import BoundaryIoU, ConfusionMatrix, image_iou, scores
from utils.options import get_parser

CPU = torch.device("cpu")


def random_ids(number, num_classes=4, *, seed=0, void=0.1, size=(20, 24)):
    """Masks with void, and predictions that are right for a share of the pixels that differs per picture."""
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, num_classes, (number, *size))
    right = rng.random(masks.shape) < rng.random((number, 1, 1))
    predictions = np.where(right, masks, rng.integers(0, num_classes, masks.shape))
    masks = np.where(rng.random(masks.shape) < void, 255, masks)
    return torch.from_numpy(masks).to(torch.uint8), torch.from_numpy(predictions).to(torch.uint8)


def collected(masks, predictions, num_classes=4, order=None, batch_size=3):
    """The card of pictures shown in that order, in batches."""
    order = list(range(len(masks))) if order is None else order
    card = Card([f"p{index}" for index in range(len(masks))], num_classes, CPU)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        card(batch, torch.zeros(len(batch), 3, *masks.shape[1:], dtype=torch.uint8), masks[batch], predictions[batch])
    return card.compute()


def without_speed(card):
    figures = {name: value for name, value in card.items() if name not in ("images_per_second", "peak_memory_mb")}
    return figures | {"counts": card["counts"].tolist()}


# --- counts ---


@pytest.mark.parametrize("num_classes", [1, 4, 21, 255])
def test_counts_of_an_image_are_those_of_its_own_confusion_matrix(num_classes):
    masks, predictions = random_ids(3, num_classes)
    masks[1] = 255  # nothing labelled
    counts = image_counts(masks, predictions, num_classes)
    assert counts.shape == (3, 3, num_classes) and counts.dtype == torch.int64
    for mask, prediction, count in zip(masks, predictions, counts, strict=True):
        confusion = ConfusionMatrix(num_classes)
        confusion.update(mask, prediction)
        matrix = confusion.matrix()
        assert torch.equal(count, torch.stack([matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)]))


# --- the card ---


def test_card_has_each_images_score_and_the_worst_first():
    masks, predictions = random_ids(14)
    masks[5] = 255
    card = collected(masks, predictions)
    expected = [image_iou(mask, prediction, 4) for mask, prediction in zip(masks, predictions, strict=True)]
    ids, ious, accuracies = zip(*card["per_image"], strict=True)
    assert list(ids) == [f"p{index}" for index in range(14)]
    assert ious == pytest.approx(expected, nan_ok=True) and math.isnan(ious[5]) and math.isnan(accuracies[5])
    right = (masks == predictions).sum(dim=(1, 2)) / (masks != 255).sum(dim=(1, 2))
    assert accuracies == pytest.approx(right.tolist(), nan_ok=True)
    ranking = sorted((iou, f"p{index}") for index, iou in enumerate(expected) if index != 5)
    assert [(id, pytest.approx(iou)) for iou, id in ranking[:10]] == card["worst"]
    labelled = [index for index in range(14) if index != 5]
    assert card["labelled_images"] == 13
    assert card["bootstrap"] == collected(masks[labelled], predictions[labelled])["bootstrap"]


def test_order_and_size_of_the_batches_make_no_difference():
    masks, predictions = random_ids(9)
    expected = without_speed(collected(masks, predictions))
    shuffled = collected(masks, predictions, order=[4, 8, 1, 0, 7, 3, 2, 6, 5], batch_size=2)
    assert without_speed(shuffled) == expected


def test_images_of_equal_score_are_listed_in_the_data_sets_order():
    masks = torch.zeros(50, 6, 6, dtype=torch.uint8)
    card = collected(masks, masks, order=list(range(49, -1, -1)))
    assert [id for id, _ in card["worst"]] == [f"p{index}" for index in range(10)]


def test_boundary_iou_is_that_of_the_whole_set():
    masks, predictions = random_ids(5)
    measure = BoundaryIoU(4)
    for mask, prediction in zip(masks, predictions, strict=True):
        measure.update(mask, prediction)
    card = collected(masks, predictions)
    assert card["mean_boundary_iou"] == measure.compute()["Mean Boundary IoU"]
    assert card["class_boundary_iou"] == measure.compute()["Class Boundary IoU"]


@pytest.mark.parametrize("num_classes", [1, 3])
def test_one_image_makes_a_card(num_classes):
    masks, predictions = random_ids(1, num_classes)
    card = collected(masks, predictions, num_classes)
    iou = image_iou(masks[0], predictions[0], num_classes)
    assert card["bootstrap"] == pytest.approx((iou, iou)) and card["worst"] == [("p0", pytest.approx(iou))]


def test_time_of_the_card_and_of_what_it_calls_is_not_the_evaluations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("utils.card.time.perf_counter", lambda: now[0])

    def pass_time(*batch):
        now[0] += 100.0

    masks, predictions = random_ids(6)
    card = Card([f"p{index}" for index in range(6)], 4, CPU, also=pass_time)
    for batch in ([0, 1, 2], [3, 4, 5]):
        now[0] += 1.5
        card(batch, torch.zeros(3, 3, 20, 24), masks[batch], predictions[batch])
    assert card.compute()["images_per_second"] == pytest.approx(6 / 3)


def test_card_of_an_evaluation_agrees_with_its_matrix(folder):
    dataset, seen = build_dataset("folder", folder, "val"), []
    loader = DataLoader(dataset, batch_sampler=SameSizeBatches(dataset.sizes(), 2))
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_mobilenet_v3_large", num_classes=4)
    card = Card(dataset.ids, 4, CPU, also=lambda *batch: seen.append(batch))
    matrix = evaluate(model, loader, on_batch=card)
    figures = card.compute()
    assert [id for id, *_ in figures["per_image"]] == dataset.ids
    low, high = figures["bootstrap"]
    assert low <= scores(matrix)["Mean IoU"] <= high
    for indices, _, masks, predictions in seen:
        for index, mask, prediction in zip(indices, masks, predictions, strict=True):
            assert figures["per_image"][index][1] == pytest.approx(image_iou(mask, prediction, 4))
    assert figures["images_per_second"] > 0 and figures["peak_memory_mb"] > 0


# --- printed and written ---


def test_card_is_printed_in_the_form_of_the_scores():
    card = {"mean_boundary_iou": 0.601234, "bootstrap": (0.512, 0.54), "labelled_images": 100}
    card |= {"images_per_second": 12.34, "peak_memory_mb": 1234.4, "worst": [("a", 0.1), ("b", 0.2)]}
    assert format_card(card) == [
        "Mean Boundary IoU: 0.601234",
        "Mean IoU 95% interval: 0.512000 to 0.540000 (bootstrap over 100 images)",
        "Speed: 12.3 images/s",
        "Peak memory: 1,234 MB",
        "The 2 images with the lowest mIoU:",
        "  0.100000  a",
        "  0.200000  b",
    ]


def test_written_card_has_all_figures_and_reads_back(tmp_path):
    masks, predictions = random_ids(12)
    masks[3] = 255
    card = collected(masks, predictions, num_classes=5)  # class 4 is nowhere
    confusion = ConfusionMatrix(5)
    confusion.update(masks, predictions)
    result, names = confusion.compute(), ["sky", "road", "tree", "car", "dog"]
    opts = get_parser().parse_args("--ckpt best.pth --model deeplabv3plus_resnet50 --output_stride 16".split())
    write_card(tmp_path, card, result, opts=opts, class_names=names)

    read = json.loads((tmp_path / "card.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    about = {"ckpt": "best.pth", "dataset": "voc", "val_split": "val", "tta": None, "crop_val": False}
    about |= {"eval_output_stride": None, "comparable": True}
    assert {name: read[name] for name in about} == about
    assert read["parameters"] == 39_757_733 and round(read["gflops"], 1) == 124.6
    assert read["mean_iou"] == result["Mean IoU"] and read["freqw_acc"] == result["FreqW Acc"]
    assert read["mean_boundary_iou"] == card["mean_boundary_iou"] and tuple(read["bootstrap"]) == card["bootstrap"]
    assert [(row["image"], row["mean_iou"]) for row in read["worst"]] == card["worst"]
    assert [row["class"] for row in read["classes"]] == names
    assert read["classes"][1]["iou"] == result["Class IoU"][1]
    assert read["classes"][1]["boundary_iou"] == card["class_boundary_iou"][1]
    for column, name in (("precision", "Precision"), ("recall", "Recall"), ("f1", "F1")):
        assert read[f"mean_{column}"] == result[f"Mean {name}"]
        assert read["classes"][1][column] == result[f"Class {name}"][1]
    absent = dict.fromkeys(("iou", "precision", "recall", "f1", "boundary_iou"))
    assert list(read["classes"][4].items()) == list(({"class": "dog"} | absent).items())
    assert read["images_per_second"] == card["images_per_second"] and read["labelled_images"] == 11

    with (tmp_path / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "mean_iou", "pixel_accuracy"]
    assert [row["image"] for row in rows] == [f"p{index}" for index in range(12)]
    for row, (_, *expected) in zip(rows, card["per_image"], strict=True):
        found = [float(row["mean_iou"]), float(row["pixel_accuracy"])]
        assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)
    stored = read_counts(tmp_path)
    expected = sorted((f"p{index}", image_counts(masks, predictions, 5)[index].tolist()) for index in range(12))
    assert list(zip(stored.ids, stored.counts.tolist(), strict=True)) == expected
    assert stored.class_names == names and stored.counts.dtype == np.int32
