import argparse
import math
import os
import warnings
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision import models

import main
from datasets.voc import VOC_CLASSES, voc_colormap
from network import build_model
from tests.conftest import TINY
from utils.errors import InputError
from utils.weights.load import (
    KEYS,
    incompatible_keys,
    init_from,
    load_checkpoint,
    load_file,
    load_model,
    load_model_state,
    require_classes,
)
from utils.weights.published import download_torchvision

MOBILENET = "deeplabv3plus_mobilenet_v3_large"
VOC_WEIGHTS = models.segmentation.DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1


# What is published, written down from there and not from our own model


def published_shapes(head, depth, num_classes):
    """Names and shapes of VainF/DeepLabV3Plus-Pytorch's ResNets, without the counters of batch norms."""
    shapes = {}

    def conv_bn(conv, norm, *shape):
        shapes[f"{conv}.weight"] = shape
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{name}"] = (shape[0],)

    conv_bn("backbone.conv1", "backbone.bn1", 64, 3, 7, 7)
    channels = 64
    for layer, blocks in enumerate((3, 4, {50: 6, 101: 23}[depth], 3), start=1):
        width = 32 * 2**layer
        for block in range(blocks):
            at = f"backbone.layer{layer}.{block}"
            conv_bn(f"{at}.conv1", f"{at}.bn1", width, channels, 1, 1)
            conv_bn(f"{at}.conv2", f"{at}.bn2", width, width, 3, 3)
            conv_bn(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1, 1)
            if block == 0:
                conv_bn(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, channels, 1, 1)
            channels = 4 * width
    aspp, end = ("classifier.aspp", 0) if head == "deeplabv3plus" else ("classifier.classifier.0", 1)
    for branch, size in enumerate((1, 3, 3, 3)):
        conv_bn(f"{aspp}.convs.{branch}.0", f"{aspp}.convs.{branch}.1", 256, 2048, size, size)
    conv_bn(f"{aspp}.convs.4.1", f"{aspp}.convs.4.2", 256, 2048, 1, 1)
    conv_bn(f"{aspp}.project.0", f"{aspp}.project.1", 256, 1280, 1, 1)
    if head == "deeplabv3plus":
        conv_bn("classifier.project.0", "classifier.project.1", 48, 256, 1, 1)
    joined = 304 if head == "deeplabv3plus" else 256
    conv_bn(f"classifier.classifier.{end}", f"classifier.classifier.{end + 1}", 256, joined, 3, 3)
    shapes[f"classifier.classifier.{end + 3}.weight"] = (num_classes, 256, 1, 1)
    shapes[f"classifier.classifier.{end + 3}.bias"] = (num_classes,)
    return shapes


def hollow(shapes):
    """Tensors of these shapes that take one number each in memory and in a file."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def hollow_like(model):
    return hollow({name: value.shape for name, value in model.state_dict().items()})


def on_meta(make, *arguments, **keywords):
    with torch.device("meta"):
        return make(*arguments, **keywords)


def random_weights(shapes):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            state[name] = values * math.sqrt(1 / math.prod(shape[1:]))
        elif name.endswith(("running_var", "weight")):
            state[name] = 0.7 + values.abs() / 2
        else:
            state[name] = values / 10
    return state


def published_forward(state, x, *, head, stride):
    """The logits of the published network (ResNet-50), by its weights alone."""

    def conv_bn(x, conv, norm, *, stride=1, dilation=1, relu=True):
        weight = state[f"{conv}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        x = F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation)
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *(state[f"{norm}.{name}"] for name in names))
        return x.relu() if relu else x

    def resize(x, size):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    size, features = x.shape[-2:], {}
    x = conv_bn(x, "backbone.conv1", "backbone.bn1", stride=2)
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    # Of each layer: stride and dilation of its first block, dilation of the others.
    plans = {16: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)], 8: [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)]}
    for layer, (blocks, plan) in enumerate(zip((3, 4, 6, 3), plans[stride], strict=True), start=1):
        for block in range(blocks):
            at, step = f"backbone.layer{layer}.{block}", plan[0] if block == 0 else 1
            y = conv_bn(x, f"{at}.conv1", f"{at}.bn1")
            y = conv_bn(y, f"{at}.conv2", f"{at}.bn2", stride=step, dilation=plan[1] if block == 0 else plan[2])
            y = conv_bn(y, f"{at}.conv3", f"{at}.bn3", relu=False)
            if block == 0:
                x = conv_bn(x, f"{at}.downsample.0", f"{at}.downsample.1", stride=step, relu=False)
            x = (x + y).relu()
        features[layer] = x
    aspp, end = ("classifier.aspp", 0) if head == "deeplabv3plus" else ("classifier.classifier.0", 1)
    rates = {16: (1, 6, 12, 18), 8: (1, 12, 24, 36)}[stride]
    branches = [conv_bn(x, f"{aspp}.convs.{i}.0", f"{aspp}.convs.{i}.1", dilation=r) for i, r in enumerate(rates)]
    pooled = conv_bn(x.mean(dim=(2, 3), keepdim=True), f"{aspp}.convs.4.1", f"{aspp}.convs.4.2")
    branches.append(pooled.expand_as(branches[0]))
    x = conv_bn(torch.cat(branches, dim=1), f"{aspp}.project.0", f"{aspp}.project.1")
    if head == "deeplabv3plus":
        low = conv_bn(features[1], "classifier.project.0", "classifier.project.1")
        x = torch.cat([low, resize(x, low.shape[-2:])], dim=1)
    x = conv_bn(x, f"classifier.classifier.{end}", f"classifier.classifier.{end + 1}")
    last = f"classifier.classifier.{end + 3}"
    return resize(F.conv2d(x, state[f"{last}.weight"], state[f"{last}.bias"]), size)


def vainf(state, **changes):
    """Such a file's content."""
    content = {"cur_itrs": 30000, "model_state": state, "optimizer_state": {"state": {}, "param_groups": []}}
    return content | {"scheduler_state": {"last_epoch": 30000}, "best_score": np.float64(0.7712)} | changes


def rebuilt(checkpoint, stride=None):
    options = checkpoint["options"]
    stride, count = stride or options["output_stride"], len(checkpoint["class_names"])
    model = build_model(options["model"], num_classes=count, output_stride=stride)
    load_model_state(model, checkpoint, "a.pth")
    return model.eval()


def assert_same_logits(ours, theirs):
    assert theirs.std(dim=(0, 2, 3)).min() > 0.01  # they say something
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(("head", "strides"), [("deeplabv3plus", (16, 8)), ("deeplabv3", (16,))])
def test_file_of_vainf_computes_the_published_networks_logits(tmp_path, head, strides):
    state = random_weights(published_shapes(head, 50, 21))
    torch.save(vainf(state), tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.pth").unlink()
    assert checkpoint["options"] == {"model": f"{head}_resnet50", "output_stride": 16}
    x = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(1))
    for stride in strides:
        with torch.inference_mode():
            theirs = published_forward(state, x, head=head, stride=stride)
            assert_same_logits(rebuilt(checkpoint, stride)(x), theirs)


def test_file_of_torchvisions_reference_scripts_computes_its_logits_at_stride_8(tmp_path):
    torch.manual_seed(0)
    theirs = models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    ).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.pth").unlink()
    assert checkpoint["options"] == {"model": "deeplabv3_resnet50", "output_stride": 8}
    assert checkpoint["published"] == "torchvision"
    assert any("aux_classifier" in note for note in checkpoint["notes"])
    x = torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        assert_same_logits(rebuilt(checkpoint)(x), theirs(x)["out"])


# What a file holds


@pytest.mark.parametrize("num_classes", [21, 19])
@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("head", ["deeplabv3plus", "deeplabv3"])
def test_names_and_shapes_are_those_of_the_model_that_is_inferred(tmp_path, head, depth, num_classes):
    torch.save(vainf(hollow(published_shapes(head, depth, num_classes))), tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert checkpoint["options"]["model"] == f"{head}_resnet{depth}"
    assert len(checkpoint["class_names"]) == num_classes
    model = on_meta(build_model, f"{head}_resnet{depth}", num_classes=num_classes)
    assert not incompatible_keys(model.state_dict(), checkpoint["model_state"])


def test_checkpoint_has_the_keys_of_ours_and_says_that_it_is_published(tmp_path):
    torch.save(vainf(hollow(published_shapes("deeplabv3plus", 50, 21))), tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert checkpoint.keys() == KEYS | {"published", "notes"}
    assert checkpoint["published"] == "VainF/DeepLabV3Plus-Pytorch"
    assert checkpoint["class_names"] == VOC_CLASSES and checkpoint["palette"] == voc_colormap().tolist()
    assert (checkpoint["cur_itrs"], checkpoint["best_score"], checkpoint["scores"]) == (0, -1.0, None)
    notes = " | ".join(checkpoint["notes"])
    assert "deeplabv3plus_resnet50 with 21 classes" in notes and "output stride: using 16 unless" in notes
    assert "0.7712" in notes and "30000" in notes


@pytest.mark.parametrize("aux_loss", [False, True])
def test_torchvisions_resnet_101_is_recognised_with_and_without_its_auxiliary_head(tmp_path, aux_loss):
    make = models.segmentation.deeplabv3_resnet101
    theirs = on_meta(make, weights=None, weights_backbone=None, num_classes=5, aux_loss=aux_loss)
    torch.save(hollow_like(theirs), tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert checkpoint["options"] == {"model": "deeplabv3_resnet101", "output_stride": 8}
    assert any("aux_classifier" in note for note in checkpoint["notes"]) == aux_loss
    model = on_meta(build_model, "deeplabv3_resnet101", num_classes=5)
    assert not incompatible_keys(model.state_dict(), checkpoint["model_state"])


@pytest.mark.parametrize("name", [MOBILENET, "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50"])
def test_bare_weights_of_our_own_are_read(tmp_path, name):
    torch.save(hollow_like(on_meta(build_model, name, num_classes=3)), tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert checkpoint["options"] == {"model": name, "output_stride": 16}
    assert checkpoint["class_names"] == ["class 0", "class 1", "class 2"]
    assert checkpoint["published"] == "bare weights"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "model.module."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state"])
def test_wrappers_and_prefixes_of_wrapped_modules_come_off(tmp_path, wrapper, prefix):
    shapes = published_shapes("deeplabv3", 50, 21)
    state = {prefix + name: value for name, value in hollow(shapes).items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth")["model_state"].keys() == shapes.keys()


def test_safetensors_file_is_read_and_a_damaged_one_is_refused(tmp_path):
    from safetensors.torch import save_file

    state = build_model(MOBILENET, num_classes=3).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    read = load_checkpoint(tmp_path / "a.safetensors")["model_state"]
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:1000])
    with pytest.raises(InputError, match=r"--ckpt .*a\.safetensors: cannot be read"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
@pytest.mark.parametrize("legacy", [False, True])
def test_score_of_numpy_is_read_from_old_files_and_new_ones(tmp_path, legacy, module):
    path, content = tmp_path / "a.pth", vainf(hollow(published_shapes("deeplabv3", 50, 2)))
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    here = np.float64().__reduce__()[0].__module__
    if legacy:
        path.write_bytes(path.read_bytes().replace(here.encode(), module.encode()))
    else:
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name).replace(here.encode(), module.encode()) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, part in parts.items():
                file.writestr(name, part)
    assert module.encode() in path.read_bytes()
    allowed = set(torch.serialization.get_safe_globals())
    assert any("mIoU 0.7712" in note for note in load_checkpoint(path)["notes"])
    assert set(torch.serialization.get_safe_globals()) == allowed


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


PLAIN = [np.bool_(True), *(kind(3) for kind in (np.int8, np.int16, np.int32, np.int64)), np.longlong(-3)]
PLAIN += [*(kind(3) for kind in (np.uint8, np.uint16, np.uint32, np.uint64)), np.float16(0.5), np.float32(0.5)]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("score", [*PLAIN, np.float64(0.5)], ids=lambda score: score.dtype.name)
def test_plain_scalar_of_numpy_becomes_pythons(tmp_path, score, legacy):
    torch.save({"w": torch.zeros(1), "score": score}, tmp_path / "a.pth", **zip_format(not legacy))
    read = load_file(tmp_path / "a.pth", "--ckpt")["score"]
    assert read == score.item() and type(read) is type(score.item())


def scalar(dtype, content):
    """A pickle that calls NumPy's function for scalars."""
    return Call(np.float64().__reduce__()[0], (dtype, content))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "score",
    [
        np.zeros(3),
        np.datetime64("2020-01-01"),
        np.str_("best"),
        np.bytes_(b"best"),
        np.complex64(1),
        np.zeros(1, [("a", "i4")])[0],
        scalar(Call(np.dtype, ("S3",)), b"abc"),
        scalar(np.dtype("O"), [1]),
        scalar(np.dtype("f8"), b"short"),
        scalar(np.dtype("u1"), [1]),
        scalar("f8", bytes(8)),
    ],
    ids="array date text bytes complex record S3 object short list name".split(),
)
def test_nothing_else_of_numpy_is_let_in(tmp_path, score, legacy):
    torch.save(vainf({"w": torch.zeros(1)}, best_score=score), tmp_path / "a.pth", **zip_format(not legacy))
    with pytest.raises(InputError, match=r"a\.pth: holds more than tensors and builtins \(numpy\.[\w.]+\)"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoint_of_torchvisions_reference_script_is_read_with_its_arguments(tmp_path, legacy):
    shapes = published_shapes("deeplabv3", 50, 21)
    theirs = {name.replace("classifier.classifier.", "classifier."): value for name, value in hollow(shapes).items()}
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    main_scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=10, power=0.9)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, main_scheduler], milestones=[5])
    weight.sum().backward()
    optimizer.step()
    schedule.step()
    arguments = argparse.Namespace(model="deeplabv3_resnet50", device="cuda", lr=0.01, aux_loss=True, weights=None)
    content = {
        "model": theirs,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 29,
        "args": arguments,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    torch.save(content, tmp_path / "a.pth", **zip_format(not legacy))
    assert load_file(tmp_path / "a.pth", "--ckpt")["args"] == arguments
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert checkpoint["published"] == "torchvision" and checkpoint["model_state"].keys() == shapes.keys()


def test_lightning_checkpoint_is_read(tmp_path):
    shapes = published_shapes("deeplabv3plus", 50, 21)
    content = {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": value for name, value in hollow(shapes).items()},
        "callbacks": {"ModelCheckpoint{'monitor': 'miou'}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "hyper_parameters": {"lr": np.float32(0.01), "args": argparse.Namespace(classes=21)},
    }
    torch.save(content, tmp_path / "a.ckpt")
    checkpoint = load_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint["options"]["model"] == "deeplabv3plus_resnet50"
    assert checkpoint["model_state"].keys() == shapes.keys()


class Settings(dict):
    """A dictionary of a class of its own, as configuration libraries write."""


ADVICE = r"; where the file came from, save the weights alone: torch\.save\({}\.state_dict\(\), 'weights\.pth'\)$"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 1)), "torch.nn.modules.container.Sequential"),
        (lambda: {"model": torch.nn.Conv2d(1, 1, 1)}, "torch.nn.modules.conv.Conv2d"),
        (lambda: vainf({"w": torch.zeros(1)}, config=Settings(lr=1)), "test_published.Settings"),
        (lambda: {"args": argparse.Namespace(root=Path("data"))}, "PosixPath"),
    ],
    ids=["module", "module inside", "dictionary", "path"],
)
def test_file_of_another_class_is_refused_by_its_name_with_the_line_that_saves_weights(
    tmp_path, content, named, legacy
):
    with warnings.catch_warnings(action="ignore"):  # torch's, on the old format of whole modules
        torch.save(content(), tmp_path / "a.pth", **zip_format(not legacy))
    with pytest.raises(
        InputError, match=rf"a\.pth: .*\([\w.]*{named}\), which could be code{ADVICE.format('model')}"
    ):
        load_checkpoint(tmp_path / "a.pth")


def test_torchscript_is_refused_as_such_with_the_line_that_saves_its_weights(tmp_path):
    with warnings.catch_warnings(action="ignore"):  # torch's, on the end of TorchScript
        torch.jit.script(torch.nn.Linear(2, 1)).save(tmp_path / "a.pt")
    line = ADVICE.format(r"torch\.jit\.load\('model\.pt'\)")
    with pytest.raises(InputError, match=rf"--ckpt .*a\.pt: is a TorchScript archive, which holds code{line}"):
        load_checkpoint(tmp_path / "a.pt")


HIDING_PLACES = {
    "bare": lambda code: code,
    "namespace": lambda code: argparse.Namespace(args=[argparse.Namespace(code=code)]),
    "argument": lambda code: Call(argparse.Namespace, (code,)),
    "attribute": lambda code: Call(argparse.Namespace, (), (None, {"__class__": code})),
    "scalar": lambda code: scalar(np.dtype("f8"), code),
    "type": lambda code: Call(np.dtype, ("f8", False, True), (3, code, None, None, None, -1, -1, 0)),
    "dictionary": lambda code: Settings(code=code),
    "evaluated": lambda code: Call(eval, (f"__import__('os').system({code.call[1][0]!r})",)),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["best_score", "scheduler_state", "model_state"])
@pytest.mark.parametrize("wrap", HIDING_PLACES)
def test_code_in_a_published_file_is_refused_and_does_not_run(tmp_path, place, wrap, legacy):
    code = Call(os.system, (f"touch {tmp_path / 'ran'}",))
    evil = vainf({"w": torch.zeros(1)}, **{place: HIDING_PLACES[wrap](code)})
    torch.save(evil, tmp_path / "a.pth", **zip_format(not legacy))
    with pytest.raises(InputError, match=r"a\.pth: holds more than tensors and builtins"):
        load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def zip_format(on):
    return {"_use_new_zipfile_serialization": on}


# What is refused


def changed(*, drop=(), add=(), **replace):
    shapes = published_shapes("deeplabv3plus", 50, 21)
    kept = {name: shape for name, shape in shapes.items() if not name.startswith(tuple(drop))}
    return hollow(kept | dict.fromkeys(add, (1,)) | replace)


def of_torchvision(make):
    return hollow_like(on_meta(make, weights=None, weights_backbone=None, num_classes=21))


LAST = "classifier.classifier.3.weight"
OTHERS = {
    "MobileNetV2": lambda: changed(drop=["backbone."], add=["backbone.low_level_features.0.0.weight"]),
    "HRNet": lambda: changed(add=["backbone.stage2.0.branches.0.0.conv1.weight"]),
    "Xception": lambda: changed(drop=["backbone.layer"], add=["backbone.block1.rep.0.conv1.weight"]),
    "segmentation_models_pytorch": lambda: changed(
        drop=["backbone", "classifier"], add=["encoder.conv1.weight", "segmentation_head.0.weight"]
    ),
    "torchvision's FCN": lambda: of_torchvision(models.segmentation.fcn_resnet50),
    "torchvision's LRASPP": lambda: of_torchvision(models.segmentation.lraspp_mobilenet_v3_large),
    "MobileNetV3": lambda: of_torchvision(models.segmentation.deeplabv3_mobilenet_v3_large),
    "for --backbone_weights": lambda: hollow_like(on_meta(models.resnet50)),
    "backbone.conv1.0.weight": lambda: {"backbone.conv1.0.weight": torch.zeros(1)} | changed(drop=["backbone.conv1"]),
    "no model here has": lambda: changed(add=[f"backbone.layer3.{block}.conv1.weight" for block in range(36)]),
    "w..., 1 in all": lambda: {"w": torch.zeros(1)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_model_of_another_kind_is_refused_by_what_it_is(tmp_path, what):
    torch.save(vainf(OTHERS[what]()), tmp_path / "a.pth")
    with pytest.raises(InputError, match=rf"--ckpt .*a\.pth: .*{what}.*give DeepLabV3 or V3") as error:
        load_checkpoint(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", [changed(drop=[LAST]), changed(**{LAST: (256, 256, 1, 1)})])
def test_number_of_classes_must_be_told_and_fit_into_ids(tmp_path, state):
    torch.save(state, tmp_path / "a.pth")
    fault = r"a\.pth: classifier.classifier.3.weight (has shape|is missing).*1 to 255 classes"
    with pytest.raises(InputError, match=fault):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [{}, {"model_state": {}}, {"epoch": 3}, {3: torch.zeros(1)}, {"model": [1]}])
def test_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"--ckpt .*a\.pth: holds no state dict"):
        load_checkpoint(tmp_path / "a.pth")


def test_wide_resnet_is_refused_by_the_first_shape_that_does_not_fit(tmp_path):
    torch.save(changed(**{"backbone.layer1.0.conv1.weight": (128, 64, 1, 1)}), tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    model = on_meta(build_model, "deeplabv3plus_resnet50", num_classes=21)
    fault = r"layer1.0.conv1.weight: shape \[128, 64, 1, 1\] instead of \[64, 64, 1, 1\]; 1 such"
    with pytest.raises(InputError, match=fault):
        load_model_state(model, checkpoint, "a.pth")


def test_classes_without_names_must_be_as_many_as_the_data_sets():
    require_classes(["class 0", "class 1"], ["sky", "road"], "a.pth")
    with pytest.raises(InputError, match=r"on 2 classes \(names unknown\), but the data set has 1 \(sky\)"):
        require_classes(["class 0", "class 1"], ["sky"], "a.pth")
    with pytest.raises(InputError, match=r"on 21 classes \(background, .*but the data set has 21 \(class"):
        require_classes(VOC_CLASSES, [f"class {index}" for index in range(21)], "a.pth")


# --ckpt torchvision


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return tmp_path / "hub/checkpoints"


@pytest.mark.parametrize("model", [None, "deeplabv3_resnet50", "deeplabv3_resnet101"])
def test_torchvision_is_read_from_its_cache(cache, model):
    name = model or "deeplabv3_resnet50"
    make = models.get_model_builder(name)
    theirs = on_meta(make, weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    weights = models.get_model_weights(name).COCO_WITH_VOC_LABELS_V1
    torch.save(hollow_like(theirs), cache / Path(weights.url).name)
    checkpoint = load_checkpoint("torchvision", model=model)
    assert checkpoint["options"] == {"model": name, "output_stride": 8}
    assert checkpoint["published"] == "torchvision" and checkpoint["class_names"] == VOC_CLASSES


def test_weights_of_torchvision_are_asked_for_by_address_and_hash(monkeypatch):
    asked = {}

    def serve(url, **keywords):
        asked.update(url=url, **keywords)
        return of_torchvision(models.segmentation.deeplabv3_resnet50)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", serve)
    download_torchvision()
    assert asked["url"] == VOC_WEIGHTS.url and asked["check_hash"] is True


def test_failed_download_names_the_address_and_where_the_file_belongs(cache, monkeypatch):
    def unreachable(*arguments, **keywords):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(InputError) as error:
        load_checkpoint("torchvision")
    for part in ("--ckpt torchvision: ", VOC_WEIGHTS.url, "no route to host", f"put the file into {cache}"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short"])
def test_damaged_file_of_torchvision_is_named_for_deletion(cache, content):
    path = cache / Path(VOC_WEIGHTS.url).name
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"--ckpt torchvision: .*{path.name} is damaged; delete it"):
        load_checkpoint("torchvision")


@pytest.mark.parametrize("model", ["deeplabv3plus_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_torchvision_has_two_models(model):
    with pytest.raises(InputError, match=rf"has no {model}; give --model deeplabv3_resnet50 or deeplabv3_resnet101"):
        load_checkpoint("torchvision", model=model)


# --init_from


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(1)
    return build_model(MOBILENET, num_classes=4)


def test_all_but_the_last_layer_is_taken_where_only_the_classes_differ(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = build_model(MOBILENET, num_classes=6)
    before, theirs = {name: value.clone() for name, value in model.state_dict().items()}, source.state_dict()
    lines = init_from(model, tmp_path / "a.pth")
    last = ["classifier.classifier.3.weight", "classifier.classifier.3.bias"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in last else theirs[name]), name
    total = len(before)
    assert f"{total - 2} of the model's {total} tensors loaded, 2 of the file's not used" in lines[0]
    assert [line for line in lines if "random init" in line] == [
        f"random initialisation: {last[0]} (shape [4, 256, 1, 1] instead of [6, 256, 1, 1])",
        f"random initialisation: {last[1]} (shape [4] instead of [6])",
    ]


def test_another_head_is_left_at_random_name_by_name(tmp_path):
    shapes = published_shapes("deeplabv3", 50, 21)
    torch.save(vainf(hollow(shapes)), tmp_path / "a.pth")
    model = build_model("deeplabv3plus_resnet50", num_classes=21)
    lines = init_from(model, tmp_path / "a.pth")
    assert all(not value.any() for name, value in model.backbone.state_dict().items() if "tracked" not in name)
    assert model.classifier.aspp.project[0].weight.any()
    taken = sum(name.startswith("backbone.") for name in shapes)
    assert f"{taken} of the model's {len(model.state_dict())} tensors" in lines[0]
    assert f"{len(shapes) - taken} of the" in lines[0]
    assert len(lines) == 1 + len(model.classifier.state_dict()) - 8  # without the counters of its batch norms
    random = {line.split()[2] for line in lines if line.startswith("random initialisation")}
    head = {f"classifier.{name}" for name in model.classifier.state_dict() if "tracked" not in name}
    assert random == head and any(line.endswith("classifier.aspp.project.0.weight (missing)") for line in lines)


def test_file_without_the_counters_of_batch_norms_lacks_nothing(tmp_path, source):
    state = {name: value for name, value in source.state_dict().items() if "tracked" not in name}
    torch.save(state, tmp_path / "a.pth")
    lines = init_from(build_model(MOBILENET, num_classes=4), tmp_path / "a.pth")
    assert not any("random init" in line for line in lines) and f"{len(state)} of" in lines[0]
    load_model_state(build_model(MOBILENET, num_classes=4), load_checkpoint(tmp_path / "a.pth"), "a.pth")


def test_checkpoint_of_another_backbone_is_refused_and_the_model_stays(tmp_path):
    torch.save(hollow(published_shapes("deeplabv3plus", 50, 4)), tmp_path / "a.pth")
    model = build_model(MOBILENET, num_classes=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"--init_from .*a\.pth: this is deeplabv3plus_resnet50, and no tensor fits"):
        init_from(model, tmp_path / "a.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match=r"--init_from .*gone\.pth: no such file"):
        init_from(model, tmp_path / "gone.pth")


def test_init_from_torchvision_takes_the_depth_of_the_model(cache):
    model = build_model("deeplabv3plus_resnet101", num_classes=3)
    with pytest.raises(InputError, match=r"--init_from torchvision: .*resnet101.* is damaged"):
        (cache / Path(models.get_model_weights("deeplabv3_resnet101").DEFAULT.url).name).write_bytes(b"")
        init_from(model, "torchvision")


# Through the rest


def test_prediction_takes_a_published_file(tmp_path):
    torch.save(vainf(hollow(published_shapes("deeplabv3plus", 50, 19))), tmp_path / "a.pth")
    trained = load_model(tmp_path / "a.pth", torch.device("cpu"))
    assert len(trained.class_names) == 19 and trained.options["output_stride"] == 16
    with torch.inference_mode():
        assert trained.model(torch.zeros(1, 3, 33, 33)).shape == (1, 19, 33, 33)


# --- on the command line ---


@pytest.fixture
def start(folder, tmp_path, capsys):
    def run(*arguments):
        data = ["--dataset", "folder", "--data_root", folder, "--run_dir", tmp_path / "runs", "--run_name", "a"]
        scores = main.main([*map(str, data), *TINY[2:], *map(str, arguments)])  # without --model
        return scores, capsys.readouterr().out

    return run


@pytest.fixture
def refused(start, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            start(*arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        return line

    return run


@pytest.fixture
def published(tmp_path):
    """Weights of four classes without their names, as VainF's script saves them."""
    torch.manual_seed(0)
    state = build_model(MOBILENET, num_classes=4).state_dict()
    torch.save(vainf(state, best_score=np.float64(0.5)), tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


def test_published_file_is_scored_and_trained_from_but_not_gone_on_from(start, refused, published, tmp_path):
    scores, out = start("--test_only", "--ckpt", published)
    assert "VainF/DeepLabV3Plus-Pytorch: " in out and "without names: the data set must have the same number" in out
    assert "the file does not state its output stride: using 16" in out and 0 <= scores["Mean IoU"] <= 1
    assert (tmp_path / "runs/a/test_val/card.json").is_file()
    line = refused("--continue_training", "--ckpt", published)
    assert f"--ckpt {published}: has only weights (VainF/DeepLabV3Plus-Pytorch)" in line and "leave" in line
    assert "contradicts" in refused("--ckpt", published, "--model", "deeplabv3_resnet50")
    _, out = start("--ckpt", published, "--total_itrs", 1, "--lr", 0)
    ours = torch.load(tmp_path / "runs/a/latest.pth", weights_only=True)
    first = torch.load(published, weights_only=False)["model_state"]
    assert torch.equal(ours["model_state"]["classifier.classifier.3.weight"], first["classifier.classifier.3.weight"])


def test_init_from_on_other_classes_lists_what_it_leaves_at_random(start, refused, published, folder, tmp_path):
    (folder / "class_names.txt").write_text("sky\nroad\ntree\ncar\nboat\n")
    assert "was trained on 4 classes" in refused("--ckpt", published)
    flags = ("--model", MOBILENET, "--total_itrs", 1, "--lr", 0, "--allow_absent")
    _, out = start("--init_from", published, *flags)
    assert "classifier.classifier.3.weight" in out and "[4, 256, 1, 1]" in out and "[5, 256, 1, 1]" in out
    ours = torch.load(tmp_path / "runs/a/latest.pth", weights_only=True)["model_state"]
    first = torch.load(published, weights_only=False)["model_state"]
    assert torch.equal(ours["backbone.0.0.weight"], first["backbone.0.0.weight"])
    assert ours["classifier.classifier.3.weight"].shape == (5, 256, 1, 1)
    for more in (["--ckpt", published], ["--test_only"]):
        assert "--init_from: starts a training" in refused("--init_from", published, *more)
    assert "no such file" in refused("--init_from", tmp_path / "none.pth", *flags, "--run_name", "b")
    assert not (tmp_path / "runs/b").exists()
