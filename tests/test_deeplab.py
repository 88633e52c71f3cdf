import pytest
import torch
from torchvision.models.segmentation import deeplabv3_resnet50

from network import MODELS, build_model
from network._deeplab import ASPP, ASPPPooling, DeepLabHead, DeepLabHeadPlus, conv_bn_relu
from network.backbone import IMAGENET_MEAN, IMAGENET_STD
from utils.errors import InputError
from utils.loss import cross_entropy


def features(batch=2, channels=8, low_level_channels=6, size=(5, 7)):
    return {
        "out": torch.randn(batch, channels, *size),
        "low_level": torch.randn(batch, low_level_channels, 4 * size[0] - 1, 4 * size[1] - 3),
    }


@pytest.mark.parametrize("rates", [(6, 12, 18), (12, 24, 36), (1,)])
@pytest.mark.parametrize("size", [(33, 33), (5, 7), (1, 1)])
def test_aspp_keeps_height_and_width_and_gives_256_channels(rates, size):
    aspp = ASPP(16, rates)
    assert aspp(torch.randn(2, 16, *size)).shape == (2, 256, *size)
    assert len(aspp.convs) == len(rates) + 2


@pytest.mark.parametrize("rate", [6, 12, 18, 24, 36])
def test_aspp_convolution_samples_at_its_atrous_rate(rate):
    branch = torch.nn.Sequential(*conv_bn_relu(1, 1, 3, rate)).eval()
    torch.nn.init.ones_(branch[0].weight)
    impulse = torch.zeros(1, 1, 2 * rate + 1, 2 * rate + 1)
    impulse[0, 0, rate, rate] = 1.0
    reached = branch(impulse)[0, 0].nonzero().tolist()
    assert reached == [[y, x] for y in (0, rate, 2 * rate) for x in (0, rate, 2 * rate)]


def test_image_pooling_is_the_same_everywhere_and_is_the_mean():
    pooling = ASPPPooling(3, 3).eval()
    torch.nn.init.dirac_(pooling[1].weight)
    x = torch.rand(2, 3, 4, 5)
    out = pooling(x)
    assert out.shape == (2, 3, 4, 5)
    expected = x.mean(dim=(2, 3), keepdim=True) / (1 + pooling[2].eps) ** 0.5
    torch.testing.assert_close(out, expected.expand_as(out))


def test_dropout_after_the_aspp_is_a_tenth():
    dropout = ASPP(4, (6, 12, 18)).project[3]
    assert type(dropout) is torch.nn.Dropout and dropout.p == 0.1


def test_v3_head_classifies_at_the_backbones_stride():
    assert DeepLabHead(8, 5, (6, 12, 18))(features()).shape == (2, 5, 5, 7)


def test_v3plus_head_classifies_at_the_low_level_features_size():
    head = DeepLabHeadPlus(8, 6, 5, (6, 12, 18))
    assert head(features()).shape == (2, 5, 19, 25)
    assert head.project[0].weight.shape == (48, 6, 1, 1)
    assert head.classifier[0].weight.shape == (256, 304, 3, 3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(64, 64), (65, 33), (1, 1)])
def test_logits_have_the_inputs_own_size(name, size):
    model = build_model(name, num_classes=3).eval()
    with torch.inference_mode():
        logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 3, *size) and logits.dtype == torch.float32


@pytest.mark.parametrize("name", ["deeplabv3plus_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_every_parameter_gets_a_finite_gradient(name):
    model = build_model(name, num_classes=3)
    model(torch.randn(2, 3, 33, 33)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("stride", "rates"), [(16, [6, 12, 18]), (8, [12, 24, 36])])
@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "deeplabv3plus_resnet50"])
def test_atrous_rates_go_with_the_output_stride(name, stride, rates):
    model = build_model(name, num_classes=2, output_stride=stride)
    aspp = next(module for module in model.modules() if isinstance(module, ASPP))
    assert [branch[0].dilation[0] for branch in aspp.convs[1:-1]] == rates


def test_parameter_names_are_those_of_published_checkpoints():
    plus = build_model("deeplabv3plus_resnet50", num_classes=21).state_dict()
    for name, shape in {
        "backbone.conv1.weight": (64, 3, 7, 7),
        "backbone.layer1.0.conv1.weight": (64, 64, 1, 1),
        "classifier.project.0.weight": (48, 256, 1, 1),
        "classifier.aspp.convs.0.0.weight": (256, 2048, 1, 1),
        "classifier.aspp.convs.3.0.weight": (256, 2048, 3, 3),
        "classifier.aspp.convs.4.1.weight": (256, 2048, 1, 1),
        "classifier.aspp.project.0.weight": (256, 1280, 1, 1),
        "classifier.classifier.0.weight": (256, 304, 3, 3),
        "classifier.classifier.3.weight": (21, 256, 1, 1),
    }.items():
        assert plus[name].shape == shape
    assert not [name for name in plus if "fc." in name or name in ("mean", "std")]
    v3 = build_model("deeplabv3_resnet50", num_classes=21).state_dict()
    assert v3["classifier.classifier.0.convs.1.0.weight"].shape == (256, 2048, 3, 3)
    assert v3["classifier.classifier.4.weight"].shape == (21, 256, 1, 1)


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5).eval()


def test_v3_gives_torchvisions_logits_from_torchvisions_weights(reference):
    model = build_model("deeplabv3_resnet50", num_classes=5, output_stride=8).eval()
    state = {name.replace("classifier.", "classifier.classifier."): w for name, w in reference.state_dict().items()}
    model.load_state_dict(state)
    x = torch.randn(1, 3, 97, 65)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), reference(x)["out"], rtol=1e-5, atol=1e-5)


def test_v3plus_shares_torchvisions_backbone_and_aspp(reference):
    model = build_model("deeplabv3plus_resnet50", num_classes=5, output_stride=8).eval()
    model.backbone.load_state_dict(reference.backbone.state_dict())
    model.classifier.aspp.load_state_dict(reference.classifier[0].state_dict())
    x = torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        out = model.classifier.aspp(model.backbone(x)["out"])
        torch.testing.assert_close(out, reference.classifier[0](reference.backbone(x)["out"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "stride", "words"),
    [
        ("deeplabv4", 16, "--model deeplabv4: unknown model; choose from deeplabv3plus_resnet50"),
        ("deeplabv3_resnet50", 32, "--output_stride 32: not supported; choose 16 or 8"),
    ],
)
def test_an_unknown_model_or_stride_is_refused_with_the_choices(name, stride, words):
    with pytest.raises(InputError, match=words):
        build_model(name, num_classes=2, output_stride=stride)


@pytest.mark.parametrize("name", ["deeplabv3plus_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_one_batch_is_overfitted(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=3)
    target = torch.zeros(2, 64, 64, dtype=torch.uint8)
    target[0, :, 32:], target[1, 32:], target[:, :4] = 1, 2, 255
    images = torch.randn(2, 3, 64, 64) * 0.3 + target[:, None] % 255
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        logits = model(images)
        loss = cross_entropy(logits, target)
        loss.backward()
        optimizer.step()
    valid = target != 255
    assert loss.item() < 0.2
    assert (logits.argmax(dim=1) == target)[valid].float().mean() > 0.95


def test_frozen_batch_norms_survive_train():
    model = build_model("deeplabv3plus_mobilenet_v3_large", num_classes=3)
    model.freeze_bn = True
    norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    before = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    model.eval().train()
    assert model.training and not any(norm.training for norm in norms.values())
    model(torch.randn(1, 3, 33, 33)).square().mean().backward()  # a batch of one, too
    for name, norm in norms.items():
        assert torch.equal(norm.running_mean, before[name][0]) and torch.equal(norm.running_var, before[name][1])
        assert norm.weight.grad.isfinite().all() and norm.bias.grad.abs().sum() > 0
    model.freeze_bn = False
    assert all(norm.training for norm in norms.values() if model.train())


def test_uint8_images_are_normalised_by_the_model_and_floats_are_taken_as_they_are():
    model = build_model("deeplabv3_mobilenet_v3_large", num_classes=2).eval()
    images = torch.randint(0, 256, (1, 3, 33, 49), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = (images / 255 - mean) / std
    torch.testing.assert_close(model.normalize(images), normalised, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), model(normalised), rtol=1e-4, atol=1e-4)


def test_a_plain_model_exports_plain_convolutions_for_any_size():
    branch = torch.nn.Sequential(*conv_bn_relu(2, 3, 3, 4)).eval()
    graph = torch.export.export(branch, (torch.randn(1, 2, 5, 6),))
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "conv" in target] == ["aten.conv2d.default"]
