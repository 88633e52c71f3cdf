"""The parts of the benchmark: ours and the reference, each with its set-up."""

import argparse
import io
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from datasets import build_dataset
from datasets.files import VOID
from datasets.loader import SameSizeBatches, TrainBatches, make_loader
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transform, train_transform
from datasets.voc import VOC_CLASSES, voc_colormap
from network import build_model
from network.upsample import DecoderConv2d, conv_after_upsampling, conv_before_upsampling
from utils.benchmark.reference import PlainDataset, plain_confusion, plain_loader, plain_model, plain_predict
from utils.engine import compiled, evaluate, forward_backward, normalize
from utils.loss import build_loss
from utils.metrics import ConfusionMatrix
from utils.optimizer import build_optimizer
from utils.options import get_parser
from utils.pictures.predict import build_trained, predict_picture

PICTURE = (375, 500)  # height and width of most pictures of VOC
DISTINCT = 64  # generated pictures that differ
NUM_CLASSES = len(VOC_CLASSES)
MATRIX = 4096  # side of the matrices whose product gives the device's rate
FED_STEPS = 20  # of training from the loader
Measurement = Callable[[], float]  # takes one, in seconds per image or step


class Part(NamedTuple):
    """Two ways to do one thing: each sets up and returns its measurement."""

    ours: Callable[[], Measurement]
    reference: Callable[[], Measurement]
    unit: str = "ms/image"
    images: int = 1  # in what the unit counts


@cache
def _picture_files(seed: int, size: tuple[int, int]) -> tuple[bytes, bytes]:
    """A JPEG with detail at all scales and noise, as photographs have, and a palette PNG of a few regions."""
    rng = np.random.default_rng(seed)
    canvas = 128 + rng.normal(0, 6, (*size, 3))
    for cells, weight in ((2, 90), (6, 52), (20, 29), (60, 17)):  # coarse structure is the strongest
        canvas += weight * (_smooth(rng.integers(0, 256, (cells, cells, 3), np.uint8), size) / 128 - 1)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    field = _smooth(rng.integers(0, 256, (4, 4), np.uint8), size)  # [H, W]
    classes = rng.integers(1, NUM_CLASSES, 4).repeat(2) * [0, 0, 1, 1, 0, 0, 1, 1]  # half is background
    mask = Image.fromarray(np.where(field % 64 < 2, VOID, classes[field // 32]).astype(np.uint8))
    mask.putpalette(voc_colormap().tobytes())
    files = io.BytesIO(), io.BytesIO()
    picture.save(files[0], "JPEG", quality=90)
    mask.save(files[1], "PNG")
    return files[0].getvalue(), files[1].getvalue()


def _smooth(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(grid).resize(size[::-1], Image.Resampling.BICUBIC))


def write_pictures(folder: Path, count: int, *, num_val: int, size: tuple[int, int]) -> Path:
    """`count` pictures in VOC layout, all in `train` and the first `num_val` in `val`; returns the folder."""
    ids = [f"{index:06d}" for index in range(count)]
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, id in enumerate(ids):
        paths = folder / "JPEGImages" / f"{id}.jpg", folder / "SegmentationClass" / f"{id}.png"
        for path, content in zip(paths, _picture_files(index % DISTINCT, size), strict=True):
            path.write_bytes(content)
    for split, chosen in {"train": ids, "val": ids[:num_val]}.items():
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(chosen))
    (folder / "class_names.txt").write_text("\n".join(VOC_CLASSES))
    return folder


def our_model(opts: argparse.Namespace) -> nn.Module:
    """The model as main.py has it, with seeded random weights, in evaluation mode."""
    torch.manual_seed(1)
    model = build_model(opts.model, num_classes=NUM_CLASSES, output_stride=opts.output_stride)
    return model.to(opts.device, memory_format=torch.channels_last).eval()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, *, calls: int = 1, images: int = 1) -> Measurement:
    def measurement() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / calls / images

    return measurement


def timed_loader(loader: DataLoader, device: torch.device, use: Callable = lambda images, masks: None) -> Measurement:
    """Seconds per image of a loader whose batches go through `use`, its workers' first ones not counted: by then
    they have started."""

    def measurement() -> float:
        arrivals = [time.perf_counter()]
        for images, masks in loader:
            use(images, masks)
            arrivals.append(time.perf_counter())
        synchronize(device)
        done = (len(loader) - loader.num_workers) * len(images)
        return (time.perf_counter() - arrivals[loader.num_workers]) / done

    return measurement


def train_loader(opts: argparse.Namespace, *, batch_size: int, batches: int, workers: int) -> DataLoader:
    """The loader of main.py."""
    dataset = build_dataset("folder", opts.folder, "train", train_transform(opts.crop_size))
    sampler = TrainBatches(len(dataset), batch_size=batch_size, seed=1, total_itrs=batches)
    return make_loader(dataset, sampler, num_workers=workers, device=opts.device)


def loader(opts: argparse.Namespace, *, workers: int = 0, normalized: bool = False) -> Part:
    """Training batches from files: uint8, or, like the reference's, float32."""
    size = {"batches": 4 + 4 * workers, "workers": workers}
    use = {"use": lambda images, masks: normalize(images)} if normalized else {}
    return Part(
        lambda: timed_loader(train_loader(opts, batch_size=opts.batch_size, **size), opts.device, **use),
        lambda: timed_loader(plain_loader(opts, **size), opts.device),
    )


def confusion_matrix(opts: argparse.Namespace) -> Part:
    """One picture at a time, label maps on the device."""
    dataset = build_dataset("folder", opts.folder, "train")
    target = dataset.mask(0).to(opts.device)[None]  # [1, H, W]
    prediction = target.roll((3, 5), (1, 2)).where(target.roll((3, 5), (1, 2)) != VOID, 0)
    ours, total = ConfusionMatrix(NUM_CLASSES, opts.device), np.zeros((NUM_CLASSES, NUM_CLASSES), int)

    def reference() -> None:
        nonlocal total
        total += plain_confusion(target.cpu().numpy(), prediction.cpu().numpy(), NUM_CLASSES)

    return Part(
        lambda: timed(lambda: ours.update(target, prediction), opts.device, calls=20),
        lambda: timed(reference, opts.device, calls=20),
    )


def training_step(opts: argparse.Namespace, amp: torch.dtype | None, *, compile: bool = False) -> Callable:
    """`step(images, targets)`, uint8 both, as in main.py's loop."""
    model = our_model(opts).train()
    forward = compiled(model, print) if compile else model
    optimizer, scheduler = build_optimizer(get_parser().parse_args([]), model, scaled=amp is torch.float16)
    scaler = torch.amp.GradScaler(opts.device.type, enabled=amp is torch.float16)
    how = {"scaler": scaler, "amp": amp, "parts": 1}
    criterion = build_loss("cross_entropy")

    def step(images: torch.Tensor, targets: torch.Tensor) -> None:
        images, targets = (tensor.to(opts.device, non_blocking=True) for tensor in (images, targets))
        optimizer.zero_grad(set_to_none=True)
        forward_backward(forward, criterion, images=images, targets=targets, **how)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

    return step


def resident_batch(opts: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    generator, (batch, side) = torch.Generator().manual_seed(1), (opts.step_batch_size, opts.step_crop_size)
    images = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    targets = torch.randint(0, NUM_CLASSES, (batch, side, side), generator=generator, dtype=torch.uint8)
    return images.to(opts.device), targets.to(opts.device)


def train_step(opts: argparse.Namespace, *, amp: torch.dtype | None, compile: bool = False) -> Part:
    """A step on a batch that is on the device; the reference's is float32 there already."""
    images, targets = resident_batch(opts)
    calls = 10 if opts.device.type == "cuda" else 1  # a GPU runs behind: the wait at the end must not count

    def reference() -> Measurement:
        model, criterion = plain_model(opts).train(), nn.CrossEntropyLoss(ignore_index=VOID)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        inputs, labels = normalize(images).contiguous(), targets.long()

        def step() -> None:
            loss = criterion(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return timed(step, opts.device, calls=calls)

    def ours() -> Measurement:
        return timed(partial(training_step(opts, amp, compile=compile), images, targets), opts.device, calls=calls)

    return Part(ours, reference, "ms/step", len(images))


def decoder(opts: argparse.Namespace) -> Part:
    """The decoder's convolution of V3+ and its gradients at the size of a training step, in both forms: whether the
    one that is used on the CPU pays on the device, too."""
    batch, side = opts.step_batch_size, -(-opts.step_crop_size // 4)
    maps = torch.randn(batch, 48, side, side), torch.randn(batch, 256, -(-side // 4), -(-side // 4))
    maps = [x.to(opts.device, opts.amp, memory_format=torch.channels_last).requires_grad_() for x in maps]
    weight = DecoderConv2d(48, 256, 256).weight.detach().to(opts.device, opts.amp).requires_grad_()

    def part(convolve: Callable[..., torch.Tensor]) -> Measurement:
        def call() -> None:
            out = convolve(*maps, weight, None)
            torch.autograd.grad(out, [*maps, weight], torch.ones_like(out))

        return timed(call, opts.device, calls=10 if opts.device.type == "cuda" else 1)

    return Part(partial(part, conv_before_upsampling), partial(part, conv_after_upsampling), "ms/step", batch)


def train_from_loader(opts: argparse.Namespace) -> Part:
    """Training as it is against the same steps on one resident batch: the ratio is the share of the time that the
    device computes."""
    opts = argparse.Namespace(**vars(opts) | {"crop_size": opts.step_crop_size})
    batches, size = FED_STEPS, opts.step_batch_size

    def ours() -> Measurement:
        source = train_loader(opts, batch_size=size, batches=batches, workers=opts.num_workers)
        return timed_loader(source, opts.device, training_step(opts, opts.amp))

    def reference() -> Measurement:
        step = partial(training_step(opts, opts.amp), *resident_batch(opts))
        return timed(step, opts.device, calls=batches, images=size)

    return Part(ours, reference)


def validation(opts: argparse.Namespace) -> Part:
    """From the files to the confusion matrix, at native size."""
    dataset = build_dataset("folder", opts.folder, "val", eval_transform())
    workers = opts.num_workers if opts.device.type == "cuda" else 0  # on the CPU they would only take turns

    def ours() -> Measurement:
        batches = SameSizeBatches(dataset.sizes(), get_parser().get_default("val_batch_size"))
        source, model = make_loader(dataset, batches, num_workers=workers, device=opts.device), our_model(opts)
        call = partial(evaluate, model, source, num_classes=NUM_CLASSES, amp=opts.amp)
        return timed(call, opts.device, images=len(dataset))

    def reference() -> Measurement:
        plain = PlainDataset(dataset.images, dataset.masks, None)
        source = DataLoader(plain, batch_size=1, num_workers=workers, persistent_workers=workers > 0)
        model, total = plain_model(opts), np.zeros((NUM_CLASSES, NUM_CLASSES), int)

        def call() -> None:
            nonlocal total
            for image, mask in source:
                prediction = plain_predict(model, image.to(opts.device)).numpy()
                total += plain_confusion(mask.numpy(), prediction, NUM_CLASSES)

        return timed(call, opts.device, images=len(dataset))

    return Part(ours, reference)


def predict(opts: argparse.Namespace) -> Part:
    """One picture, uint8 on the CPU, to its class ids there, by a model that is loaded from its checkpoint."""
    image = torch.randint(0, 256, (3, opts.crop_size, opts.crop_size), dtype=torch.uint8)
    trained = trained_model(opts)

    def reference() -> Measurement:
        model = plain_model(opts)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return timed(lambda: plain_predict(model, ((image / 255 - mean) / std)[None].to(opts.device)), opts.device)

    return Part(lambda: timed(lambda: predict_picture(trained, image, amp=opts.amp), opts.device), reference)


def trained_model(opts: argparse.Namespace) -> nn.Module:
    """A model as `prediction.load_model` makes it of a checkpoint."""
    options = {"model": opts.model, "output_stride": opts.output_stride}
    content = {"model_state": our_model(opts).state_dict(), "options": options}
    content |= {"class_names": VOC_CLASSES, "palette": voc_colormap().tolist()}
    return build_trained(content, "benchmark", opts.device, output_stride=opts.output_stride).model


PARTS = {  # by size: on the CPU the memory of a part is the process's peak up to then
    "confusion_matrix": confusion_matrix,
    "loader": loader,
    "loader_like_for_like": partial(loader, normalized=True),
    "loader_2_workers": partial(loader, workers=2),
    "predict": predict,
    "validation": validation,
    "train_step": lambda opts: train_step(opts, amp=opts.amp),
    "train_step_float32": lambda opts: train_step(opts, amp=None),
    "train_step_compiled": lambda opts: train_step(opts, amp=opts.amp, compile=True),
    "train_from_loader": train_from_loader,
    "decoder": decoder,
}
ON_CUDA = ("train_step_float32", "train_from_loader", "decoder")  # unless --parts says otherwise
