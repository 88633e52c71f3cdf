import math
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import models

from network import build_model
from utils.errors import InputError
from utils.weights.load import load_backbone


def with_backbone(name, source):
    model = build_model(name, num_classes=3)
    load_backbone(model, name, str(source))
    return model


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 31)])
@pytest.mark.parametrize(
    ("name", "stride", "low", "out"),
    [
        ("resnet50", 16, 256, 2048),
        ("resnet50", 8, 256, 2048),
        ("resnet101", 16, 256, 2048),
        ("mobilenet_v3_large", 16, 24, 960),
    ],
)
def test_features_are_tapped_at_stride_4_and_at_the_output_stride(name, stride, low, out, size):
    backbone = build_model(f"deeplabv3_{name}", num_classes=2, output_stride=stride).backbone.eval()
    with torch.inference_mode():
        features = backbone(torch.randn(1, 3, *size))
    assert features["low_level"].shape == (1, low, *(math.ceil(side / 4) for side in size))
    assert features["out"].shape == (1, out, *(math.ceil(side / stride) for side in size))


def test_mobilenet_refuses_output_stride_8():
    with pytest.raises(InputError, match="--output_stride 8: MobileNetV3 supports 16 only"):
        build_model("deeplabv3_mobilenet_v3_large", num_classes=2, output_stride=8)


@pytest.mark.parametrize(("name", "head"), [("resnet50", "fc"), ("mobilenet_v3_large", "classifier")])
def test_backbone_file_is_loaded_whatever_its_number_of_classes(tmp_path, name, head):
    network = models.get_model(name, num_classes=7)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = with_backbone(f"deeplabv3plus_{name}", tmp_path / "w.pth")
    ours, theirs = model.backbone.state_dict(), network.state_dict()
    prefix = "features." if name.startswith("mobilenet") else ""
    assert ours and all(torch.equal(value, theirs[prefix + key]) for key, value in ours.items())


@pytest.mark.parametrize("damage", ["missing", "shape", "unknown"])
def test_backbone_file_of_another_network_is_refused(tmp_path, damage):
    state = models.resnet50().state_dict()
    if damage == "missing":
        del state["layer1.0.conv1.weight"]
    elif damage == "shape":
        state["layer1.0.conv1.weight"] = torch.zeros(1)
    else:
        state["layer9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth: not weights of resnet50 \(layer"):
        with_backbone("deeplabv3_resnet50", tmp_path / "w.pth")


def published(name):
    """A state dict as the files of torchvision's first ImageNet weights have it: without batch norms' counters."""
    state = models.get_model(name).state_dict()
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("mobilenet_v3_large", how) for how in ("state_dict", "model", "module.", "safetensors", "DeepLab")),
        ("resnet50", "DeepLab"),
        ("resnet50", "safetensors"),
    ],
)
def test_weights_are_found_in_the_usual_wrappers(tmp_path, name, how):
    from safetensors.torch import save_file

    inside = "features." if name.startswith("mobilenet") else ""
    state, path = (
        models.get_model(name).state_dict(),
        tmp_path / ("w.safetensors" if how == "safetensors" else "w.pth"),
    )
    if how == "safetensors":
        save_file(state, path)
    elif how == "module.":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    elif how == "DeepLab":
        deeplab = build_model(f"deeplabv3plus_{name}", num_classes=2).state_dict()
        torch.save({"model_state": deeplab, "best_score": np.float64(0.5)}, path)
        state = {inside + key.removeprefix("backbone."): value for key, value in deeplab.items()}
    else:
        torch.save({how: state, "epoch": 3}, path)
    ours = with_backbone(f"deeplabv3_{name}", path).backbone.state_dict()
    assert ours and all(torch.equal(value, state[inside + key]) for key, value in ours.items())


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ("resnext50_32x4d", r"layer1\.0\.conv1\.weight: shape \[128, 64, 1, 1\] instead of \[64, 64, 1, 1\]"),
        ("wide_resnet50_2", r"layer1\.0\.conv1\.weight: shape \[128, 64, 1, 1\] instead of \[64, 64, 1, 1\]"),
        ("resnet101", r"layer3\.6\.conv1\.weight: unexpected"),
        ("resnet34", r"layer1\.0\.conv1\.weight: shape"),
        ("resnet50d", r"conv1\.weight: missing"),
    ],
)
def test_relatives_of_resnet_50_are_refused_by_what_differs(tmp_path, other, fault):
    with torch.device("meta"):
        state = models.get_model("resnet50" if other == "resnet50d" else other).state_dict()
    state = {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}
    if other == "resnet50d":  # timm's deep stem
        state = {"conv1.0.weight" if name == "conv1.weight" else name: value for name, value in state.items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"w\.pth: not weights of resnet50 \({fault}") as error:
        with_backbone("deeplabv3_resnet50", tmp_path / "w.pth")
    assert "\n" not in str(error.value)


def test_file_of_anything_else_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"--backbone_weights .*w\.pth: holds no state dict, its 'epoch' is not a plain"
    ):
        with_backbone("deeplabv3_resnet50", tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_large"])
def test_files_older_than_the_counters_of_batch_norm_are_loaded(tmp_path, name):
    torch.save(published(name), tmp_path / "w.pth")
    with_backbone(f"deeplabv3_{name}", tmp_path / "w.pth")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short"])
def test_damaged_file_in_the_cache_is_named_for_deletion(tmp_path, monkeypatch, content):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / Path(models.ResNet50_Weights.IMAGENET1K_V1.url).name
    cached.parent.mkdir()
    cached.write_bytes(content)
    with pytest.raises(InputError, match=rf"{cached.name} is damaged; delete it"):
        with_backbone("deeplabv3_resnet50", "imagenet")


def test_missing_backbone_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--backbone_weights .*w\.pth: no such file"):
        with_backbone("deeplabv3_resnet50", tmp_path / "w.pth")


def test_failed_imagenet_download_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))

    def unreachable(*arguments, **keywords):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(InputError, match=r"imagenet: https://.*resnet50.*no route to host.*--backbone_weights FILE"):
        with_backbone("deeplabv3_resnet50", "imagenet")


def test_imagenet_weights_are_asked_for_by_address_and_hash(monkeypatch):
    asked = {}

    def serve(url, **keywords):
        asked.update(url=url, **keywords)
        return published("resnet50")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", serve)
    with_backbone("deeplabv3_resnet50", "imagenet")
    assert asked["url"] == models.ResNet50_Weights.IMAGENET1K_V1.url and asked["check_hash"] is True
