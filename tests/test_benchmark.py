import argparse
import json

import numpy as np
import pytest
import torch
from torch import nn

from datasets import build_dataset
from datasets.loader import make_loader
from datasets.sampler import SameSizeBatches
from datasets.transforms import eval_transform
from utils import benchmark, scaling
from utils.engine import normalize
from utils.metrics import ConfusionMatrix
from utils.prediction import predict_picture

CONTRACT = {"loader", "loader_2_workers", "train_step", "validation", "predict", "confusion_matrix"}
MODEL = "deeplabv3plus_mobilenet_v3_large"
TINY = f"--device cpu --amp off --model {MODEL} --repeats 1 --crop_size 33 --batch_size 4".split()
TINY += "--step_crop_size 33 --step_batch_size 2".split()


@pytest.fixture(autouse=True)
def small_work(monkeypatch):
    monkeypatch.setattr(benchmark, "PICTURE", (40, 52))
    monkeypatch.setattr(benchmark, "DISTINCT", 8)
    monkeypatch.setattr(benchmark, "MATRIX", 32)
    monkeypatch.setattr(benchmark, "FED_STEPS", 4)


@pytest.fixture
def opts(tmp_path) -> argparse.Namespace:
    opts = benchmark.parse(TINY)
    opts.folder = benchmark.write_pictures(tmp_path / "data", 8, num_val=4, size=(40, 52))
    return opts


def test_rows_are_printed_and_written(tmp_path, capsys):
    path = tmp_path / "rows.json"
    benchmark.main([*TINY, "--json", str(path)])
    rows = {row["part"]: row for row in json.loads(path.read_text())}
    assert rows.keys() == CONTRACT | {"loader_like_for_like"}
    for row in rows.values():
        assert {"unit", "ours", "reference", "ratio", "peak_memory_mb"} <= row.keys()
        assert row["ours"] > 0 and row["peak_memory_mb"] > 0
        assert row["ratio"] == pytest.approx(row["reference"] / row["ours"])
    step = rows["train_step"]
    assert step["unit"] == "ms/step" and step["images_per_s"] == pytest.approx(2000 / step["ours"])
    assert rows["predict"]["floor"] > 0 and rows["loader"]["floor"] > rows["loader_2_workers"]["floor"]
    printed = capsys.readouterr().out
    assert rows.keys() <= {line.split()[0] for line in printed.splitlines() if " ms/" in line}
    assert "Floors: " in printed


def test_parts_are_chosen_and_come_in_the_order_given(capsys, tmp_path):
    path = tmp_path / "rows.json"
    benchmark.main([*TINY, "--parts", "loader,confusion_matrix", "--json", str(path)])
    assert [row["part"] for row in json.loads(path.read_text())] == ["loader", "confusion_matrix"]


def test_parts_for_a_gpu_run_on_the_cpu_too(opts):
    for name in benchmark.ON_CUDA:
        assert benchmark.measure(name, benchmark.PARTS[name](opts), device=opts.device, repeats=1)["ratio"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--parts loader,speed", "--parts speed"),
        ("--repeats 0", "--repeats"),
        ("--step_batch_size 1", "--step_batch_size"),
        ("--batch_size 65", "--batch_size"),
        ("--crop_size 0", "--crop_size"),
        ("--model resnet", "--model"),
        ("--device nothing", "--device nothing"),
        ("--json no/such/folder.json", "--json no/such/folder.json"),
        ("--speed", "--speed"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        benchmark.main(flags.split())
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == ""
    assert message in printed.err and len(printed.err.splitlines()) == 1


def test_reference_confusion_matrix_is_ours():
    target, prediction = torch.from_numpy(np.random.default_rng(1).integers(0, 21, (2, 30, 40))).byte()
    target[:5] = 255
    ours = ConfusionMatrix(21)
    ours.update(target, prediction)
    assert ours.matrix().tolist() == benchmark.plain_confusion(target.numpy(), prediction.numpy(), 21).tolist()


@torch.no_grad()
def test_reference_network_computes_what_ours_does(opts):
    model = benchmark.our_model(opts)
    plain = benchmark.plain_model(opts, model.state_dict())
    image = torch.randint(0, 256, (3, 65, 65), dtype=torch.uint8)
    images = normalize(image[None])
    torch.testing.assert_close(plain(images.contiguous()), model(images), rtol=1e-3, atol=1e-4)
    assert (benchmark.plain_predict(plain, images)[0] == predict_picture(model, image)).float().mean() > 0.999


def test_reference_network_has_plain_convolutions_only(opts, monkeypatch):
    class Fast(nn.Conv2d):
        def forward(self, x):
            raise NotImplementedError

    monkeypatch.setattr(benchmark, "build_model", lambda *args, **kwargs: nn.Sequential(Fast(3, 4, 3, dilation=2)))
    plain = benchmark.plain_model(opts)
    assert type(plain[0]) is nn.Conv2d and plain(torch.rand(1, 3, 9, 9)).shape == (1, 4, 5, 5)


def test_reference_reads_the_pictures_as_ours_does(opts):
    dataset = build_dataset("folder", opts.folder, "val", eval_transform())
    loader = make_loader(dataset, SameSizeBatches(dataset.sizes(), 4), num_workers=0, device=opts.device)
    images, masks = next(iter(loader))
    plain = benchmark.PlainDataset(dataset.images, dataset.masks, None)
    torch.testing.assert_close(normalize(images), torch.stack([plain[index][0] for index in range(4)]))
    assert torch.equal(masks, torch.stack([plain[index][1] for index in range(4)]))


def test_training_batches_like_for_like_are_distributed_alike(opts):
    torch.manual_seed(1)
    ours = list(benchmark.train_loader(opts, batch_size=4, batches=40, workers=0))
    plain = list(benchmark.plain_loader(opts, batches=40, workers=0))
    ours, plain = ([torch.cat(parts) for parts in zip(*batches, strict=True)] for batches in (ours, plain))
    images = normalize(ours[0])
    assert images.shape == plain[0].shape == (160, 3, 33, 33) and images.dtype == plain[0].dtype
    assert ours[1].shape == plain[1].shape == (160, 33, 33) and ours[1].dtype == plain[1].dtype
    assert (images.mean((0, 2, 3)) - plain[0].mean((0, 2, 3))).abs().max() < 0.15
    assert abs((ours[1] == 255).float().mean() - (plain[1] == 255).float().mean()) < 0.05


def test_training_steps_train(opts, monkeypatch):
    model = benchmark.our_model(opts)
    before = [parameter.clone() for parameter in model.parameters()]
    monkeypatch.setattr(benchmark, "our_model", lambda opts: model)
    benchmark.training_step(opts, None)(*benchmark.resident_batch(opts))
    assert model.training
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_floating_point_operations_are_those_of_the_convolution(opts, monkeypatch):
    monkeypatch.setattr(benchmark, "build_model", lambda *args, **kwargs: nn.Conv2d(3, 4, 3, padding=1))
    assert benchmark.forward_flops(opts, 10, 20) == 2 * 10 * 20 * 3 * 4 * 9


def test_cost_as_the_work_grows_is_tabulated(monkeypatch, capsys):
    small = {"IMAGES": (2, 4), "SIDES": (64, 96), "CLASSES": (2, 4), "LOSS_SIDE": 8, "WORKERS": (0,)}
    for name, value in small.items():
        monkeypatch.setattr(scaling, name, value)
    benchmark.main([*TINY, "--scaling"])
    printed = capsys.readouterr().out
    assert [printed.count(f"\n{name:>10}") for name in scaling.TABLES] == [1, 1, 1, 1]
    assert f"\n{96**2:>10}" in printed


def test_growth_is_the_exponent():
    assert scaling.growth((10, {"ms": 3}), 20, "ms", {"ms": 12}) == "2.00"
    assert scaling.growth((10, {"ms": 3}), 20, "ms", {"ms": 3}) == "0.00"
    assert scaling.growth(None, 20, "ms", {"ms": 3}) == scaling.growth((0, {"ms": 3}), 1, "ms", {"ms": 3}) == "-"
