from itertools import pairwise

import pytest
import torch
from torch import nn

from network import build_model, fast
from utils.benchmark import memory
from utils.loss import LOSSES

MIB = 2**20
SIDE = 513  # an image of 21 classes is a piece of its own in the loss


class OneLayer(nn.Conv2d):
    """A network of one convolution that takes uint8 images."""

    def forward(self, images):
        return super().forward(images.float())


@pytest.fixture
def one_layer(monkeypatch):
    """Replaces the network by a 1x1 convolution, whose memory is known: `count(*flags)`, 21 classes by default."""
    monkeypatch.setattr(memory, "build_model", lambda *_, num_classes, **__: OneLayer(3, num_classes, 1))

    def count(*flags, amp=None):
        return memory.peak_of_step(memory.parse(["--crop_size", str(SIDE), *map(str, flags)]), amp)

    return count


def test_weights_gradients_and_momentum_are_the_parameters_of_a_network_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(fast, "conv_before_upsampling", None)  # for CPUs only
    flags = "--model deeplabv3plus_mobilenet_v3_large --crop_size 65 --batch_size 1 --freeze_bn"
    peak = memory.peak_of_step(memory.parse(flags.split()), None)
    model = build_model("deeplabv3plus_mobilenet_v3_large", num_classes=21)
    parameters = sum(weight.nbytes for weight in model.parameters()) / MIB
    buffers = sum(buffer.nbytes for buffer in model.buffers()) / MIB
    assert peak["weights"] == pytest.approx(parameters + buffers, abs=0.1)
    assert peak["momentum"] == pytest.approx(parameters, abs=0.1)
    assert peak["gradients"] == pytest.approx(parameters, rel=0.05)  # small images: most are there at the peak
    assert peak["total"] == pytest.approx(sum(peak[name] for name in memory.KINDS if name != "total"))


def test_flags_decide_the_network(monkeypatch):
    asked = []

    def build(name, **flags):
        asked.append((name, flags))
        return OneLayer(3, flags["num_classes"], SIDE, padding=SIDE // 2)

    monkeypatch.setattr(memory, "build_model", build)
    flags = f"--crop_size {SIDE} --model deeplabv3_resnet50 --output_stride 8 --dataset shapes"
    peak = memory.peak_of_step(memory.parse(flags.split()), None)
    assert asked == [("deeplabv3_resnet50", {"num_classes": 7, "output_stride": 8})]
    assert peak["gradients"] == 0  # at the peak, before the backward pass, those of the step before are gone
    assert peak["momentum"] > 0
    assert memory.peak_of_step(memory.parse([*flags.split(), "--momentum", "0"]), None)["momentum"] == 0


@pytest.mark.parametrize(("batch", "classes"), [(4, 21), (8, 21), (4, 150)])
def test_pixels_take_what_they_take(one_layer, batch, classes):
    peak = one_layer("--batch_size", batch, "--num_classes", classes)
    logits, ids = batch * classes * SIDE**2 * 4 / MIB, batch * SIDE**2 * 8 / MIB
    image = batch * 3 * SIDE**2 * 4 / MIB
    # Logits and log-probabilities, the image for the gradient of the weights, and the class ids as the loss has them.
    assert peak["total"] == pytest.approx(2 * logits + image + ids, rel=0.1)


def test_half_precision_halves_the_features(one_layer, monkeypatch):
    widths = [3, 64, 64, 64, 2]

    def build(*_, **__):
        layers = [nn.Conv2d(*channels, 1) for channels in pairwise(widths)]
        return nn.Sequential(OneLayer(*widths[:2], 1), *layers[1:])

    monkeypatch.setattr(memory, "build_model", build)
    half, full = (one_layer("--batch_size", 8, amp=amp)["total"] for amp in (torch.bfloat16, None))
    assert 0.5 <= half / full < 0.6  # the logits, of two classes, stay in float32


def test_parts_take_what_a_smaller_batch_takes(one_layer):
    whole = one_layer("--batch_size", 8)["total"]
    quarter = one_layer("--batch_size", 2)["total"]
    assert one_layer("--batch_size", 8, "--grad_accum", 4)["total"] == pytest.approx(quarter, rel=0.01)
    assert quarter == pytest.approx(whole / 4, rel=0.1)


def test_every_loss_takes_its_own(one_layer):
    totals = {loss: one_layer("--batch_size", 4, "--loss_type", loss)["total"] for loss in LOSSES}
    logits = 4 * 21 * SIDE**2 * 4 / MIB
    assert min(totals.values()) == totals["cross_entropy"] > 2 * logits
    assert totals["dice_cross_entropy"] > totals["cross_entropy"] + logits / 2
    assert totals["lovasz_softmax"] > totals["cross_entropy"] + logits / 2
    weighted = one_layer("--batch_size", 4, "--class_weights", "inverse")["total"]
    assert weighted > totals["cross_entropy"]


def test_a_table_is_printed_and_real_tensors_stay_real(one_layer, capsys):
    memory.main(["--crop_size", "257", "--batch_size", "2"])
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith(
        "deeplabv3plus_resnet50, output stride 16, 2 crops of 257 in 1 part(s), 21 classes, cross_"
    )
    assert names.split() == list(memory.KINDS)
    assert [row[:12].strip() for row in rows] == ["float32", "bf16 or fp16"]
    assert all(len(row[12:].split()) == len(memory.KINDS) for row in rows)
    assert rows[0][12:] != rows[1][12:]
    assert torch.ones(2).sum().item() == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 16 --grad_accum 3", "--grad_accum 3: does not divide"),
        ("--batch_size 2 --grad_accum 2", "leaves one image at a time"),
        ("--num_classes 1", "--num_classes"),
        ("--model deeplabv3_mobilenet_v3_large --output_stride 8", "MobileNetV3 supports 16 only"),
        ("--bogus", "--bogus"),
        ("--crop_size 100000", "--crop_size 100000: give 1 to"),
        ("--dataset folder", "give --num_classes"),
        ("--ckpt some.pth", "--ckpt: is not read here; give its --model and --output_stride"),
        ("--test_only --batch_size 1", "--test_only: does not train"),
        ("--compile", "--compile: a compiled step"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        memory.main(flags.split())
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == ""
    assert message in printed.err and len(printed.err.splitlines()) == 1
