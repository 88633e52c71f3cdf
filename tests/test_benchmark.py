import argparse
import json

import pytest
import torch

from utils.benchmark import __main__ as benchmark
from utils.benchmark import parts

CONTRACT = {"loader", "loader_2_workers", "train_step", "validation", "predict", "confusion_matrix"}
MODEL = "deeplabv3plus_mobilenet_v3_large"
TINY = f"--device cpu --amp off --model {MODEL} --repeats 1 --crop_size 33 --batch_size 4".split()
TINY += "--step_crop_size 33 --step_batch_size 2".split()


@pytest.fixture(autouse=True)
def small_work(monkeypatch):
    for name, value in {"IMAGE_SIZE": (40, 52), "DISTINCT": 8, "MATRIX": 32, "FED_STEPS": 4}.items():
        for module in (benchmark, parts):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


@pytest.fixture
def opts(tmp_path) -> argparse.Namespace:
    opts = benchmark.parse(TINY)
    opts.folder = parts.write_images(tmp_path / "data", 8, num_val=4, size=(40, 52))
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
        assert benchmark.measure(name, opts)["ratio"] > 0


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


def test_training_steps_train(opts, monkeypatch):
    model = parts.our_model(opts)
    before = [parameter.clone() for parameter in model.parameters()]
    monkeypatch.setattr(parts, "our_model", lambda *_, **__: model)
    parts.training_step(opts, None)(*parts.resident_batch(opts))
    assert model.training
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
