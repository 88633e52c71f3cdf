import csv
import os
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from transformers import (
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

import main
import visualize
from datasets import build_dataset
from network.sam import Mask, generate_masks, load_sam, refine, true_masks
from tests.conftest import TINY, run_main
from utils.errors import InputError
from utils.metrics import BoundaryIoU, boundary
from utils.pictures.plotting import draw_masks
from utils.pictures.sam import dataset_items

CPU = torch.device("cpu")
ANY = "--min_score 0 --min_stability 0 --points_per_side 2 --device cpu --amp off".split()


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    """A real but tiny SamModel with random weights, and its processor."""
    folder = tmp_path_factory.mktemp("sam")
    small = {"image_size": 64, "patch_size": 16}
    vision = SamVisionConfig(
        hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, window_size=2,
        global_attn_indexes=[0], num_pos_feats=8, mlp_dim=32, **small,
    )  # fmt: skip
    prompts = SamPromptEncoderConfig(hidden_size=16, mask_input_channels=4, **small)
    decoder = SamMaskDecoderConfig(hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16)
    torch.manual_seed(0)
    parts = (vision.to_dict(), prompts.to_dict(), decoder.to_dict())
    config = SamConfig(vision_config=parts[0], prompt_encoder_config=parts[1], mask_decoder_config=parts[2])
    SamModel(config).save_pretrained(folder)
    side = {"height": 64, "width": 64}
    SamProcessor(SamImageProcessor(size={"longest_edge": 64}, pad_size=side)).save_pretrained(folder)
    return folder


def probabilities_of(ids, num_classes=3, sure=0.8):
    one_hot = torch.nn.functional.one_hot(ids.long(), num_classes).permute(2, 0, 1).float()
    return one_hot * (sure - (1 - sure) / (num_classes - 1)) + (1 - sure) / (num_classes - 1)


def square(top, left, side, size=40):
    inside = np.zeros((size, size), bool)
    inside[top : top + side, left : left + side] = True
    return inside


def test_perfect_outlines_repair_a_ragged_prediction():
    truth = torch.from_numpy(square(10, 10, 20)).to(torch.uint8)
    ragged = truth.clone()
    ragged[10:30:2, 10:14] = 0
    ragged[10:30:3, 30:33] = 1
    masks = true_masks(truth, void=255)
    assert len(masks) == 2 and (ragged != truth).any()
    assert (refine(probabilities_of(ragged), masks) == truth).all()


def test_no_masks_and_masks_entirely_over_background_change_nothing():
    ids = torch.from_numpy(square(10, 10, 10)).to(torch.uint8)
    assert (refine(probabilities_of(ids), []) == ids).all()
    assert (refine(probabilities_of(ids), [Mask.from_array(square(22, 3, 15))]) == ids).all()


def test_where_masks_overlap_the_smaller_one_wins_in_any_order():
    ids = torch.zeros(40, 40, dtype=torch.uint8)
    ids[10:20, 10:20] = 2
    masks = [Mask.from_array(square(10, 10, 10)), Mask.from_array(square(0, 0, 40))]
    assert (refine(probabilities_of(ids), masks) == ids).all()
    assert (refine(probabilities_of(ids), masks[::-1]) == ids).all()
    assert (refine(probabilities_of(ids), masks[1:]) == 0).all()


def test_small_and_uncertain_masks_change_nothing():
    ids = torch.from_numpy(square(10, 10, 6)).to(torch.uint8)
    mask = [Mask.from_array(square(10, 10, 8))]  # 64 pixels, 36 of them of class 1: its mean is 0.49
    assert (refine(probabilities_of(ids), mask, min_area=65, min_confidence=0) == ids).all()
    assert (refine(probabilities_of(ids), mask, min_confidence=0.6) == ids).all()
    assert int((refine(probabilities_of(ids), mask, min_confidence=0.4) == 1).sum()) == 64


def test_a_mask_survives_packing():
    inside = np.random.default_rng(0).random((31, 45)) < 0.3
    mask = Mask.from_array(inside)
    again = np.zeros_like(inside)
    again[mask.window] = mask.pixels()
    assert (again == inside).all() and mask.area == inside.sum() and mask.bits.nbytes <= inside.size // 8 + 1


def test_true_masks_are_the_connected_regions_of_scipy():
    from scipy.ndimage import label

    ids = np.random.default_rng(0).integers(0, 3, (30, 37)).astype(np.uint8)
    ids[ids == 2] = 255
    masks = true_masks(torch.from_numpy(ids), void=255)
    assert len(masks) == sum(label(ids == value)[1] for value in (0, 1))
    assert sum(mask.area for mask in masks) == (ids != 255).sum()


def test_masks_are_limited_in_number_and_the_same_for_any_batch(sam_folder):
    sam, image = load_sam(str(sam_folder), CPU), torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8)
    bounds = {"points_per_side": 3, "min_score": 0, "min_stability": 0}
    one, all_at_once = (generate_masks(sam, image, points_per_batch=n, **bounds) for n in (1, 64))
    assert one and [m.area for m in one] == [m.area for m in all_at_once]
    assert len(generate_masks(sam, image, max_masks=1, **bounds)) == 1
    assert generate_masks(sam, image, points_per_side=3) == []  # random weights pass no threshold


def test_masks_of_a_large_image_are_never_all_floats_at_once(sam_folder, monkeypatch):
    monkeypatch.setattr("network.sam.MASK_PIXELS", 2**20)
    sam, sizes = load_sam(str(sam_folder), CPU), []
    enlarge = sam.processor.post_process_masks

    def spy(*arguments, **keywords):
        large = enlarge(*arguments, **keywords)
        sizes.append(large[0].numel())
        return large

    monkeypatch.setattr(sam.processor, "post_process_masks", spy)
    image = torch.zeros(3, 600, 800, dtype=torch.uint8)
    masks = generate_masks(sam, image, points_per_side=3, min_score=0, min_stability=0)
    assert sum(sizes) == 27 * 600 * 800 and max(sizes) <= 2**20
    assert all(mask.bits.nbytes <= 600 * 800 // 8 for mask in masks)


def test_a_batch_too_large_for_memory_is_halved(sam_folder, monkeypatch):
    sam, tried = load_sam(str(sam_folder), CPU), []
    forward = sam.model.forward

    def small_memory(*arguments, input_points, **keywords):
        tried.append(input_points.shape[1])
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return forward(*arguments, input_points=input_points, **keywords)

    monkeypatch.setattr(sam.model, "forward", small_memory)
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    generate_masks(sam, image, points_per_side=2, points_per_batch=8)
    assert tried == [4, 4, 2, 2]  # 8 and 4 fail on the four points


def test_boundary_is_the_ring_inside_the_outline():
    near = boundary(torch.from_numpy(square(10, 10, 20)), 0.02)  # diagonal 56.6: 1 pixel
    assert int(near.sum()) == 20 * 20 - 18 * 18
    assert int(boundary(torch.ones(40, 40, dtype=torch.bool)).sum()) == 40 * 40 - 38 * 38


def test_boundary_iou_ignores_void_and_absent_classes():
    target = torch.from_numpy(square(10, 10, 20)).to(torch.uint8)
    target[9:12] = 255
    prediction = target.clone()
    prediction[target == 255] = 1
    measure = BoundaryIoU(3)
    measure.update(target, prediction)
    result = measure.compute()
    assert result["Mean Boundary IoU"] == 1 and result["Class Boundary IoU"][2] != result["Class Boundary IoU"][2]


def test_masks_are_drawn_and_nothing_outside_them():
    image = torch.full((3, 40, 40), 90, dtype=torch.uint8)
    drawn = draw_masks(image, [Mask.from_array(square(5, 5, 20)), Mask.from_array(square(28, 28, 10))])
    inside = square(5, 5, 20) | square(28, 28, 10)
    assert ((drawn != 90).any(axis=2) == inside).all() and (drawn[5, 5] == 255).all()
    assert (drawn[15, 15] != drawn[33, 33]).any()


# --- the command ---


@pytest.fixture
def run(folder, sam_folder, tmp_path, capsys):
    def start(*arguments, data=True):
        flags = ["--dataset", "folder", "--data_root", str(folder)] if data else []
        out = tmp_path / "sam.png"
        visualize.main(["sam", "--sam", str(sam_folder), "--out", str(out), *ANY, *flags, *map(str, arguments)])
        return capsys.readouterr().out, out

    return start


@pytest.fixture
def ckpt(folder, tmp_path):
    arguments = ["--dataset", "folder", "--data_root", str(folder), "--run_dir", str(tmp_path / "runs"), *TINY]
    main.main([*arguments, "--run_name", "a", "--total_itrs", "2"])
    return tmp_path / "runs/a/best.pth"


def test_sam_draws_with_and_without_a_model_and_scores_a_split(run, ckpt):
    out, path = run("--num", 2)
    assert path.is_file() and out.count("masks 0") == 2 and "peak memory" in out
    out, _ = run("--num", 1, "--ckpt", ckpt)
    assert "refinement" in out
    out, path = run("--eval", "all", "--ckpt", ckpt, "--true_masks")
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("class") for row in rows] == ["sky", "road", "tree", "car", "mean"]
    assert list(rows[0]) == "iou_before iou_after boundary_iou_before boundary_iou_after".split()
    for column in rows[0]:
        of_classes = [float(row[column]) for row in rows[:-1]]
        assert float(rows[-1][column]) == pytest.approx(np.nanmean(of_classes), abs=1e-6)
    with path.with_name("sam_images.csv").open() as file:
        images = list(csv.DictReader(file))
    assert list(images[0]) == "image masks model_seconds masks_seconds refinement_seconds".split()
    assert sorted(row["image"] for row in images) == ["a1", "a2", "a3", "a4"]
    assert all(int(row["masks"]) >= 4 and float(row["model_seconds"]) > 0 for row in images)
    assert "4 images, mean time per image: model " in out


def test_large_images_are_drawn_small_but_scored_at_native_size(folder, monkeypatch):
    monkeypatch.setattr("utils.pictures.sam.LONGEST_SIDE", 26)
    dataset = build_dataset("folder", folder, "train")  # 40 x 52 and 52 x 40
    small, large = (dataset_items(dataset, [0, 1], native=native) for native in (False, True))
    assert [[part.shape for part in item.read()] for item in small] == [
        [(3, 20, 26), (20, 26)],
        [(3, 26, 20), (26, 20)],
    ]
    assert [[part.shape for part in item.read()] for item in large] == [
        [(3, 40, 52), (40, 52)],
        [(3, 52, 40), (52, 40)],
    ]
    assert set(small[0].read()[1].unique().tolist()) <= {0, 1, 2, 3, 255}


def test_finding_no_masks_is_a_result(run):
    out, path = run("--num", 1, "--min_score", 0.99)
    assert "0 masks" in out and path.is_file()


def test_an_unreadable_image_exits_with_2_after_the_others_are_drawn(run, folder, capsys):
    (folder / "JPEGImages/a0.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        run("--input", folder / "JPEGImages", "--num", 2, data=False)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "a0.jpg" in printed.err and len(printed.err.splitlines()) == 1
    assert "a1.jpg: " in printed.out and "Written" in printed.out


def test_folders_without_sam_and_names_without_a_hub_are_refused(sam_folder, tmp_path, monkeypatch):
    import huggingface_hub.constants
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for name in (str(tmp_path / "missing"), "facebook/sam-of-nowhere"):
        with pytest.raises(InputError, match="is not a local folder, and the hub did not provide it"):
            load_sam(name, CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is not a SAM model that can be loaded"):
        load_sam(str(tmp_path / "empty"), CPU)
    lame = tmp_path / "lame"
    lame.mkdir()
    for path in sam_folder.glob("*.json"):
        shutil.copy(path, lame)
    weights = load_file(sam_folder / "model.safetensors")
    weights.pop(next(key for key in weights if "iou_prediction_head" in key))
    save_file(weights, lame / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights"):
        load_sam(str(lame), CPU)


def test_weights_of_other_models_and_damaged_weights_are_refused(sam_folder, tmp_path):
    from transformers import ViTConfig, ViTModel

    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    for path in sam_folder.glob("*processor_config.json"):  # its name depends on the version
        shutil.copy(path, tmp_path / "vit")
    with pytest.raises(InputError, match="vit: "):
        load_sam(str(tmp_path / "vit"), CPU)
    for name, damage in (("cut", lambda data: data[: len(data) // 2]), ("other", lambda data: b"no weights")):
        shutil.copytree(sam_folder, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        with pytest.raises(InputError, match="is not a SAM model that can be loaded"):
            load_sam(str(tmp_path / name), CPU)


def test_without_transformers_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"^--sam: transformers .*; pip install transformers$"):
        load_sam("any", CPU)


class Hub(BaseHTTPRequestHandler):
    """Serves one model from `folder` as the hub does; with `silent` it never answers."""

    folder, silent, asked = None, False, []

    def do_HEAD(self):
        self.asked.append(self.path)
        if self.silent:
            time.sleep(5)
            return
        path = self.folder / self.path.rpartition("/")[2]
        if "/tree/" in self.path:
            found, body = True, b"[]"  # no further files
        elif self.path.startswith("/api/models/own/sam"):
            found, body = True, b'{"id": "own/sam", "sha": "0123", "siblings": []}'
        else:
            found = path.is_file()
            body = path.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("X-Repo-Commit", "0123")
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(sam_folder, tmp_path, monkeypatch):
    """Runs a hub on this machine; returns its handler class, which controls it."""
    handler = type("Handler", (Hub,), {"folder": sam_folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    yield handler
    server.shutdown()


def test_a_model_comes_from_the_hub_and_later_from_its_cache(hub, folder, tmp_path, monkeypatch):
    data = ["--dataset", "folder", "--data_root", folder, "--num", 1, "--out", tmp_path / "sam.png"]
    command = ["sam", "--sam", "own/sam", *ANY, *data]
    result = run_main(*command, script="visualize.py")
    assert result.returncode == 0, result.stderr
    assert any("model.safetensors" in path for path in hub.asked)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    again = run_main(*command, script="visualize.py")
    assert again.returncode == 0 and "masks" in again.stdout, again.stderr


def test_a_hub_that_does_not_answer_is_soon_given_up(hub, monkeypatch):
    import huggingface_hub.constants

    hub.silent = True
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", os.environ["HF_ENDPOINT"])
    monkeypatch.setattr("network.sam.HUB_TIMEOUT", 0.2)
    start = time.perf_counter()
    with pytest.raises(InputError, match="the hub did not provide it"):
        load_sam("own/unheard", CPU)
    assert hub.asked and time.perf_counter() - start < 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--eval", "2"], "add --ckpt"), (["--input", "x", "--true_masks"], "--input"), (["--eval", "0"], "--eval")],
)
def test_contradicting_flags_are_refused(run, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
