import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from datasets import build_dataset
from datasets.loader import SameSizeBatches
from network import build_model
from network.fast import fold_batchnorm
from utils.engine import (
    Tta,
    autocast,
    choose_amp,
    choose_device,
    evaluate,
    parse_tta,
    predict,
    predict_in_parts,
    tta_probabilities,
)
from utils.errors import InputError
from utils.metrics import RunningMean


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_mobilenet_v3_large", num_classes=4)
    with torch.inference_mode(False):
        model(torch.randn(4, 3, 65, 65))  # batch norms that have seen something
    return model


def loader(folder, batch_size, num_workers=0):
    dataset = build_dataset("folder", folder, "val")
    return DataLoader(dataset, batch_sampler=SameSizeBatches(dataset.sizes(), batch_size), num_workers=num_workers)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_predict_gives_uint8_class_ids_of_the_highest_logits(model, amp):
    images = torch.randint(0, 256, (2, 3, 31, 45), dtype=torch.uint8)
    model.eval()
    prediction = predict(model, images, amp)
    assert prediction.shape == (2, 31, 45) and prediction.dtype == torch.uint8
    with torch.inference_mode(), autocast(torch.device("cpu"), amp):
        assert torch.equal(prediction.long(), model(images).argmax(dim=1))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_pictures_batched_by_size_score_exactly_what_one_by_one_scores(folder, model, batch_size):
    one_by_one = evaluate(model, loader(folder, 1))
    assert torch.equal(evaluate(model, loader(folder, batch_size)), one_by_one)
    assert one_by_one.sum() == sum((mask != 255).sum() for _, mask in build_dataset("folder", folder, "val"))


def test_workers_do_not_change_the_matrix(folder, model):
    expected = evaluate(model, loader(folder, 2))
    assert torch.equal(evaluate(model, loader(folder, 2, num_workers=2)), expected)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_models_mode_and_statistics_alone(folder, model, training):
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, loader(folder, 2))
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mode_is_restored_after_an_error_too(folder, model):
    def fail(*batch):
        raise RuntimeError("full disk")

    model.train()
    with pytest.raises(RuntimeError):
        evaluate(model, loader(folder, 2), on_batch=fail)
    assert model.training


def test_each_batch_is_shown_with_the_indices_of_its_pictures(folder, model):
    seen = []
    evaluate(model, loader(folder, 2), on_batch=lambda *batch: seen.append(batch))
    dataset = build_dataset("folder", folder, "val")
    assert sorted(index for indices, *_ in seen for index in indices) == [0, 1, 2]
    for indices, images, masks, predictions in seen:
        assert predictions.dtype == masks.dtype == torch.uint8 and predictions.shape == masks.shape
        for index, image, mask in zip(indices, images, masks, strict=True):
            assert torch.equal(image, dataset[index][0]) and torch.equal(mask, dataset[index][1])


def loss_of(model, dataset):
    """The cross-entropy over the valid pixels of a data set: their sum, and their number."""
    total, count = 0.0, 0
    for image, mask in dataset:
        with torch.inference_mode():
            logits = fold_batchnorm(model)(image[None])
        total += float(F.cross_entropy(logits, mask[None].long(), ignore_index=255, reduction="sum"))
        count += int((mask != 255).sum())
    return total, count


@pytest.mark.parametrize("batch_size", [1, 2])
def test_loss_of_an_evaluation_is_summed_over_the_pixels_in_its_matrix(folder, model, batch_size):
    loss_sum = torch.zeros(())
    matrix = evaluate(model, loader(folder, batch_size), loss_sum=loss_sum)
    total, count = loss_of(model, build_dataset("folder", folder, "val"))
    assert float(loss_sum) == pytest.approx(total, rel=1e-5) and int(matrix.sum()) == count
    assert torch.equal(matrix, evaluate(model, loader(folder, batch_size)))


def test_loss_of_a_batch_that_is_halved_counts_each_picture_once():
    def small(x):
        if len(x) > 1:
            raise torch.OutOfMemoryError("no memory")
        return ByColour()(x)

    images, loss_sum = random_images().repeat(3, 1, 1, 1), torch.zeros(())
    masks = torch.randint(0, 2, (6, 31, 46), dtype=torch.uint8)
    logits = ByColour()(images.float())
    small_images = images.float()
    predictions = predict_in_parts(small, small_images, masks=masks, loss_sum=loss_sum)
    assert torch.equal(predictions.long(), logits.argmax(dim=1))
    expected = F.cross_entropy(logits, masks.long(), reduction="sum")
    torch.testing.assert_close(loss_sum, expected)


# --- test-time augmentation ---


@pytest.mark.parametrize(
    ("text", "tta"),
    [
        ("flip", Tta(True, (1.0,))),
        ("1.0", Tta(False, (1.0,))),
        ("flip,0.5,1.0", Tta(True, (0.5, 1.0))),
        ("0.75, 1.25,flip", Tta(True, (0.75, 1.25))),
        ("4", Tta(False, (4.0,))),
    ],
)
def test_tta_is_flip_and_scales(text, tta):
    assert parse_tta(text) == tta


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "neither flip nor a scale"),
        ("flip,", "neither flip nor a scale"),
        ("mirror", "'mirror' is neither"),
        ("0", "the scale 0"),
        ("1,-0.5", "the scale -0.5"),
        ("4.01", "the scale 4.01"),
        ("nan", "the scale nan"),
        ("inf", "the scale inf"),
        ("flip,1,flip", "flip is given twice"),
        ("1,1.0", "1.0 is given twice"),
    ],
)
def test_other_tta_is_refused_naming_flag_and_value(text, what):
    with pytest.raises(InputError, match=f"^--tta {text}: .*{what}"):
        parse_tta(text)


def random_images(height=31, width=46):
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_tta_of_scale_1_is_the_plain_prediction(model, amp):
    model.eval()
    images = random_images()
    assert torch.equal(predict(model, images, amp, tta=parse_tta("1.0")), predict(model, images, amp))
    probabilities = tta_probabilities(model, images, tta=Tta())
    with torch.inference_mode():
        assert torch.equal(probabilities, model(images).softmax(dim=1))


def test_tta_of_scale_1_does_not_lose_what_the_softmax_rounds_off():
    def close(x):
        return torch.tensor([0.0, 1e-9]).view(1, 2, 1, 1).expand(len(x), 2, *x.shape[-2:])

    assert (predict(close, random_images()) == 1).all()
    assert (predict(close, random_images(), tta=parse_tta("1")) == 1).all()


def test_flipped_prediction_of_a_mirrored_picture_is_the_mirrored_prediction(model):
    model.eval()
    images, tta = random_images(), parse_tta("flip")
    probabilities = tta_probabilities(model, images, tta=tta)
    assert torch.equal(tta_probabilities(model, images.flip(-1), tta=tta), probabilities.flip(-1))
    assert not torch.equal(tta_probabilities(model, images, tta=Tta()), probabilities)
    assert torch.equal(predict(model, images, tta=tta).long(), probabilities.argmax(dim=1))


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_tta_is_the_mean_of_the_probabilities_at_the_pictures_own_size(model, amp):
    model.eval()
    images, tta = random_images(), parse_tta("flip,0.5,1.0,1.75")
    probabilities = tta_probabilities(model, images, amp, tta=tta)
    assert probabilities.shape == (2, 4, 31, 46) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2, 31, 46))
    if amp is None:  # bfloat16 is too coarse to compare
        singles = [tta_probabilities(model, images, tta=Tta(True, (scale,))) for scale in tta.scales]
        torch.testing.assert_close(probabilities, sum(singles) / 3)
        mirrored = tta_probabilities(model, images.flip(-1), tta=tta)
        torch.testing.assert_close(mirrored, probabilities.flip(-1), rtol=1e-3, atol=1e-4)


class Fake(torch.nn.Module):
    """A model that normalises grey 127.5 to 0."""

    def __init__(self, function=None):
        super().__init__()
        self.function = function

    def normalize(self, images):
        return images / 127.5 - 1

    def forward(self, x):
        return self.function(x)


class ByColour(Fake):
    """Class 0 where an image is dark and class 1 where it is bright; remembers the sizes it saw."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        return torch.stack([-x[:, 0], x[:, 0]], dim=1)


def test_scales_are_of_the_sides_rounded_and_never_below_a_pixel():
    fake = ByColour()
    assert predict(fake, random_images(7, 1), tta=parse_tta("0.5,1.25,0.01")).shape == (2, 7, 1)
    assert fake.sizes == [(4, 1), (9, 1), (1, 1)]


def test_scaled_predictions_lie_where_the_picture_has_them():
    images = torch.zeros(1, 3, 40, 60, dtype=torch.uint8)
    images[..., 10:30, 20:50] = 255
    prediction = predict(ByColour(), images, tta=parse_tta("flip,0.5,0.75,1.0,1.25,1.5,1.75"))
    assert torch.equal(prediction, (images[:, 0] > 0).to(torch.uint8))


def test_tta_of_a_constant_model_is_its_constant():
    def constant(x):
        return torch.tensor([0.1, 2.0, -1.0]).view(1, 3, 1, 1).expand(len(x), 3, *x.shape[-2:])

    tta, constant = parse_tta("flip,0.5,1.0,1.5"), Fake(constant)
    probabilities = tta_probabilities(constant, random_images(), tta=tta)
    expected = torch.tensor([0.1, 2.0, -1.0]).softmax(dim=0).view(1, 3, 1, 1).expand_as(probabilities)
    torch.testing.assert_close(probabilities, expected)
    assert (predict(constant, random_images(), tta=tta) == 1).all()


def test_evaluation_with_tta_scores_the_predictions_with_tta(folder, model):
    seen, tta = [], parse_tta("flip,0.5")
    matrix = evaluate(model, loader(folder, 2), tta=tta, on_batch=lambda *batch: seen.append(batch))
    fold = fold_batchnorm(model)
    for _, images, _, predictions in seen:
        assert torch.equal(predictions, predict(fold, images, tta=tta))
    assert not torch.equal(matrix, evaluate(model, loader(folder, 2)))


# --- the rest ---


def test_running_mean_is_since_the_last_look():
    mean = RunningMean()
    for value in (1.0, 2.0, 6.0):
        mean.add(torch.tensor(value, requires_grad=True))
    assert mean.pop() == 3.0
    mean.add(torch.tensor(5.0))
    assert mean.pop() == 5.0
    assert mean.pop() != mean.pop()  # NaN: nothing was added


def test_device_that_is_not_there_is_refused():
    assert choose_device("cpu").type == "cpu"
    for name in ("cuda:99", "tpu9000"):
        with pytest.raises(InputError, match=f"--device {name}: cannot be used here"):
            choose_device(name)


def test_amp_is_bfloat16_where_the_device_computes_in_it(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "any")
    for supported, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=supported: found)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        for capability in (6, 9):  # Pascal has no tensor cores
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=capability: (major, 0))
            assert choose_amp("auto", cpu) == choose_amp("auto", cuda) == dtype
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for name, dtype in (("Tesla T4", torch.float16), ("NVIDIA GeForce GTX 1660", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert choose_amp("auto", cuda) == dtype
    assert choose_amp("off", cuda) is None
    assert choose_amp("fp16", cuda) == torch.float16
    with pytest.raises(InputError, match="--amp fp16: needs a GPU"):
        choose_amp("fp16", cpu)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_too_large_for_the_memory_is_predicted_in_parts(monkeypatch, error):
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    tried = []

    def predict(model, images, amp=None, **_):
        tried.append(len(images))
        if len(images) > 2:
            raise error
        return images[:, 0]

    monkeypatch.setattr("utils.engine.predict", predict)
    assert (predict_in_parts(None, images) == images[:, 0]).all() and tried == [5, 3, 2, 1, 2]


def test_a_picture_too_large_for_the_memory_is_named_with_its_size(monkeypatch):
    def predict(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("utils.engine.predict", predict)
    with pytest.raises(InputError, match="is too small for one image of 8 x 9"):
        predict_in_parts(None, torch.zeros(2, 3, 8, 9, dtype=torch.uint8))
