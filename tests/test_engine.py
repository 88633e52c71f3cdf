import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from datasets import build_dataset
from datasets.sampler import SameSizeBatches
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from network import build_model
from utils.engine import RunningMean, autocast, choose_amp, choose_device, evaluate, normalize, predict
from utils.errors import InputError


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


def test_normalize_is_torchvisions_from_uint8_in_channels_last():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    result = normalize(images)
    expected = F.normalize(images / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_predict_gives_uint8_class_ids_of_the_highest_logits(model, amp):
    images = torch.randint(0, 256, (2, 3, 31, 45), dtype=torch.uint8)
    model.eval()
    prediction = predict(model, images, amp)
    assert prediction.shape == (2, 31, 45) and prediction.dtype == torch.uint8
    with torch.inference_mode(), autocast(torch.device("cpu"), amp):
        assert torch.equal(prediction.long(), model(normalize(images)).argmax(dim=1))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_pictures_batched_by_size_score_exactly_what_one_by_one_scores(folder, model, batch_size):
    one_by_one = evaluate(model, loader(folder, 1), num_classes=4).matrix()
    assert torch.equal(evaluate(model, loader(folder, batch_size), num_classes=4).matrix(), one_by_one)
    assert one_by_one.sum() == sum((mask != 255).sum() for _, mask in build_dataset("folder", folder, "val"))


def test_workers_do_not_change_the_matrix(folder, model):
    expected = evaluate(model, loader(folder, 2), num_classes=4).matrix()
    assert torch.equal(evaluate(model, loader(folder, 2, num_workers=2), num_classes=4).matrix(), expected)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_models_mode_and_statistics_alone(folder, model, training):
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, loader(folder, 2), num_classes=4)
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mode_is_restored_after_an_error_too(folder, model):
    def fail(*batch):
        raise RuntimeError("full disk")

    model.train()
    with pytest.raises(RuntimeError):
        evaluate(model, loader(folder, 2), num_classes=4, on_batch=fail)
    assert model.training


def test_each_batch_is_shown_with_the_indices_of_its_pictures(folder, model):
    seen = []
    evaluate(model, loader(folder, 2), num_classes=4, on_batch=lambda *batch: seen.append(batch))
    dataset = build_dataset("folder", folder, "val")
    assert sorted(index for indices, *_ in seen for index in indices) == [0, 1, 2]
    for indices, images, predictions in seen:
        for index, image, prediction in zip(indices, images, predictions, strict=True):
            assert torch.equal(image, dataset[index][0]) and prediction.shape == image.shape[-2:]


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
    for supported, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=supported: found)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        assert choose_amp("auto", cpu) == choose_amp("auto", cuda) == dtype
    assert choose_amp("off", cuda) is None
    assert choose_amp("fp16", cuda) == torch.float16
    with pytest.raises(InputError, match="--amp fp16: is for GPUs"):
        choose_amp("fp16", cpu)
