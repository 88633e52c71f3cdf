import csv
import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import main
from datasets import build_dataset
from network import build_model
from tests.conftest import ROOT, TINY, assert_refused, before, run_main, write_picture
from utils.engine import forward_backward
from utils.environment import environment
from utils.loss import LOSSES, build_loss
from utils.options import get_parser
from utils.run import HISTORY, folder_of_test
from utils.weights.load import load_checkpoint, restore_model


@pytest.fixture
def start(folder, tmp_path, capsys):
    """Runs main.py on the small folder; returns (scores, what it printed)."""

    def run(*arguments, root=folder):
        data = ["--dataset", "folder", "--data_root", str(root), "--run_dir", str(tmp_path / "runs")]
        scores = main.main([*data, *TINY, *map(str, arguments)])
        return scores, capsys.readouterr().out

    return run


@pytest.fixture
def refused(start, capsys):
    """Runs main.py on something unusable; returns the one line that it printed on stderr."""

    def run(*arguments, **keywords):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            start(*arguments, **keywords)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        return lines[0]

    return run


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_files_and_says_what_the_field_knows(start, tmp_path):
    scores, out = start("--run_name", "a", "--total_itrs", 5)
    run = tmp_path / "runs" / "a"
    assert {path.name for path in run.iterdir()} == {
        "options.json",
        "log.txt",
        "history.csv",
        "class_iou.csv",
        "confusion_matrix.csv",
        "curves.png",
        "latest.pth",
        "latest.prev.pth",
        "best.pth",
    }
    for line in (
        "Dataset: folder, Train set: 4",
        "Dataset: folder, Train set: 4, Val set: 3",
        "Epoch 3, Itrs 5/5, Loss=",
        f"Model saved as {run / 'latest.pth'}",
        "validation after iteration 2...",
        "new best mIoU: ",
        "best score and itr: ",
        f"Mean IoU: {scores['Mean IoU']:.6f}",
    ):
        assert line in out
        assert line in (run / "log.txt").read_text()

    rows = rows_of(run / "history.csv")
    assert list(rows[0]) == HISTORY
    assert [(row["epoch"], row["itr"]) for row in rows] == [("1", "2"), ("2", "4"), ("3", "5")]
    assert float(rows[-1]["mean_iou"]) == pytest.approx(scores["Mean IoU"], rel=1e-9)
    assert all(float(row["peak_memory_mb"]) > 100 and float(row["train_seconds"]) > 0 for row in rows)

    options = json.loads((run / "options.json").read_text())
    assert options["total_itrs"] == 5 and options["model"] == "deeplabv3plus_mobilenet_v3_large"
    assert options["versions"]["torch"] == torch.__version__ and options["device_name"].startswith("cpu")
    assert "command" in options and "git_commit" in options
    millions, gflops = options["parameters"] / 1e6, options["gflops"]
    size = f"{millions:.1f} M parameters, {gflops:.1f} GFLOPs at 513 x 513"
    assert f"Model: deeplabv3plus_mobilenet_v3_large, {size}" in (run / "log.txt").read_text().splitlines()[:6]
    assert 11 < millions < 12 and 40 < gflops < 45

    matrix = np.array([list(row.values())[1:] for row in rows_of(run / "confusion_matrix.csv")], dtype=int)
    ious = [float(row["iou"]) for row in rows_of(run / "class_iou.csv")]
    assert matrix.shape == (4, 4)
    right = matrix.diagonal()
    assert ious == pytest.approx(right / (matrix.sum(0) + matrix.sum(1) - right), abs=1e-6)
    f1 = [float(row["f1"]) for row in rows_of(run / "class_iou.csv")]
    assert list(rows_of(run / "class_iou.csv")[0]) == ["class", "iou", "precision", "recall", "f1"]
    assert f1 == pytest.approx([2 * iou / (1 + iou) for iou in ious], abs=2e-6)
    with Image.open(run / "curves.png") as picture:
        assert picture.width >= 1000


def test_history_loss_is_the_mean_of_the_iterations_since_the_last_row(start, tmp_path):
    _, out = start("--run_name", "a", "--total_itrs", 5, "--val_interval", 3)
    losses = [float(line.split("Loss=")[1]) for line in out.splitlines() if "Loss=" in line]
    rows = rows_of(tmp_path / "runs" / "a" / "history.csv")
    assert [float(row["loss"]) for row in rows] == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])], abs=1e-5)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "focal_loss"])
def test_validation_loss_is_the_cross_entropy_of_the_validation_set(start, folder, tmp_path, loss_type):
    _, out = start("--run_name", "a", "--total_itrs", 2, "--loss_type", loss_type, "--lr", 0.01)
    model = restore_model(load_checkpoint(tmp_path / "runs/a/latest.pth"), "latest.pth", torch.device("cpu")).model
    losses = []
    for image, mask in build_dataset("folder", folder, "val"):
        with torch.inference_mode():
            pixels = F.cross_entropy(model(image[None]), mask[None].long(), ignore_index=255, reduction="none")
        losses.append(pixels[mask[None] != 255])
    (row,) = rows_of(tmp_path / "runs/a/history.csv")
    assert float(row["val_loss"]) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert f"validation cross-entropy: {float(row['val_loss']):.6f}" in out
    _, out = start("--test_only", "--ckpt", tmp_path / "runs/a/latest.pth")
    assert "validation cross-entropy" not in out


def test_a_history_from_before_the_validation_loss_goes_on(start, tmp_path):
    start("--run_name", "a", "--total_itrs", 2)
    history = tmp_path / "runs/a/history.csv"
    history.write_text("".join(f"{line.rpartition(',')[0]}\n" for line in history.read_text().splitlines()))
    start("--run_name", "a", "--total_itrs", 4, "--continue_training")
    old, new = (float(row["val_loss"]) for row in rows_of(history))
    assert math.isnan(old) and new > 0


def test_checkpoint_holds_what_the_contract_says_and_builtins_only(start, tmp_path):
    scores, _ = start("--run_name", "a", "--total_itrs", 2)
    checkpoint = torch.load(tmp_path / "runs" / "a" / "latest.pth", weights_only=True)
    assert {"model_state", "optimizer_state", "scheduler_state", "scaler_state"} <= checkpoint.keys()
    assert checkpoint["cur_itrs"] == 2 and checkpoint["best_score"] == scores["Mean IoU"]
    assert checkpoint["class_names"] == ["sky", "road", "tree", "car"]
    assert np.array(checkpoint["palette"]).shape == (256, 3)
    assert checkpoint["options"]["lr"] == 0.05


def test_test_only_prints_the_same_scores_and_writes_beside_the_run(start, tmp_path):
    scores, _ = start("--run_name", "a", "--total_itrs", 4)
    run = tmp_path / "runs" / "a"
    history = (run / "history.csv").read_bytes()
    again, out = start("--test_only", "--ckpt", run / "latest.pth")
    assert again == scores
    assert f"Model restored from {run / 'latest.pth'}" in out and f"Mean IoU: {scores['Mean IoU']:.6f}" in out
    assert {path.name for path in (run / "test_val").iterdir()} == {
        "options.json",
        "log.txt",
        "class_iou.csv",
        "confusion_matrix.csv",
        "card.json",
        "images.csv",
        "counts.npz",
    }
    assert (run / "history.csv").read_bytes() == history
    assert (run / "test_val/class_iou.csv").read_bytes() == (run / "class_iou.csv").read_bytes()


def test_the_card_says_what_one_miou_does_not(start, tmp_path):
    scores, _ = start("--run_name", "a", "--total_itrs", 2)
    run = tmp_path / "runs" / "a"
    _, out = start("--test_only", "--ckpt", run / "best.pth", "--tta", "flip,0.5,1.0", "--val_split", "train")
    assert "boundary IoU" in out and "images with the lowest mIoU" in out and "(bootstrap over 4 images)" in out
    card = json.loads((run / "test_train_tta_flip_0.5_1/card.json").read_text())
    assert card["ckpt"] == str(run / "best.pth") and card["tta"] == "flip,0.5,1.0" and card["comparable"]
    assert card["bootstrap"][0] <= card["mean_iou"] <= card["bootstrap"][1]
    assert [row["class"] for row in card["classes"]] == ["sky", "road", "tree", "car"]
    assert len(rows_of(run / "test_train_tta_flip_0.5_1/images.csv")) == 4

    _, out = start("--test_only", "--ckpt", run / "best.pth", "--crop_val")
    assert "not comparable with those of whole images" in out
    assert not json.loads((run / "test_val_crop33/card.json").read_text())["comparable"]
    start("--test_only", "--ckpt", run / "best.pth")
    card = json.loads((run / "test_val/card.json").read_text())
    assert card["mean_iou"] == scores["Mean IoU"] and card["images_per_second"] > 0


def test_two_models_are_compared_on_the_same_images(start, refused, tmp_path):
    a, _ = start("--run_name", "a", "--total_itrs", 2)
    b, _ = start("--run_name", "b", "--total_itrs", 4, "--random_seed", 2)
    test = ("--test_only", "--ckpt", tmp_path / "runs/a/latest.pth", "--against")
    assert "b/test_val: has no counts.npz; test that model" in refused(*test, tmp_path / "runs/b/test_val")
    assert not (tmp_path / "runs/a/test_val").exists()
    start("--test_only", "--ckpt", tmp_path / "runs/b/latest.pth")

    counts = tmp_path / "runs/b/test_val/counts.npz"
    _, out = start(*test, counts)
    assert f"mIoU {100 * (a['Mean IoU'] - b['Mean IoU']):+.2f} points over {counts}, 95% interval " in out
    assert "warning: 3 images are few" in out and "fewer than 10 images" in out and "sky (3), road (3)" in out
    assert "runs/b" in json.loads((tmp_path / "runs/a/test_val/card.json").read_text())["against"]
    # A second test of the same model reads what the first one wrote.
    _, out = start(*test, tmp_path / "runs/a/test_val")
    assert "mIoU +0.00 points over" in out and "95% interval 0.00 to 0.00; better in 0.0% of" in out

    assert "has 3 images, this test 4" in refused(*test, counts, "--val_split", "train")
    assert "was scored on other masks (first b1); test both on" in refused(*test, counts, "--crop_val")
    assert (tmp_path / "runs/a/test_val_crop33/card.json").is_file()  # the evaluation is not lost


def test_a_model_of_stride_16_is_tested_at_stride_8(start, refused, tmp_path):
    model = ("--model", "deeplabv3_resnet50")
    start("--run_name", "a", "--total_itrs", 1, *model)
    ckpt = tmp_path / "runs/a/best.pth"
    plain, _ = start("--test_only", "--ckpt", ckpt, *model)
    finer, _ = start("--test_only", "--ckpt", ckpt, "--eval_output_stride", 8, *model)
    finest = json.loads((tmp_path / "runs/a/test_val_os8/card.json").read_text())
    coarse = json.loads((tmp_path / "runs/a/test_val/card.json").read_text())
    assert finer != plain and finest["parameters"] == coarse["parameters"]
    assert finest["gflops"] > 1.5 * coarse["gflops"]
    start("--run_name", "m", "--total_itrs", 1)
    line = refused("--test_only", "--ckpt", tmp_path / "runs/m/best.pth", "--eval_output_stride", 8)
    assert "MobileNetV3 supports 16 only" in line


def test_class_weights_come_from_the_training_set_and_are_logged(start, refused, tmp_path):
    _, out = start("--total_itrs", 2, "--class_weights", "inverse")
    assert "Class weights (inverse): sky " in out
    assert (tmp_path / "runs/deeplabv3plus_mobilenet_v3_large_folder_os16_cross_entropy_inverse").is_dir()
    _, plain = start("--run_name", "plain", "--total_itrs", 2)
    assert [line for line in out.splitlines() if "Loss=" in line] != [
        line for line in plain.splitlines() if "Loss=" in line
    ]
    weighted = ("--class_weights", "inverse", "--loss_type", "lovasz_softmax", "--run_name", "b")
    assert "--class_weights inverse: lovasz_softmax" in refused(*weighted)
    assert not (tmp_path / "runs/b").exists()


def test_every_loss_trains_with_its_own_loss(start):
    losses = {}
    for loss_type in LOSSES:
        _, out = start("--run_name", loss_type, "--total_itrs", 1, "--loss_type", loss_type)
        losses[loss_type] = float(re.search(r"Itrs 1/1, Loss=([0-9.]+)", out)[1])
    assert all(loss > 0 for loss in losses.values()) and len(set(losses.values())) == len(LOSSES)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "focal_loss"])
def test_a_step_in_parts_has_the_gradients_of_the_whole(loss_type):
    """However unevenly void is shared out; without batch normalisation, which sees the parts."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 6, 7), generator=generator, dtype=torch.uint8)
    targets = torch.randint(0, 5, (4, 6, 7), generator=generator, dtype=torch.uint8)
    targets[0], targets[1, :4] = 255, 255
    losses, gradients = [], []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        model, scaler = torch.nn.Conv2d(3, 5, 3, padding=1), torch.amp.GradScaler("cpu", enabled=False)
        net = lambda x, model=model: model(x / 255)  # noqa: E731
        loss = forward_backward(net, build_loss(loss_type), images, targets, scaler=scaler, amp=None, parts=parts)
        losses.append(loss)
        gradients.append(model.weight.grad)
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])


def test_a_step_in_parts_says_what_batch_normalisation_sees(start, refused):
    _, out = start("--run_name", "a", "--total_itrs", 2, "--batch_size", 4, "--grad_accum", 2)
    assert "sees 2 of 4 images at a time (because of --grad_accum)" in out and "Itrs 2/2" in out
    assert "--grad_accum 3: does not divide --batch_size 4" in refused("--batch_size", 4, "--grad_accum", 3)
    _, out = start(
        "--run_name", "b", "--total_itrs", 1, "--grad_accum", 2, "--batch_size", 4, "--loss_type", "lovasz_softmax"
    )
    assert "lovasz_softmax is computed on 2 images at a time" in out
    assert "batch normalisation needs two or more" in refused("--batch_size", 2, "--grad_accum", 2)


def test_compile_falls_back_with_one_warning(start, monkeypatch):
    _, plain = start("--run_name", "a", "--total_itrs", 2)

    def failing(model):
        def forward(images):
            raise RuntimeError("no compiler\nand more")

        return forward

    monkeypatch.setattr(torch, "compile", failing)
    _, out = start("--run_name", "b", "--total_itrs", 2, "--compile")
    assert out.count("--compile: failed, training goes on without it (no compiler)") == 1
    losses = [[line for line in text.splitlines() if "Loss=" in line] for text in (plain, out)]
    assert losses[0] == losses[1]


def test_a_failing_worker_keeps_its_cause(start, monkeypatch):
    def fail(*_):
        raise RuntimeError("DataLoader worker exited") from RuntimeError("killed by signal: Bus error")

    before(monkeypatch, "forward_backward", 1, fail)
    with pytest.raises(RuntimeError, match="exited") as error:
        start("--total_itrs", 1)
    assert "Bus error" in str(error.value.__cause__)


def test_compiled_training_gives_what_plain_training_gives(start, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))  # needs no C++ compiler
    runs = [start("--run_name", name, "--total_itrs", 2, *flags) for name, flags in (("a", []), ("b", ["--compile"]))]
    losses = [[line for line in out.splitlines() if "Loss=" in line] for _, out in runs]
    assert losses[0] == losses[1] and "--compile: failed" not in runs[1][1]


@pytest.mark.parametrize("text", ["flip,mirror", "0", "flip,flip"])
def test_other_tta_is_refused_with_its_item(refused, text):
    assert f"--tta: {text}: " in (line := refused("--test_only", "--tta", text)) and "_tta" not in line


def test_one_way_to_test_has_one_folder():
    folders = {
        folder_of_test(get_parser().parse_args(["--tta", text]), {}) for text in ("flip,0.5,1.0", "1, 0.50,flip")
    }
    assert folders == {"test_val_tta_flip_0.5_1"}


@pytest.mark.parametrize("damage", ["", "raise"])
def test_a_failing_run_with_workers_exits(folder, tmp_path, damage):
    """Its workers, which leave signals to it, must not keep it."""
    data = [
        "--dataset",
        "folder",
        "--data_root",
        str(folder),
        "--run_dir",
        str(tmp_path),
        *TINY,
        "--num_workers",
        "2",
    ]
    if damage:
        script = f"""
import main
def fail(*_, **__):
    raise RuntimeError("our fault")
main.forward_backward = fail
main.main({data!r})
"""
        result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 1 and "our fault" in result.stderr
    else:
        (folder / "JPEGImages/a1.jpg").write_bytes(b"no picture")
        assert_refused(run_main(*data, "--total_itrs", 4), "a1.jpg")


@pytest.mark.parametrize(
    "flags", [["--tta", "flip"], ["--crop_val"], ["--against", "b"], ["--eval_output_stride", "8"]]
)
def test_flags_of_the_test_are_refused_in_training(refused, flags):
    assert f"{flags[0]}: works with --test_only alone" in refused(*flags)


def test_test_only_takes_any_list_and_the_runs_best_by_itself(start, tmp_path):
    start("--run_name", "a", "--total_itrs", 2)
    _, out = start("--test_only", "--run_name", "a", "--val_split", "train")
    assert "Test set: 4 (train)" in out
    assert (tmp_path / "runs/a/test_train/class_iou.csv").is_file()


def test_test_only_of_a_checkpoint_without_a_run_writes_to_the_named_run(start, tmp_path):
    start("--run_name", "a", "--total_itrs", 2)
    (tmp_path / "runs/a/best.pth").rename(tmp_path / "alone.pth")
    start("--test_only", "--ckpt", tmp_path / "alone.pth", "--run_name", "b")
    assert [path.name for path in (tmp_path / "runs/b").iterdir()] == ["test_val"]
    start("--run_name", "b", "--total_itrs", 1)  # the name is still free for a training


def test_checkpoint_rebuilds_its_model_without_flags(folder, start, tmp_path):
    scores, _ = start("--run_name", "a", "--total_itrs", 2)
    again = main.main(
        ["--dataset", "folder", "--data_root", str(folder), "--device", "cpu", "--amp", "off", "--num_workers", "0"]
        + ["--test_only", "--ckpt", str(tmp_path / "runs/a/best.pth")]
    )
    assert again == scores


def test_results_are_named_by_image_id_in_the_data_sets_colours(start, tmp_path):
    start("--run_name", "a", "--total_itrs", 2, "--save_val_results")
    results = tmp_path / "runs" / "a" / "results"
    assert {path.name for path in (results / "masks").iterdir()} == {"b1.png", "b2.png", "b3.png"}
    assert {path.name for path in (results / "overlays").iterdir()} == {"b1.jpg", "b2.jpg", "b3.jpg"}
    with Image.open(results / "masks/b2.png") as mask, Image.open(results / "overlays/b2.jpg") as overlay:
        assert mask.mode == "P" and mask.size == overlay.size == (40, 52)
        assert mask.getpalette()[3:6] == [128, 0, 0] and np.array(mask).max() <= 3


def test_masks_saved_are_those_that_were_scored(start, folder, tmp_path):
    start("--run_name", "a", "--total_itrs", 2, "--save_val_results")
    matrix = np.zeros((4, 4), int)
    for name in ("b1", "b2", "b3"):
        target = np.array(Image.open(folder / f"SegmentationClass/{name}.png"))
        prediction = np.array(Image.open(tmp_path / f"runs/a/results/masks/{name}.png"))
        np.add.at(matrix, (target[target != 255], prediction[target != 255]), 1)
    saved = [list(row.values())[1:] for row in rows_of(tmp_path / "runs/a/confusion_matrix.csv")]
    assert (matrix == np.array(saved, dtype=int)).all()


def test_loss_falls(start):
    flags = "--batch_size 4 --total_itrs 30 --val_interval 30 --crop_size 49 --lr 0.02"
    _, out = start("--run_name", "a", *flags.split())
    losses = [float(line.split("Loss=")[1]) for line in out.splitlines() if "Loss=" in line]
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:4])


@pytest.mark.parametrize("loss_type", ["cross_entropy", "focal_loss"])
def test_run_is_named_after_model_data_stride_and_loss(start, tmp_path, loss_type):
    start("--total_itrs", 2, "--loss_type", loss_type)
    assert (tmp_path / f"runs/deeplabv3plus_mobilenet_v3_large_folder_os16_{loss_type}/best.pth").is_file()


def test_focal_gamma_reaches_the_loss(start):
    first = [
        start("--run_name", g, "--total_itrs", 2, "--loss_type", "focal_loss", "--focal_gamma", g)[1] for g in "05"
    ]
    first = [float(out.split("Loss=")[1].split()[0]) for out in first]
    assert first[1] < 0.5 * first[0]


def test_amp_bf16_trains_on_the_cpu(start):
    scores, out = start("--total_itrs", 2, "--amp", "bf16")
    assert "bfloat16" in out and math.isfinite(scores["Mean IoU"])


def test_options_hold_what_the_loss_was_made_of(start, tmp_path):
    start("--run_name", "a", "--total_itrs", 1, "--loss_type", "focal_loss")
    options = json.loads((tmp_path / "runs/a/options.json").read_text())
    assert options["loss_type"] == "focal_loss" and options["focal_gamma"] == 2.0


def test_training_needs_no_git(start, tmp_path, monkeypatch):
    def missing(*arguments, **keywords):
        raise FileNotFoundError("git")

    monkeypatch.setattr("utils.environment.subprocess.run", missing)
    environment.cache_clear()
    start("--run_name", "a", "--total_itrs", 1)
    assert json.loads((tmp_path / "runs/a/options.json").read_text())["git_commit"] is None
    environment.cache_clear()


def test_interrupt_exits_with_130(start, monkeypatch, capsys):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "forward_backward", interrupt)
    with pytest.raises(SystemExit) as stop:
        start("--total_itrs", 2)
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err


def test_diverged_training_stops_before_anything_is_saved(refused, tmp_path):
    line = refused("--run_name", "a", "--total_itrs", 6, "--lr", "1e30", "--print_interval", 100)
    assert "the loss is" in line and "lower --lr" in line
    assert not (tmp_path / "runs/a/best.pth").exists()


def test_fresh_start_never_overwrites_a_run(start, refused, tmp_path):
    start("--run_name", "a", "--total_itrs", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "runs/a").iterdir()}
    line = refused("--run_name", "a", "--total_itrs", 4)
    assert "runs/a: this run exists" in line and "--continue_training" in line and "--run_name" in line
    assert {path: path.read_bytes() for path in (tmp_path / "runs/a").iterdir()} == before


def test_split_lists_that_were_made_are_kept_with_the_run_and_taken_up_again(folder, start, tmp_path):
    for path in (folder / "ImageSets/Segmentation").iterdir():
        path.unlink()
    before = sorted(folder.rglob("*"))
    scores, out = start("--run_name", "a", "--total_itrs", 2)
    lists = tmp_path / "runs/a/splits"
    train, val = ((lists / f"{name}.txt").read_text().split() for name in ("train", "val"))
    assert (len(train), len(val)) == (6, 1) and not set(train) & set(val)
    assert "has no split lists: 1 ids drawn for val" in out
    assert sorted(folder.rglob("*")) == before
    again, _ = start("--test_only", "--ckpt", tmp_path / "runs/a/best.pth", "--random_seed", 99)
    assert again == scores
    (tmp_path / "runs/a/best.pth").rename(tmp_path / "alone.pth")
    alone, out = start("--test_only", "--ckpt", tmp_path / "alone.pth", "--run_name", "b", "--random_seed", 99)
    assert alone == scores and "1 ids drawn for val" in out


def test_starting_from_weights_keeps_the_model_and_starts_the_count_anew(start, tmp_path):
    start("--run_name", "a", "--total_itrs", 2)
    _, out = start("--run_name", "b", "--total_itrs", 1, "--ckpt", tmp_path / "runs/a/best.pth")
    assert "Model restored from" in out and "Training state restored" not in out
    assert "Itrs 1/1" in out and "  total_itrs: 2 in the checkpoint, 1 now" in out


def test_no_imagenet_download_when_a_checkpoint_is_given(folder, start, tmp_path, monkeypatch):
    start("--run_name", "a", "--total_itrs", 2)
    monkeypatch.setattr("utils.weights.load.download", lambda weights: pytest.fail("downloads"))
    for flags in (["--test_only"], ["--run_name", "b", "--total_itrs", 1]):
        start("--backbone_weights", "imagenet", "--ckpt", tmp_path / "runs/a/best.pth", *flags)


# --- the optimizer and its schedule ---


@pytest.fixture
def steps(start, monkeypatch):
    """Trains and returns, for each step, the hyperparameters and the number of parameters of both groups."""

    def run(itrs, *arguments):
        seen, step = [], torch.optim.SGD.step

        def spy(self, *more, **keywords):
            seen.append([{**group, "params": len(group["params"])} for group in self.param_groups])
            return step(self, *more, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", spy)
            start("--run_name", f"r{time.monotonic_ns()}", "--total_itrs", itrs, "--val_interval", 99, *arguments)
        return seen

    return run


def head_rates(steps):
    rates = [head["lr"] for _, head in steps]
    assert [backbone["lr"] for backbone, _ in steps] == pytest.approx([rate * 0.1 for rate in rates])
    return rates


def test_every_parameter_is_in_one_group_and_the_backbone_is_slower(steps):
    ((backbone, head),) = steps(1, "--lr", 0.01)
    model = build_model("deeplabv3plus_mobilenet_v3_large", num_classes=4)
    assert (backbone["lr"], head["lr"]) == (pytest.approx(0.001), 0.01)
    assert backbone["params"] == len(list(model.backbone.parameters()))
    assert head["params"] == len(list(model.classifier.parameters()))
    assert all((group["momentum"], group["weight_decay"]) == (0.9, 1e-4) for group in (backbone, head))


def test_step_policy_drops_by_gamma_every_step_size_iterations(steps):
    rates = head_rates(steps(5, "--lr", 0.01, "--step_size", 2, "--gamma", 0.9))
    assert rates == pytest.approx([0.01] * 2 + [0.009] * 2 + [0.0081])


def test_poly_policy_falls_towards_zero_at_the_last_iteration(steps):
    rates = head_rates(steps(5, "--lr", 0.01, "--lr_policy", "poly"))
    assert rates == pytest.approx([0.01 * (1 - itr / 5) ** 0.9 for itr in range(5)], abs=1e-12)
    assert all(isinstance(rate, float) for rate in rates)


@pytest.mark.parametrize("policy", [["step", "--step_size", 2], ["poly"]])
def test_warm_up_rises_linearly_to_the_policys_rate(steps, policy):
    plain, warm = (head_rates(steps(5, "--lr_policy", *policy, "--warmup_itrs", itrs)) for itrs in (0, 3))
    assert [w / p for w, p in zip(warm, plain, strict=True)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize(
    ("device", "amp", "fused"), [("cpu", "off", None), ("cuda", "bf16", True), ("cuda", "fp16", None)]
)
def test_sgd_is_fused_on_a_gpu_unless_a_scaler_may_skip_its_first_step(start, monkeypatch, device, amp, fused):
    asked, inner = {}, main.initial_model

    def sgd(self, groups, **keywords):
        asked.update(keywords)
        raise ZeroDivisionError

    monkeypatch.setattr(torch.optim.SGD, "__init__", sgd)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(main, "choose_device", lambda name: torch.device(device))
    monkeypatch.setattr(main, "device_name", str)
    monkeypatch.setattr(main, "initial_model", lambda *given: inner(*given[:-1], torch.device("cpu")))
    with pytest.raises(ZeroDivisionError):
        start("--total_itrs", 1, "--amp", amp)
    assert asked["fused"] is fused


# --- what cannot be used: exit code 2, one line, nothing written ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch_size", 1], ["--batch_size 1", "global pooling"]),
        (["--batch_size", 5], ["--batch_size 5", "only 4 images"]),
        (["--ckpt", "typo.pth"], ["--ckpt typo.pth", "no such file"]),
        (["--ckpt", "typo.pth", "--test_only"], ["--ckpt typo.pth", "no such file"]),
        (["--ckpt", "typo.pth", "--continue_training"], ["--ckpt typo.pth", "no such file"]),
        (["--test_only"], ["best.pth", "no such file"]),
        (["--val_split", "test"], ["test.txt", "train, val"]),
        (["--output_stride", 8], ["--output_stride 8", "MobileNetV3"]),
        (["--backbone_weights", "typo.pth"], ["--backbone_weights typo.pth", "no such file"]),
        (["--device", "cuda:99"], ["--device cuda:99"]),
        (["--crop_size", "0"], ["--crop_size", "0 is out of range; give 1 or more"]),
        (["--test_only", "--continue_training"], ["--test_only", "--continue_training"]),
        (["--ckpt", "."], ["--ckpt .: this is a folder"]),
        (["--no_such_flag"], ["--no_such_flag"]),
        (["--patience", "-1"], ["--patience", "-1 is out of range; give 0 or more"]),
        (["--patience", "1.5"], ["--patience", "invalid int value: '1.5'"]),
    ],
)
def test_bad_option_is_refused_and_nothing_is_written(refused, tmp_path, arguments, words):
    line = refused(*arguments)
    assert all(word in line for word in words)
    assert not (tmp_path / "runs").exists()


def damage_size(folder):
    write_picture(folder / "SegmentationClass/a1.png", np.zeros((9, 9), np.uint8))


def damage_colours(folder):
    write_picture(folder / "SegmentationClass/a1.png", np.zeros((40, 52, 3), np.uint8))


def damage_value(folder):
    write_picture(folder / "SegmentationClass/a1.png", np.full((40, 52), 77, np.uint8))


def damage_picture(folder):
    (folder / "JPEGImages/a1.jpg").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_size, ["a1.png", "9x9", "52x40"]),
        (damage_colours, ["a1.png", "RGB"]),
        (damage_value, ["a1.png", "value 77", "0..3"]),
        (damage_picture, ["a1.jpg", "cannot be read"]),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_sample_met_in_training_is_named(folder, refused, damage, words, workers):
    damage(folder)
    line = refused("--run_name", "a", "--total_itrs", 4, "--num_workers", workers)
    assert all(word in line for word in words) and "Traceback" not in line


def test_start_that_failed_on_bad_data_leaves_its_name_free(folder, start, refused, tmp_path):
    mask = (folder / "SegmentationClass/a1.png").read_bytes()
    damage_value(folder)
    assert "value 77" in refused("--run_name", "a", "--total_itrs", 4, "--batch_size", 4)  # in the first iteration
    assert not list((tmp_path / "runs/a").glob("*.pth"))
    (folder / "SegmentationClass/a1.png").write_bytes(mask)
    start("--run_name", "a", "--total_itrs", 2)


def test_bad_data_after_a_validation_leaves_the_run_as_it_was(folder, start, refused, tmp_path):
    start("--run_name", "a", "--total_itrs", 2)
    damage_value(folder)
    refused("--run_name", "a", "--total_itrs", 6, "--continue_training")
    assert {"history.csv", "latest.pth", "best.pth", "options.json"} <= {
        p.name for p in (tmp_path / "runs/a").iterdir()
    }


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        ("JPEGImages/b2.jpg", ["b2.jpg", "1 of 3"]),
        ("SegmentationClass/a2.png", ["a2.png", "mask is missing"]),
        ("ImageSets/Segmentation/train.txt", ["train.txt", "no such split list"]),
        ("class_names.txt", ["class_names.txt", "missing"]),
    ],
)
def test_incomplete_data_is_refused_at_the_start(folder, refused, tmp_path, remove, words):
    (folder / remove).unlink()
    line = refused("--run_name", "a")
    assert all(word in line for word in words)
    assert not (tmp_path / "runs").exists()


def test_validation_set_without_a_label_is_refused(folder, refused):
    for name, shape in (("b1", (40, 52)), ("b2", (52, 40)), ("b3", (40, 52))):
        write_picture(folder / f"SegmentationClass/{name}.png", np.full(shape, 255, np.uint8))
    assert "--val_split val: not one of the pixels to score is labelled" in refused("--total_itrs", 1)


def test_flag_that_contradicts_the_checkpoint_is_refused(start, refused, tmp_path):
    start("--run_name", "a", "--total_itrs", 2)
    ckpt = tmp_path / "runs/a/best.pth"
    line = refused("--test_only", "--ckpt", ckpt, "--model", "deeplabv3_mobilenet_v3_large")
    assert "--model deeplabv3_mobilenet_v3_large: contradicts" in line
    assert "--output_stride 8: contradicts" in refused("--test_only", "--ckpt", ckpt, "--output_stride", 8)


def test_classes_that_do_not_match_are_refused_with_both_lists(folder, start, refused, tmp_path):
    start("--run_name", "a", "--total_itrs", 2)
    (folder / "class_names.txt").write_text("sky\nroad\ntree\nhouse\n")
    line = refused("--test_only", "--ckpt", tmp_path / "runs/a/best.pth")
    assert "sky, road, tree, car" in line and "sky, road, tree, house" in line


def test_voc_without_photographs_is_refused_with_their_count(real_data, tmp_path, capsys):
    arguments = ["--data_root", real_data("voc2012_masks"), "--run_dir", tmp_path / "runs", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main.main([*map(str, arguments), "--backbone_weights", "none"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "2007_000033.jpg" in line and "1449 of 1449" in line


# --- as a user starts it ---


def test_as_a_script_bad_input_exits_with_2_and_one_line(tmp_path):
    assert_refused(run_main("--data_root", tmp_path), "VOC2012", "--download")


def test_help_names_every_group_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--backbone_lr_factor" in printed and "default: 513" in printed
    assert {"data:", "model:", "training:", "run:", "dashboard:"} <= set(printed.splitlines())


def test_importing_a_script_starts_nothing():
    code = "import main; print(main.__name__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "main\n" and result.stderr == ""


def test_works_where_worker_processes_are_spawned(folder, tmp_path):
    code = (
        "import multiprocessing, main\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        f"    main.main({[*TINY, '--dataset', 'folder', '--data_root', str(folder), '--run_dir', str(tmp_path)]!r} + "
        "['--total_itrs', '2', '--num_workers', '1'])\n"
    )
    (tmp_path / "spawned.py").write_text(code)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "spawned.py")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "best score and itr" in result.stdout


def test_data_other_than_the_trainings_are_named_and_tested_in_a_folder_of_their_own(
    folder, start, refused, tmp_path
):
    start("--run_name", "a", "--total_itrs", 1)
    best = tmp_path / "runs/a/best.pth"
    shutil.copytree(folder, tmp_path / "other")
    for data in (folder, tmp_path / "other"):
        start("--data_root", data, "--test_only", "--ckpt", best)
    assert sorted(path.name for path in (tmp_path / "runs/a").glob("test*")) == ["test_val", "test_val_folder_other"]
    line = refused("--dataset", "voc", "--data_root", tmp_path / "none", "--test_only", "--ckpt", best)
    assert f"({best} was trained with --dataset folder --data_root {folder} --year 2012)" in line
    assert "--eval_output_stride 8: MobileNetV3" in refused("--test_only", "--ckpt", best, "--eval_output_stride", 8)
