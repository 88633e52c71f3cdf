import argparse

import numpy as np
import pytest
import torch
from torch import nn

from datasets import build_dataset
from datasets.loader import SameSizeBatches, make_loader
from datasets.transforms import eval_transform
from utils.benchmark import __main__, parts
from utils.benchmark.reference import PlainDataset, plain_confusion, plain_loader, plain_model, plain_predict
from utils.metrics import ConfusionMatrix
from utils.pictures.predict import predict_image


@pytest.fixture
def opts(tmp_path) -> argparse.Namespace:
    flags = "--device cpu --amp off --model deeplabv3plus_mobilenet_v3_large --crop_size 33 --batch_size 4"
    opts = __main__.parse(flags.split())
    opts.folder = parts.write_images(tmp_path / "data", 8, num_val=4, size=(40, 52))
    return opts


def test_reference_confusion_matrix_is_ours():
    target, prediction = torch.from_numpy(np.random.default_rng(1).integers(0, 21, (2, 30, 40))).byte()
    target[:5] = 255
    ours = ConfusionMatrix(21)
    ours.update(target, prediction)
    assert ours.matrix().tolist() == plain_confusion(target.numpy(), prediction.numpy(), 21).tolist()


@torch.no_grad()
def test_reference_network_computes_what_ours_does(opts):
    model, plain = parts.our_model(opts).eval(), plain_model(opts)
    plain.load_state_dict(model.state_dict())
    image = torch.randint(0, 256, (3, 65, 65), dtype=torch.uint8)
    images = plain.normalize(image[None])
    torch.testing.assert_close(plain(images), model(image[None]), rtol=1e-3, atol=1e-4)
    assert (plain_predict(plain, images)[0] == predict_image(model, image)).float().mean() > 0.999


def test_reference_network_has_none_of_our_faster_layers(opts):
    plain, ours = ([type(layer) for layer in model.modules()] for model in (plain_model(opts), parts.our_model(opts)))
    assert {layer for layer in plain if issubclass(layer, nn.Conv2d)} == {nn.Conv2d}
    assert "network.fast" not in {layer.__module__ for layer in plain}
    assert "network.fast" in {layer.__module__ for layer in ours}  # as in training on a CPU
    compiled = parts.our_model(opts, compile=True)
    assert "network.fast" not in {type(layer).__module__ for layer in compiled.modules()}


def test_reference_reads_the_images_as_ours_does(opts):
    dataset = build_dataset("folder", opts.folder, "val", eval_transform())
    loader = make_loader(dataset, SameSizeBatches(dataset.sizes(), 4), num_workers=0, device=opts.device)
    images, masks = next(iter(loader))
    plain, normalize = PlainDataset(dataset.images, dataset.masks, None), parts.our_model(opts).normalize
    torch.testing.assert_close(normalize(images), torch.stack([plain[index][0] for index in range(4)]))
    assert torch.equal(masks, torch.stack([plain[index][1] for index in range(4)]))


def test_training_batches_like_for_like_have_the_same_distribution(opts):
    torch.manual_seed(1)
    ours = list(parts.our_loader(opts, 33, 4, itrs=40, workers=0))
    plain = list(plain_loader(opts, itrs=40, workers=0))
    ours, plain = ([torch.cat(tensors) for tensors in zip(*batches, strict=True)] for batches in (ours, plain))
    images = parts.our_model(opts).normalize(ours[0])
    assert images.shape == plain[0].shape == (160, 3, 33, 33) and images.dtype == plain[0].dtype
    assert ours[1].shape == plain[1].shape == (160, 33, 33) and ours[1].dtype == plain[1].dtype
    assert (images.mean((0, 2, 3)) - plain[0].mean((0, 2, 3))).abs().max() < 0.15
    assert abs((ours[1] == 255).float().mean() - (plain[1] == 255).float().mean()) < 0.05
