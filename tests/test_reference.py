import argparse

import numpy as np
import pytest
import torch
from torch import nn

from datasets import build_dataset
from datasets.loader import SameSizeBatches, make_loader
from datasets.transforms import eval_transform
from utils.benchmark import __main__, reference
from utils.benchmark import parts as benchmark
from utils.benchmark.reference import PlainDataset, plain_confusion, plain_loader, plain_model, plain_predict
from utils.engine import normalize
from utils.metrics import ConfusionMatrix
from utils.pictures.predict import predict_picture


@pytest.fixture
def opts(tmp_path) -> argparse.Namespace:
    flags = "--device cpu --amp off --model deeplabv3plus_mobilenet_v3_large --crop_size 33 --batch_size 4"
    opts = __main__.parse(flags.split())
    opts.folder = benchmark.write_pictures(tmp_path / "data", 8, num_val=4, size=(40, 52))
    return opts


def test_reference_confusion_matrix_is_ours():
    target, prediction = torch.from_numpy(np.random.default_rng(1).integers(0, 21, (2, 30, 40))).byte()
    target[:5] = 255
    ours = ConfusionMatrix(21)
    ours.update(target, prediction)
    assert ours.matrix().tolist() == plain_confusion(target.numpy(), prediction.numpy(), 21).tolist()


@torch.no_grad()
def test_reference_network_computes_what_ours_does(opts):
    model = benchmark.our_model(opts)
    plain = plain_model(opts, model.state_dict())
    image = torch.randint(0, 256, (3, 65, 65), dtype=torch.uint8)
    images = normalize(image[None])
    torch.testing.assert_close(plain(images.contiguous()), model(images), rtol=1e-3, atol=1e-4)
    assert (plain_predict(plain, images)[0] == predict_picture(model, image)).float().mean() > 0.999


def test_reference_network_has_plain_convolutions_only(opts, monkeypatch):
    class Fast(nn.Conv2d):
        def forward(self, x):
            raise NotImplementedError

    monkeypatch.setattr(reference, "build_model", lambda *args, **kwargs: nn.Sequential(Fast(3, 4, 3, dilation=2)))
    plain = plain_model(opts)
    assert type(plain[0]) is nn.Conv2d and plain(torch.rand(1, 3, 9, 9)).shape == (1, 4, 5, 5)


def test_reference_network_has_none_of_our_layers(opts):
    layers = {type(layer) for layer in plain_model(opts).modules() if isinstance(layer, nn.Conv2d)}
    assert layers == {nn.Conv2d, reference.PlainDecoderConv2d}


def test_reference_reads_the_pictures_as_ours_does(opts):
    dataset = build_dataset("folder", opts.folder, "val", eval_transform())
    loader = make_loader(dataset, SameSizeBatches(dataset.sizes(), 4), num_workers=0, device=opts.device)
    images, masks = next(iter(loader))
    plain = PlainDataset(dataset.images, dataset.masks, None)
    torch.testing.assert_close(normalize(images), torch.stack([plain[index][0] for index in range(4)]))
    assert torch.equal(masks, torch.stack([plain[index][1] for index in range(4)]))


def test_training_batches_like_for_like_are_distributed_alike(opts):
    torch.manual_seed(1)
    ours = list(benchmark.train_loader(opts, batch_size=4, batches=40, workers=0))
    plain = list(plain_loader(opts, batches=40, workers=0))
    ours, plain = ([torch.cat(parts) for parts in zip(*batches, strict=True)] for batches in (ours, plain))
    images = normalize(ours[0])
    assert images.shape == plain[0].shape == (160, 3, 33, 33) and images.dtype == plain[0].dtype
    assert ours[1].shape == plain[1].shape == (160, 33, 33) and ours[1].dtype == plain[1].dtype
    assert (images.mean((0, 2, 3)) - plain[0].mean((0, 2, 3))).abs().max() < 0.15
    assert abs((ours[1] == 255).float().mean() - (plain[1] == 255).float().mean()) < 0.05
