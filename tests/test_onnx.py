import contextlib
import copy
import errno
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import main
from datasets.voc import voc_colormap
from network import build_model
from utils.errors import InputError
from utils.weights import onnx as export
from utils.weights.onnx import export_onnx, smooth_images

CLASSES = ["sky", "road", "träd", "car", "dog", "cat", "bus", "sign", "wall", "roof", "door", "boat"]


def lively(name, *, output_stride=16):
    """Random weights, but batch norms that know their data: the class map has structure and few ties."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=len(CLASSES), output_stride=output_stride)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None  # the mean over all passes
    classifier = model.classifier.classifier[-1]
    with torch.no_grad():
        for seed in range(2):
            model(smooth_images(2, 65, 81, seed=100 + seed))
        logits = copy.deepcopy(model).eval()(smooth_images(2, 129, 97, seed=102))
        std, mean = torch.std_mean(logits, dim=(0, 2, 3))  # so that each class wins somewhere
        classifier.weight /= std[:, None, None, None]
        classifier.bias.copy_((classifier.bias - mean) / std)
    return model


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits, classes = session.run(["logits", "classes"], {"image": images.numpy()})
    return torch.from_numpy(logits), torch.from_numpy(classes)


def assert_computes_the_same(path, model, size, *, seed):
    images = smooth_images(*size, seed=seed)
    with torch.inference_mode():
        expected = copy.deepcopy(model).eval()(images)
    logits, classes = run(path, images)
    assert logits.dtype == torch.float32 and classes.dtype == torch.uint8
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(classes, logits.argmax(dim=1))
    return classes


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file of a model that is in training mode, the model, the lines that it printed, the result, and
    the model's state before."""
    path, model, printed = tmp_path_factory.mktemp("onnx") / "model.onnx", lively(NAME), io.StringIO()
    about, before = {"model": NAME, "output_stride": "16"}, copy.deepcopy(model.state_dict())
    with contextlib.redirect_stdout(printed):
        result = export_onnx(model, path, class_names=CLASSES, palette=voc_colormap(), about=about, opset=20)
    return path, model, printed.getvalue().splitlines(), result, before


NAME = "deeplabv3plus_mobilenet_v3_large"


@pytest.fixture
def as_if_exported(exported, monkeypatch):
    """`export_onnx` of another model, to which the exporter gives the content of the file that is there."""
    content = exported[0].read_bytes()

    def attempt(model, path, *, content=content):
        monkeypatch.setattr(export, "_serialized", lambda *_, **__: content)
        return export_onnx(model, path, class_names=CLASSES, palette=voc_colormap())

    return attempt


def assert_refused_and_kept(folder, attempt, *words):
    path = folder / "model.onnx"
    path.write_bytes(b"before")
    with pytest.raises(InputError) as refusal:
        attempt(path)
    assert "\n" not in str(refusal.value)
    for word in (str(path), *words):
        assert word in str(refusal.value)
    assert [file.name for file in folder.iterdir()] == ["model.onnx"] and path.read_bytes() == b"before"


# The file


# Sizes and batches that the check does not use; at the smaller ones most of each atrous kernel meets padding.
@pytest.mark.parametrize("size", [(3, 65, 97), (1, 224, 90), (4, 33, 17), (1, 1, 1), (1, 300, 301)])
def test_file_computes_what_the_model_computes_at_any_size_and_batch(exported, size):
    path, model, *_ = exported
    classes = assert_computes_the_same(path, model, size, seed=50)
    assert max(size) < 200 or len(classes.unique()) >= 3, "a picture of one class shows little"


def test_check_and_result_say_how_far_the_file_agrees(exported):
    path, _, lines, result, _ = exported
    assert 0.999 <= result <= 1
    for line, shape in zip(lines, ("2 x 3 x 129 x 161", "1 x 3 x 256 x 256", "1 x 3 x 97 x 130"), strict=False):
        assert line.startswith(f"{shape}: ") and "% of the class map" in line
    assert len(lines) == 4 and str(path) in lines[3] and "opset 20" in lines[3]


def test_inputs_and_outputs_have_names_types_and_free_sizes(exported):
    session = onnxruntime.InferenceSession(str(exported[0]), providers=["CPUExecutionProvider"])
    found = [(value.name, value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())]
    assert found == [
        ("image", "tensor(uint8)", ["batch", 3, "height", "width"]),
        ("logits", "tensor(float)", ["batch", 12, "height", "width"]),
        ("classes", "tensor(uint8)", ["batch", "height", "width"]),
    ]


def test_metadata_tell_classes_colours_and_what_the_caller_says(exported):
    session = onnxruntime.InferenceSession(str(exported[0]), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata.pop("class_names")) == CLASSES
    assert json.loads(metadata.pop("palette")) == voc_colormap()[:12].tolist()
    assert metadata == {"model": NAME, "output_stride": "16"}


def test_one_valid_file_of_the_opset_without_paths_of_this_machine(exported):
    path = exported[0]
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == 20
    del proto.graph.initializer[:]  # any letters can be in weights
    assert b".py" not in proto.SerializeToString()


def test_model_itself_is_left_alone(exported):
    _, model, _, _, before = exported
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_resnet_at_output_stride_8_is_exported_too_and_replaces_what_was_there(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(export, "CHECKED_SIZES", ((1, 40, 33),))  # it takes seconds
    path, model = tmp_path / "resnet.onnx", lively("deeplabv3_resnet50", output_stride=8).eval()
    path.write_bytes(b"before")
    export_onnx(model, path, class_names=CLASSES, palette=voc_colormap())
    assert [file.name for file in tmp_path.iterdir()] == ["resnet.onnx"]
    assert len(assert_computes_the_same(path, model, (2, 60, 75), seed=51).unique()) >= 2
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 2 and err == "", "lines that are not ours"


# What is refused after the export


def test_another_class_map_is_refused(exported, as_if_exported, tmp_path):
    model = copy.deepcopy(exported[1])
    with torch.no_grad():
        model.classifier.classifier[-1].weight[[0, 1]] = model.classifier.classifier[-1].weight[[1, 0]]
    assert_refused_and_kept(tmp_path, lambda path: as_if_exported(model, path), "99.9%", "of the class map")


def test_a_class_map_that_differs_in_a_few_pixels_of_a_thousand_is_refused(exported, tmp_path, monkeypatch):
    _, model, *_ = exported
    session = onnxruntime.InferenceSession

    class Flawed:
        def __init__(self, *arguments, **options):
            self.session = session(*arguments, **options)

        def run(self, *arguments):
            logits, classes = self.session.run(*arguments)
            classes = classes.copy()
            classes.flat[: round(classes.size * wrong)] ^= 1
            return logits, classes

    monkeypatch.setattr(onnxruntime, "InferenceSession", Flawed)
    reference = copy.deepcopy(model).eval()
    wrong = 0.0008
    assert 0.999 <= export.check(exported[0], reference) < 0.9995
    wrong = 0.0012
    with pytest.raises(InputError, match="99.8"):
        export.check(exported[0], reference)


def test_other_logits_are_refused_though_the_class_map_is_the_same(exported, as_if_exported, tmp_path):
    model = copy.deepcopy(exported[1])
    with torch.no_grad():
        model.classifier.classifier[-1].bias += 3
    assert_refused_and_kept(tmp_path, lambda path: as_if_exported(model, path), "100.000%", "logits off")


def test_a_model_of_no_numbers_is_refused_though_its_class_map_is_the_same(exported, as_if_exported, tmp_path):
    model, proto = copy.deepcopy(exported[1]), onnx.load(exported[0])
    with torch.no_grad():
        model.classifier.classifier[-1].bias.fill_(float("nan"))
    (bias,) = (value for value in proto.graph.initializer if value.name == "model.classifier.classifier.3.bias")
    bias.raw_data = np.full(len(CLASSES), np.nan, np.float32).tobytes()
    content = proto.SerializeToString()
    assert_refused_and_kept(
        tmp_path, lambda path: as_if_exported(model, path, content=content), "100.000%", "off by nan"
    )


def test_fixed_sizes_are_refused(exported, as_if_exported, tmp_path):
    proto = onnx.load(exported[0])
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 129
    assert_refused_and_kept(
        tmp_path,
        lambda path: as_if_exported(exported[1], path, content=proto.SerializeToString()),
        "nothing was written",
    )


def test_warnings_of_onnxruntime_are_not_shown(exported, as_if_exported, tmp_path, capfd):
    proto = onnx.load(exported[0])
    proto.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 129  # untrue, but that alone changes nothing
    as_if_exported(exported[1], tmp_path / "model.onnx", content=proto.SerializeToString())
    assert capfd.readouterr().err == ""


def test_what_onnxruntime_does_not_load_is_refused(exported, as_if_exported, tmp_path, capfd):
    assert_refused_and_kept(
        tmp_path, lambda path: as_if_exported(exported[1], path, content=b"none"), "nothing was written"
    )
    assert capfd.readouterr() == ("", "")


def test_an_exporter_that_fails_is_told_in_one_line_and_what_it_says_is_not_shown(
    exported, tmp_path, monkeypatch, capfd
):
    handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger("noise")
    monkeypatch.setattr(logger, "handlers", [handler])

    def noisy(*_, **__):
        print("[torch.onnx] Obtain model graph...")
        print("more", file=sys.stderr)
        logger.error("and more")
        warnings.warn("deprecated", stacklevel=1)
        raise RuntimeError("Failed to export\n# long report") from ValueError("\nunsupported: aten.x\nsee there")

    monkeypatch.setattr(torch.onnx, "export", noisy)

    def attempt(path):
        with warnings.catch_warnings(action="error"):
            export_onnx(exported[1], path, class_names=CLASSES, palette=voc_colormap())

    assert_refused_and_kept(tmp_path, attempt, "(unsupported: aten.x)", "--export_opset")
    assert capfd.readouterr() == ("", "")
    logger.error("heard again")
    assert "heard again" in capfd.readouterr().err


def test_a_full_disk_is_told_and_leaves_the_file_that_was_there(exported, as_if_exported, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(self, content):
        if self.suffix == ".tmp":
            write(self, content[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert_refused_and_kept(tmp_path, lambda path: as_if_exported(exported[1], path), "No space left on device")


# What is refused before it


@pytest.fixture
def refuse(monkeypatch):
    """Expects a refusal before any work."""

    def no_work(*_, **__):
        raise AssertionError("it begins to work")

    monkeypatch.setattr(export, "_serialized", no_work)
    monkeypatch.setattr(copy, "deepcopy", no_work)

    def expect(path, *words, **options):
        with pytest.raises(InputError) as refusal:
            export_onnx(nn.Identity(), path, class_names=CLASSES, palette=np.zeros((256, 3), np.uint8), **options)
        assert "\n" not in str(refusal.value)
        for word in words:
            assert word in str(refusal.value)

    return expect


@pytest.mark.parametrize("opset", [-1, 17, 24])
def test_an_opset_that_is_not_supported_is_refused(refuse, tmp_path, opset):
    refuse(tmp_path / "model.onnx", f"--export_opset {opset}", "18 to 23", opset=opset)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.pth", "must end in .onnx"),
        ("model", "must end in .onnx"),
        ("folder.onnx", "this is a folder"),
        ("nowhere/model.onnx", "cannot be written (No such file"),
        ("file/model.onnx", "cannot be written (Not a directory"),
        ("m" * 300 + ".onnx", "cannot be written (File name too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(refuse, tmp_path, name, word):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    refuse(tmp_path / name, f"--export {tmp_path / name}", word)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.onnx"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(refuse, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    refuse(tmp_path / "model.onnx", f"{package} is missing;", "pip install onnx onnxscript onnxruntime")
    assert not list(tmp_path.iterdir())


def test_command_line_exports_a_checkpoint_without_any_data(tmp_path, capfd):
    torch.manual_seed(0)
    torch.save(lively(NAME).state_dict(), tmp_path / "a.pth")
    target = tmp_path / "a.onnx"
    assert main.main(["--ckpt", str(tmp_path / "a.pth"), "--export", str(target)]) == {}
    out = capfd.readouterr().out
    assert "129 x 161" in out and "%" in out
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    assert len(names) == len(CLASSES) and names == [f"class {index}" for index in range(len(names))]
    there = sorted(tmp_path.iterdir())
    for arguments, words in (
        ([], "--export: needs --ckpt"),
        (["--ckpt", tmp_path / "none.pth"], "no such file"),
        (["--ckpt", tmp_path / "a.pth", "--test_only"], "excludes --test_only"),
        (["--ckpt", tmp_path / "a.pth", "--export_opset", "11"], "--export_opset 11: not supported; choose 18 to 23"),
        (["--ckpt", tmp_path / "a.onnx"], "is not a checkpoint"),
    ):
        with pytest.raises(SystemExit) as stop:
            main.main([*map(str, arguments), "--export", str(tmp_path / "b.onnx")])
        (line,) = capfd.readouterr().err.splitlines()
        assert stop.value.code == 2 and words in line
    assert sorted(tmp_path.iterdir()) == there
