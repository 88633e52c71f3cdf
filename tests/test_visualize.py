import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
import visualize
from datasets import build_dataset
from tests.conftest import ROOT, TINY, write_picture, write_voc_layout
from utils.engine import predict
from utils.metrics import ConfusionMatrix
from utils.pictures import plotting
from utils.run import Run
from utils.weights.load import load_model

SPLITS = {"train": ["a1", "a2", "a3", "a4"], "val": ["b1", "b2", "b3"]}
NAMES = ["sky", "road", "tree", "car"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data in own/ and the runs runs/a and runs/b."""
    root = tmp_path_factory.mktemp("trained")
    folder = write_voc_layout(root / "own", SPLITS, class_names=NAMES)
    for name, loss in (("a", "cross_entropy"), ("b", "focal_loss")):
        arguments = ["--dataset", "folder", "--data_root", str(folder), "--run_dir", str(root / "runs"), *TINY]
        main.main([*arguments, "--run_name", name, "--total_itrs", "4", "--loss_type", loss])
    return root


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures before they become pixels."""
    figures = []
    save = plotting.save

    def keep(figure, path, dpi=120):
        figures.append(figure)
        save(figure, path, dpi)

    monkeypatch.setattr(plotting, "save", keep)
    return figures


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Runs a command on the small folder; returns its output and the path of --out."""

    def start(command, *arguments, data=True, out="out.png"):
        flags = ["--dataset", "folder", "--data_root", str(folder)] if data else []
        target = ["--out", str(tmp_path / out)] if out else []
        visualize.main([command, *map(str, arguments), *flags, *target])
        return capsys.readouterr().out, tmp_path / out if out else None

    return start


@pytest.fixture
def refused(run, capsys):
    def start(*arguments, **keywords):
        with pytest.raises(SystemExit) as stop:
            run(*arguments, **keywords)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        return lines[0]

    return start


def pictures(figure):
    """Returns the images of a figure in order, as arrays."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.get_images()]


def legend_texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- samples ---


def test_samples_shows_each_image_above_its_annotation_with_id_and_legend(run, folder, drawn):
    out, path = run("samples", "--num", 4)
    dataset = build_dataset("folder", folder, "train")
    figure = drawn[0]
    rows = figure.axes[0].get_subplotspec().get_gridspec().nrows
    assert rows == 2 and len(pictures(figure)) == 8
    columns = len(figure.axes) // 2
    for above, below in zip(figure.axes[:columns], figure.axes[columns:], strict=True):
        index = dataset.ids.index(below.get_xlabel())
        assert (np.asarray(above.get_images()[0].get_array()) == dataset.image(index).permute(1, 2, 0).numpy()).all()
        shown = np.asarray(below.get_images()[0].get_array())
        assert (shown == dataset.decode_target(dataset.mask(index))).all()
    assert legend_texts(figure) == [*NAMES, "void"]
    colours = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()]
    assert np.allclose(np.array(colours) * 255, dataset.palette[[0, 1, 2, 3, 255]])
    assert "a1: sky, road, tree, car" in out and f"Written: {path}" in out
    with Image.open(path) as picture:
        assert picture.width > 600


def test_twenty_samples_are_ten_columns_by_four_rows(tmp_path, drawn, capsys):
    ids = [f"i{number:02}" for number in range(24)]
    folder = write_voc_layout(tmp_path / "many", {"train": ids}, class_names=NAMES, sizes=((12, 16),))
    visualize.main(["samples", "--dataset", "folder", "--data_root", str(folder), "--out", str(tmp_path / "s.png")])
    grid = drawn[0].axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (4, 10)
    assert len(pictures(drawn[0])) == 40


def test_ids_are_shown_in_the_given_order(run, drawn):
    out, _ = run("samples", "--ids", "a3", "a1")
    labels = [axes.get_xlabel() for axes in drawn[0].axes if axes.get_xlabel()]
    assert labels == ["a3", "a1"]
    assert out.index("a3:") < out.index("a1:")


def test_samples_of_a_small_split_show_all_of_it(run, drawn):
    run("samples")
    assert len(pictures(drawn[0])) == 8


def test_same_seed_chooses_the_same_samples(run, drawn):
    first, again, other = (run("samples", "--num", 2, "--random_seed", seed)[0] for seed in (1, 1, 3))
    assert first == again
    assert first.splitlines()[:-1] != other.splitlines()[:-1]


def test_samples_without_images_draw_the_annotations_and_say_so(run, folder, drawn):
    for path in (folder / "JPEGImages").glob("a[12].jpg"):
        path.unlink()
    out, _ = run("samples", "--num", 4)
    assert "2 of 4 images are missing" in out
    assert "2 of 4 images are missing" in drawn[0].get_suptitle()
    assert len(pictures(drawn[0])) == 6
    notes = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
    assert notes == ["image\nmissing"] * 2


def test_real_annotations_without_images_give_twenty_samples_of_every_class(real_data, tmp_path, capsys):
    visualize.main(["samples", "--data_root", str(real_data("voc2012_masks")), "--out", str(tmp_path / "s.png")])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if ": " in line and line[0] == "2"]
    shown = {name for line in lines for name in line.split(": ")[1].split(", ")}
    assert len(lines) == 20 and len(shown) == 21
    assert "1464 of 1464 images are missing" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ids", "zz"], "--ids zz: is not in the split train"),
        (["--num", 9], "--num 9: the split has only 4 images"),
        (["--num", 0], "--num: 0 is out of range; give 1 or more"),
        (["--split", "test"], "no such split list"),
    ],
)
def test_impossible_samples_are_refused_and_nothing_is_written(refused, tmp_path, arguments, words):
    assert words in refused("samples", *arguments)
    assert not (tmp_path / "out.png").exists()


# --- stats ---


def test_stats_prints_writes_and_draws_the_same_numbers(run, folder, drawn):
    out, path = run("stats")
    dataset = build_dataset("folder", folder, "train")
    masks = torch.cat([dataset.mask(index).flatten() for index in range(4)])
    with path.with_suffix(".csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    for class_id, name in enumerate(NAMES):
        assert int(rows[name]["pixels"]) == int((masks == class_id).sum())
        assert f"{int(rows[name]['pixels']):,}" in out
    shares, images = drawn[0].axes
    assert (shares.get_xscale(), images.get_xscale(), images.get_xlim()[0]) == ("log", "linear", 0)
    assert {label.get_text() for label in shares.get_yticklabels()} == set(NAMES)
    lengths = sorted(bar.get_width() for bar in shares.patches)
    assert lengths == pytest.approx(sorted(float(row["pixel_share"]) for row in rows.values()), rel=1e-4)
    assert "void" in drawn[0].get_suptitle() and "imbalance" in drawn[0].get_suptitle()


# --- check ---


def test_check_of_a_valid_data_set_finds_nothing(run):
    out, _ = run("check", out=None)
    assert "no problem found" in out and "FATAL" not in out


def test_check_exits_with_2_if_training_would_fail_and_lists_every_problem(run, folder, capsys):
    write_picture(folder / "SegmentationClass/a1.png", np.full((40, 52), 77, np.uint8))
    (folder / "JPEGImages/b1.jpg").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        run("check", out=None)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "a1.png" in printed.out and "b1.jpg" in printed.out
    assert len(printed.err.splitlines()) == 1 and "training would fail (fatal findings: 2)" in printed.err


# --- compare ---


def test_compare_shows_rgb_truth_and_a_column_per_model_with_its_miou(run, trained, folder, drawn):
    ckpts = [trained / "runs/a/best.pth", trained / "runs/b/best.pth"]
    out, _ = run("compare", "--ckpt", *ckpts, "--num", 3, "--device", "cpu", "--amp", "off")
    figure = drawn[0]
    grid = figure.axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (3, 4)
    assert [axes.get_title() for axes in figure.axes[:4]] == ["RGB", "ground truth", "a", "b"]
    dataset = build_dataset("folder", folder, "train")
    index = dataset.ids.index(figure.axes[0].get_ylabel())
    shown = pictures(figure)
    assert (shown[0] == dataset.image(index).permute(1, 2, 0).numpy()).all()
    assert (shown[1] == dataset.decode_target(dataset.mask(index))).all()
    model = load_model(ckpts[0], torch.device("cpu")).model
    prediction = predict(model, dataset.image(index)[None])[0]
    assert (shown[2] == dataset.decode_target(prediction)).all()
    confusion = ConfusionMatrix(4)
    confusion.update(dataset.mask(index), prediction)
    label = f"mIoU {confusion.compute()['Mean IoU']:.4f}"
    assert figure.axes[2].get_xlabel() == label and label in out
    assert set(legend_texts(figure)) <= {*NAMES, "void"}


def test_compare_shows_the_first_of_the_samples(run, trained, drawn):
    picked = [line.split(":")[0] for line in run("samples", "--num", 4)[0].splitlines()[:4]]
    out, _ = run("compare", "--ckpt", trained / "runs/a/best.pth", "--num", 2, "--device", "cpu")
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == picked[:2]


def test_compare_marks_wrong_pixels_in_red_but_never_void(run, trained, folder, drawn):
    run(
        "compare", "--ckpt", trained / "runs/a/best.pth", "--ids", "a2", "--errors", "--device", "cpu", "--amp", "off"
    )
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == ["RGB", "ground truth", "a", "a: errors"]
    _, truth, predicted, errors = pictures(drawn[0])
    dataset = build_dataset("folder", folder, "train")
    void = (dataset.mask(1) == 255).numpy()
    red = (errors == [215, 25, 28]).all(axis=2)
    assert (red == ((truth != predicted).any(axis=2) & ~void)).all()
    assert 0 < red.sum() < red.size
    share = float(drawn[0].axes[3].get_xlabel().split("%")[0])
    assert share == pytest.approx(100 * red.sum() / (~void).sum(), abs=0.06)


def test_compare_refuses_different_classes_and_missing_files(refused, trained, folder, tmp_path):
    assert "typo.pth: no such file" in refused("compare", "--ckpt", "typo.pth")
    (folder / "class_names.txt").write_text("a\nb\nc\nd\n")
    line = refused("compare", "--ckpt", trained / "runs/a/best.pth")
    assert "sky, road, tree, car" in line and "a, b, c, d" in line
    assert not (tmp_path / "out.png").exists()


def test_compare_distinguishes_files_of_one_run_and_runs_of_the_same_name(run, trained, drawn, monkeypatch):
    monkeypatch.chdir(trained / "runs/a")
    run("compare", "--ckpt", "best.pth", "latest.pth", "--num", 1, "--device", "cpu")
    run("compare", "--ckpt", "best.pth", trained / "runs/a/best.pth", "--num", 1, "--device", "cpu")
    first, second = ([axes.get_title().replace("\n", "") for axes in figure.axes][2:] for figure in drawn)
    assert first == ["a", "a/latest"]
    assert second == ["best.pth", str(trained / "runs/a/best.pth")]


@pytest.mark.parametrize(
    ("out", "named"), [("x.pdf", "x.pdf"), ("x.csv", "x.csv"), ("folder.png", "folder.png"), ("file/x.png", "file")]
)
def test_pictures_are_written_only_to_png_files(refused, tmp_path, out, named):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert f" {tmp_path / named}: " in refused("stats", out=out)
    assert sorted(tmp_path.rglob("*")) == before


# --- curves ---


def test_curves_draws_each_run_and_marks_its_best_epoch(run, trained, drawn):
    run("curves", trained / "runs/a", trained / "runs/b", data=False)
    miou, loss, lr = drawn[0].axes
    assert [axes.get_title() for axes in (miou, loss, lr)] == [
        "validation mIoU",
        "training loss (dots)\nvalidation cross-entropy (rings)",
        "learning rate (head)",
    ]
    rows = Run(trained / "runs/a").history()
    best = max(rows, key=lambda row: row["mean_iou"])
    line, star = miou.get_lines()[:2]
    assert line.get_xydata().tolist() == [[row["itr"], row["mean_iou"]] for row in rows]
    assert star.get_xydata().tolist() == [[best["itr"], best["mean_iou"]]]
    assert f"{best['mean_iou']:.4f}" in [text.get_text() for text in miou.texts]
    texts = legend_texts(drawn[0])
    assert texts[0].startswith(f"a: best {best['mean_iou']:.4f} at epoch {best['epoch']:.0f}")
    assert texts[1].startswith("b: best ")
    a, b = loss.get_lines()[0], loss.get_lines()[2]  # the rings of the validation loss come after each
    assert a.get_linestyle() != b.get_linestyle()  # legible without colour


def test_runs_of_the_same_name_are_distinguished(run, trained, tmp_path, drawn):
    other = tmp_path / "elsewhere" / "a"
    other.mkdir(parents=True)
    (other / "history.csv").write_bytes((trained / "runs/a/history.csv").read_bytes())
    run("curves", trained / "runs/a", other, data=False)
    assert len(set(legend_texts(drawn[0]))) == 2


def test_curves_of_a_run_without_a_validation_is_refused(refused, tmp_path):
    assert "nothing/history.csv: missing" in refused("curves", tmp_path / "nothing", data=False)


# --- predict ---


def test_predict_writes_mask_overlay_and_shares(run, trained, folder, tmp_path):
    run("predict", "--ckpt", trained / "runs/a/best.pth", "--input", folder / "JPEGImages", data=False, out="p")
    masks = sorted(path.name for path in (tmp_path / "p/masks").iterdir())
    assert masks == [f"{name}.png" for name in ("a1", "a2", "a3", "a4", "b1", "b2", "b3")]
    assert len(list((tmp_path / "p/overlays").iterdir())) == 7
    assert (tmp_path / "p/shares.csv").is_file()


def test_predict_goes_through_sub_folders_and_counts_other_files(run, trained, folder, tmp_path):
    (folder / "JPEGImages/street").mkdir()
    (folder / "JPEGImages/a1.jpg").rename(folder / "JPEGImages/street/a2.jpg")
    arguments = ("--ckpt", trained / "runs/a/best.pth", "--input", folder / "JPEGImages")
    out, path = run("predict", *arguments, data=False, out="own/JPEGImages/p")
    assert out.endswith(f"Written: {path}/masks, {path}/overlays and {path}/shares.csv for 7 of 7 images\n")
    masks = sorted(file.relative_to(path / "masks").as_posix() for file in (path / "masks").rglob("*.png"))
    assert masks == ["a2.png", "a3.png", "a4.png", "b1.png", "b2.png", "b3.png", "street/a2.png"]
    assert "street/a2.jpg,masks/street/a2.png," in (path / "shares.csv").read_text()
    # Again: what the first run wrote is not among the images.
    for name in ("notes.txt", "street/more.txt", ".hidden"):
        (folder / "JPEGImages" / name).touch()
    (folder / "JPEGImages/broken.jpg").touch()
    out, _ = run("predict", *arguments, data=False, out="own/JPEGImages/p")
    assert out.endswith("for 7 of 8 images (2 other files ignored)\n")
    out, _ = run("predict", *arguments[:2], "--input", folder / "JPEGImages/street", data=False, out="one")
    assert out.endswith("for 1 of 1 images (1 other file ignored)\n")
    out, _ = run("predict", *arguments[:2], "--input", folder / "JPEGImages/a3.jpg", data=False, out="one")
    assert out.endswith("for 1 of 1 images\n") and (tmp_path / "one/masks/a3.png").is_file()


def test_predict_lists_unreadable_images_and_does_the_rest(run, trained, folder, tmp_path):
    (folder / "JPEGImages/broken.jpg").write_bytes(b"no picture")
    out, _ = run(
        "predict", "--ckpt", trained / "runs/a/best.pth", "--input", folder / "JPEGImages", data=False, out="p"
    )
    assert "broken.jpg" in out
    assert len(list((tmp_path / "p/masks").iterdir())) == 7


def test_predict_adds_confidence_and_void_without_changing_the_rest(run, trained, folder, tmp_path):
    arguments = ("--ckpt", trained / "runs/a/best.pth", "--input", folder / "JPEGImages/a1.jpg")
    run("predict", *arguments, data=False, out="plain")
    out, path = run("predict", *arguments, "--confidence", data=False, out="sure")
    assert out.endswith(
        f"Written: {path}/masks, {path}/overlays, {path}/confidence and {path}/shares.csv for 1 of 1 images\n"
    )
    assert (path / "confidence/a1.png").is_file() and not (tmp_path / "plain/confidence").exists()
    for name in ("masks/a1.png", "overlays/a1.jpg", "shares.csv"):
        assert (path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    _, path = run("predict", *arguments, "--min_confidence", 1, data=False, out="void")
    assert (np.asarray(Image.open(path / "masks/a1.png")) == 255).all() and not (path / "confidence").exists()


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan"])
def test_predict_refuses_a_probability_out_of_range(refused, folder, value):
    arguments = ("predict", "--input", folder / "JPEGImages", "--min_confidence", value)
    assert f"--min_confidence: {value} is out of range; give 0 to 1" in refused(*arguments, data=False)


# --- report ---


def test_report_is_one_file_about_both_runs(trained, tmp_path, capsys):
    out = tmp_path / "report.html"
    visualize.main(["report", str(trained / "runs/a"), str(trained / "runs/b"), "--out", str(out), "--device", "cpu"])
    text = out.read_text()
    assert "focal_loss" in text and "data:image" in text
    assert f"Written: {out}" in capsys.readouterr().out


def test_only_the_commands_that_need_them_import_segment_anything_the_report_and_the_doctor():
    modules = ["network.sam", "transformers", "utils.pictures.report", "datasets.prepare.check"]
    code = f"import sys, visualize; visualize.get_parser(); print([m for m in {modules} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


@pytest.mark.parametrize(
    "command", ["samples", "stats", "check", "compare", "curves", "predict", "suspects", "sam", "report"]
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        visualize.main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: visualize.py " + command in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["paint"], ["samples", "--no_such_flag"]])
def test_unknown_commands_and_flags_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        visualize.main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
