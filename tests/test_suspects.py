import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import visualize
from datasets import build_dataset
from tests.conftest import write_picture, write_voc_layout
from utils.errors import InputError
from utils.pictures import plotting
from utils.pictures.suspects import contradictions, rank_suspects
from utils.weights.load import TrainedModel

NAMES = ["sky", "road", "tree", "car"]
IDS = ["a1", "a2", "a3", "a4", "a5"]


class Perfect(nn.Module):
    """Knows the true class of each pixel: the blue channel of a PNG image holds it."""

    device = torch.device("cpu")

    def __init__(self, gap=20.0):
        super().__init__()
        self.gap = gap  # of the true class's logit to the others'

    def forward(self, x):
        truth = x[:, 2] // 60  # [B, H, W]
        return self.gap * nn.functional.one_hot(truth.long(), 4).permute(0, 3, 1, 2).float()  # [B, C, H, W]


def gap_of(probability):
    """The gap at which `Perfect` gives the true class this probability."""
    return float(np.log(3 * probability / (1 - probability)))


@pytest.fixture
def own(tmp_path):
    """Five images whose blue channel is 60 times the class, and their masks, all correct."""
    folder = write_voc_layout(tmp_path / "own", {"train": IDS, "val": ["b1"]}, class_names=NAMES)
    for name in (*IDS, "b1"):
        mask = read(folder, name)
        truth = np.arange(mask.shape[1]) * 4 // mask.shape[1] * np.ones_like(mask)
        write_picture(folder / f"JPEGImages/{name}.png", np.dstack([mask, mask, 60 * truth]).astype(np.uint8))
        (folder / f"JPEGImages/{name}.jpg").unlink()
    return folder


def read(folder, name):
    with Image.open(folder / f"SegmentationClass/{name}.png") as mask:
        return np.array(mask)


def annotate(folder, name, change):
    """Replaces classes in a mask."""
    mask = read(folder, name)
    changed = np.array([change.get(class_id, class_id) for class_id in range(256)], np.uint8)
    write_picture(folder / f"SegmentationClass/{name}.png", changed[mask])


def ranked(folder, model=None, split="train"):
    dataset = build_dataset("folder", folder, split)
    found, unreadable = rank_suspects(model or Perfect(), dataset)
    return [(dataset.ids[suspect.index], suspect) for suspect in found], unreadable


def test_swapped_mask_ranks_first_for_a_perfect_predictor(own):
    annotate(own, "a3", {1: 2, 2: 1})
    (name, first), *others = ranked(own)[0]
    mask = read(own, "a3")
    assert name == "a3"
    assert first.share == pytest.approx(np.isin(mask, (1, 2)).sum() / (mask != 255).sum())
    assert {first.annotated, first.predicted} == {"road", "tree"}
    assert first.loss == pytest.approx(20 * first.share, rel=1e-3)
    assert all((other.share, other.annotated, other.predicted) == (0, "", "") for _, other in others)


def test_classes_are_the_most_frequent_pair(own):
    annotate(own, "a2", {3: 0})
    mask = read(own, "a2")
    mask[:2, :5] = 1
    write_picture(own / "SegmentationClass/a2.png", mask)
    name, first = ranked(own)[0][0]
    assert (name, first.annotated, first.predicted) == ("a2", "sky", "car")


@pytest.mark.parametrize(("probability", "contradicts"), [(0.89, False), (0.91, True)])
def test_only_a_probability_over_nine_tenths_contradicts(own, probability, contradicts):
    annotate(own, "a3", {1: 2})
    _, first = ranked(own, Perfect(gap_of(probability)))[0][0]
    assert (first.share > 0) == contradicts


def test_equal_shares_rank_by_their_loss(own):
    # Unsure, so no share is above 0.
    annotate(own, "a2", {1: 2})
    annotate(own, "a5", {1: 2, 3: 2})
    assert [name for name, _ in ranked(own, Perfect(gap_of(0.6)))[0]][:2] == ["a5", "a2"]


def test_void_contradicts_nothing_and_an_image_of_void_ranks_last(own):
    annotate(own, "a1", dict.fromkeys(range(4), 255))
    name, last = ranked(own, Perfect(gap=5))[0][-1]
    assert (name, last.share, last.loss) == ("a1", 0, 0)
    image, mask = build_dataset("folder", own, "train").pair(0)
    assert not contradictions(Perfect(), image, mask)[1].any()


def test_damaged_samples_are_listed_and_do_not_stop_the_rest(own):
    (own / "JPEGImages/a2.png").write_bytes(b"no picture")
    found, unreadable = ranked(own)
    assert sorted(name for name, _ in found) == ["a1", "a3", "a4", "a5"]
    assert len(unreadable) == 1 and "a2.png" in unreadable[0]
    (own / "JPEGImages/b1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of its samples can be used; the first problem: .*b1\.png"):
        ranked(own, split="val")


# --- The command ---


@pytest.fixture
def run(own, tmp_path, monkeypatch, capsys):
    """Runs the command with `Perfect` as the checkpoint; returns its output and --out."""

    def start(*arguments, names=NAMES, out="s.png"):
        trained = TrainedModel(Perfect(), names, build_dataset("folder", own, "train").palette, {})
        monkeypatch.setattr(visualize, "load_model", lambda *_: trained)
        data = [
            "--dataset",
            "folder",
            "--data_root",
            str(own),
            "--ckpt",
            "any.pth",
            "--device",
            "cpu",
            "--amp",
            "off",
        ]
        visualize.main(["suspects", *data, "--out", str(tmp_path / out), *map(str, arguments)])
        return capsys.readouterr().out, tmp_path / out

    return start


def test_suspects_draws_the_worst_and_lists_all(run, own, monkeypatch):
    annotate(own, "a3", {1: 2})
    figures, save = [], plotting.save
    monkeypatch.setattr(plotting, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    out, path = run("--num", 2)
    table = path.with_suffix(".csv")
    assert path.is_file() and f"Written: {path}, {table}" in out
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["rank", "id", "share", "mean_loss", "annotated_class", "predicted_class"]
    assert [row["rank"] for row in rows] == list("12345") and sorted(row["id"] for row in rows) == IDS
    assert (rows[0]["id"], rows[0]["annotated_class"], rows[0]["predicted_class"]) == ("a3", "tree", "road")
    grid = figures[0].axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (2, 4)
    image, annotation, prediction, red = (axes.get_images()[0].get_array() for axes in figures[0].axes[:4])
    dataset, mask = build_dataset("folder", own, "train"), read(own, "a3")
    truth = np.asarray(image)[..., 2] // 60
    assert (np.asarray(annotation) == dataset.decode_target(mask)).all()
    assert (np.asarray(prediction) == dataset.decode_target(truth)).all()
    assert ((np.asarray(red) == [215, 25, 28]).all(axis=2) == ((mask != truth) & (mask != 255))).all()
    assert figures[0].axes[0].get_ylabel() == "a3"
    assert figures[0].axes[3].get_xlabel() == f"{float(rows[0]['share']):.1%}: tree\npredicted as road"


def test_more_images_than_the_split_has_draw_all_of_it(run):
    _, path = run("--split", "val")
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "keywords", "words"),
    [
        (["--num", "0"], {}, "--num: 0 is out of range; give 1 or more"),
        (["--split", "test"], {}, "no such split list"),
        ([], {"names": ["a", "b", "c", "d"]}, "--ckpt any.pth: was trained on 4 classes (a, b, c, d)"),
        ([], {"out": "s.csv"}, "only PNG is supported"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(run, tmp_path, capsys, arguments, keywords, words):
    with pytest.raises(SystemExit) as stop:
        run(*arguments, **keywords)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert not list(tmp_path.glob("s.*"))


def test_damaged_samples_are_printed(run, own):
    (own / "JPEGImages/a2.png").write_bytes(b"no picture")
    out, path = run()
    assert "1 of 5 could not be read:" in out and "a2.png" in out and path.is_file()
