"""Sets up the parts of `utils.benchmark`: ours as main.py does it, or the reference; each returns a measurement."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchvision.transforms import functional as F

from datasets import build_dataset
from datasets.files import VOID
from datasets.loader import SameSizeBatches, TrainBatches, make_loader
from datasets.transforms import eval_transform, train_transform
from datasets.voc import VOC_CLASSES, voc_colormap
from network import build_model
from network._deeplab import DeepLab
from network.backbone import IMAGENET_MEAN, IMAGENET_STD
from network.fast import conv_after_upsampling, conv_before_upsampling, speed_up
from utils.benchmark.reference import PlainDataset, plain_confusion, plain_loader, plain_model, plain_predict
from utils.engine import compile_model, evaluate, forward_backward, seed_step
from utils.loss import build_loss
from utils.metrics import ConfusionMatrix
from utils.options import get_parser
from utils.pictures.predict import predict_image
from utils.weights.load import restore_model

IMAGE_SIZE = (375, 500)  # height and width of most images of VOC
DISTINCT = 64  # different generated images
NUM_CLASSES = len(VOC_CLASSES)
FED_STEPS = 20  # training steps per measurement of train_from_loader
Measurement = Callable[[], float]  # measures once, in seconds per image or step


def write_images(folder: Path, count: int, *, num_val: int, size: tuple[int, int]) -> Path:
    """Writes images and masks in VOC layout, all in `train` and the first `num_val` in `val`; returns the folder.

    The JPEGs have noise and detail at all scales, like photographs; the masks have a few regions with void borders.
    """
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ids = [f"{index:06d}" for index in range(count)]
    for seed, id in enumerate(ids):
        rng = np.random.default_rng(seed)
        canvas = 128 + rng.normal(0, 6, (*size, 3))
        for cells, weight in ((2, 90), (6, 52), (20, 29), (60, 17)):  # coarse structure is the strongest
            canvas += weight * (_smooth(rng.integers(0, 256, (cells, cells, 3), np.uint8), size) / 128 - 1)
        field = _smooth(rng.integers(0, 256, (4, 4), np.uint8), size)  # [H, W]
        classes = rng.integers(1, NUM_CLASSES, 4).repeat(2) * [0, 0, 1, 1, 0, 0, 1, 1]  # half is background
        mask = Image.fromarray(np.where(field % 64 < 2, VOID, classes[field // 32]).astype(np.uint8))
        mask.putpalette(voc_colormap().tobytes())
        mask.save(folder / "SegmentationClass" / f"{id}.png")
        Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(folder / "JPEGImages" / f"{id}.jpg", quality=90)
    for split, chosen in {"train": ids, "val": ids[:num_val]}.items():
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(chosen))
    (folder / "class_names.txt").write_text("\n".join(VOC_CLASSES))
    return folder


def _smooth(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(grid).resize(size[::-1], Image.Resampling.BICUBIC))


def our_model(opts: argparse.Namespace, *, compile: bool = False) -> DeepLab:
    """Builds the model as main.py does, with seeded random weights."""
    torch.manual_seed(1)
    model = build_model(opts.model, num_classes=NUM_CLASSES, output_stride=opts.output_stride)
    model = model.to(opts.device, memory_format=torch.channels_last)
    return model if compile else speed_up(model)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, *, calls: int = 1, images: int = 1) -> Measurement:
    """Returns a measurement: seconds per image of `calls` calls, each of which processes `images` images."""

    def measurement() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / calls / images

    return measurement


def timed_loader(
    loader: DataLoader, device: torch.device, use: Callable[[torch.Tensor, torch.Tensor], object] | None = None
) -> Measurement:
    """Returns a measurement: seconds per image of a loader whose batches go through `use(images, masks)`.

    The clock starts when each worker has delivered its first batch, so their start is not counted.
    """

    def measurement() -> float:
        arrivals = [time.perf_counter()]
        for images, masks in loader:
            if use:
                use(images, masks)
            arrivals.append(time.perf_counter())
        synchronize(device)
        done = (len(loader) - loader.num_workers) * len(images)
        return (time.perf_counter() - arrivals[loader.num_workers]) / done

    return measurement


def our_loader(opts: argparse.Namespace, crop_size: int, batch_size: int, *, itrs: int, workers: int) -> DataLoader:
    """Loads training batches as main.py does."""
    dataset = build_dataset("folder", opts.folder, "train", train_transform(crop_size))
    sampler = TrainBatches(len(dataset), batch_size=batch_size, seed=1, total_itrs=itrs)
    return make_loader(dataset, sampler, num_workers=workers, device=opts.device)


def loader(opts: argparse.Namespace, *, ours: bool, workers: int = 0, like_for_like: bool = False) -> Measurement:
    """Measures training batches from files: ours are uint8 or, like for like, float32 like the reference's."""
    itrs = 4 + 4 * workers
    if not ours:
        return timed_loader(plain_loader(opts, itrs=itrs, workers=workers), opts.device)
    source = our_loader(opts, opts.crop_size, opts.batch_size, itrs=itrs, workers=workers)
    if not like_for_like:
        return timed_loader(source, opts.device)
    # On the CPU, where the batches are.
    model = speed_up(build_model(opts.model, num_classes=NUM_CLASSES))
    return timed_loader(source, opts.device, use=lambda images, masks: model.normalize(images))


def confusion_matrix(opts: argparse.Namespace, *, ours: bool) -> Measurement:
    """Measures the confusion matrix of one image whose two label maps are on the device."""
    target = build_dataset("folder", opts.folder, "train").mask(0).to(opts.device)[None]  # [1, H, W]
    shifted = target.roll((3, 5), (1, 2))
    prediction = shifted.where(shifted != VOID, 0)
    if ours:
        confusion = ConfusionMatrix(NUM_CLASSES, opts.device)
        return timed(lambda: confusion.update(target, prediction), opts.device, calls=20)
    total = np.zeros((NUM_CLASSES, NUM_CLASSES), int)

    def update() -> None:
        total[:] += plain_confusion(target.cpu().numpy(), prediction.cpu().numpy(), NUM_CLASSES)

    return timed(update, opts.device, calls=20)


def training_step(
    opts: argparse.Namespace, amp: torch.dtype | None, *, compile: bool = False
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Returns `step(images, targets)`, both uint8: the step of main.py with its default flags."""
    model = our_model(opts, compile=compile).train()
    net = compile_model(model) if compile else model
    scaler = torch.amp.GradScaler(opts.device.type, enabled=amp is torch.float16)
    fused = True if opts.device.type == "cuda" and not scaler.is_enabled() else None
    backbone = {"params": model.backbone.parameters(), "lr": 0.001}
    head = {"params": model.classifier.parameters(), "lr": 0.01}
    optimizer = SGD([backbone, head], momentum=0.9, weight_decay=1e-4, fused=fused)
    scheduler = StepLR(optimizer, step_size=1000, gamma=0.9)
    criterion = build_loss("cross_entropy")

    def step(images: torch.Tensor, targets: torch.Tensor) -> None:
        images, targets = (batch.to(opts.device, non_blocking=True) for batch in (images, targets))
        seed_step(1, scheduler.last_epoch)
        optimizer.zero_grad(set_to_none=True)
        forward_backward(net, criterion, images, targets, scaler=scaler, amp=amp)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

    return step


def resident_batch(opts: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a batch on the device as the loader composes it: random images, channels last, and random masks."""
    generator, (batch, side) = torch.Generator().manual_seed(1), (opts.step_batch_size, opts.step_crop_size)
    images = torch.randint(0, 256, (batch, side, side, 3), generator=generator, dtype=torch.uint8)
    targets = torch.randint(0, NUM_CLASSES, (batch, side, side), generator=generator, dtype=torch.uint8)
    return images.permute(0, 3, 1, 2).to(opts.device), targets.to(opts.device)  # [B, 3, H, W], [B, H, W]


def train_step(opts: argparse.Namespace, *, ours: bool, float32: bool = False, compile: bool = False) -> Measurement:
    """Measures a training step on a batch on the device; the reference's images are normalised already."""
    images, targets = resident_batch(opts)
    # A GPU lags behind, and the wait at the end should not count.
    calls = 10 if opts.device.type == "cuda" else 1
    if ours:
        step = training_step(opts, None if float32 else opts.amp, compile=compile)
        return timed(lambda: step(images, targets), opts.device, calls=calls)
    model, criterion = plain_model(opts).train(), nn.CrossEntropyLoss(ignore_index=VOID)
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    inputs, labels = model.normalize(images).contiguous(), targets.long()

    def plain_step() -> None:
        loss = criterion(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(plain_step, opts.device, calls=calls)


def decoder(opts: argparse.Namespace, *, ours: bool) -> Measurement:
    """Measures the decoder's convolution in a training step, with its gradients.

    Ours comes before upsampling, as on a CPU, the reference after it. Shows whether ours would pay on a GPU too.
    """
    batch, side = opts.step_batch_size, -(-opts.step_crop_size // 4)
    maps = torch.randn(batch, 48, side, side), torch.randn(batch, 256, -(-side // 4), -(-side // 4))
    maps = [x.to(opts.device, opts.amp, memory_format=torch.channels_last).requires_grad_() for x in maps]
    weight = nn.Conv2d(304, 256, 3).weight.detach().to(opts.device, opts.amp).requires_grad_()
    convolve = conv_before_upsampling if ours else conv_after_upsampling

    def call() -> None:
        out = convolve(*maps, weight, None)
        torch.autograd.grad(out, [*maps, weight], torch.ones_like(out))

    return timed(call, opts.device, calls=10 if opts.device.type == "cuda" else 1)


def train_from_loader(opts: argparse.Namespace, *, ours: bool) -> Measurement:
    """Measures training from files against the same steps on one resident batch.

    The ratio is the share of the time in which the device computes.
    """
    step, size = training_step(opts, opts.amp), opts.step_batch_size
    if not ours:
        images, targets = resident_batch(opts)
        return timed(lambda: step(images, targets), opts.device, calls=FED_STEPS, images=size)
    source = our_loader(opts, opts.step_crop_size, size, itrs=FED_STEPS, workers=opts.num_workers)
    return timed_loader(source, opts.device, use=step)


def validation(opts: argparse.Namespace, *, ours: bool) -> Measurement:
    """Measures a validation at native size, from the files to the confusion matrix."""
    dataset = build_dataset("folder", opts.folder, "val", eval_transform())
    # On the CPU workers would compete with the model.
    workers = opts.num_workers if opts.device.type == "cuda" else 0
    if ours:
        batches = SameSizeBatches(dataset.sizes(), get_parser().get_default("val_batch_size"))
        source, model = make_loader(dataset, batches, num_workers=workers, device=opts.device), our_model(opts)
        return timed(lambda: evaluate(model, source, amp=opts.amp), opts.device, images=len(dataset))
    plain = PlainDataset(dataset.images, dataset.masks, None)
    source = DataLoader(plain, batch_size=1, num_workers=workers, persistent_workers=workers > 0)
    model, total = plain_model(opts), np.zeros((NUM_CLASSES, NUM_CLASSES), int)

    def plain_evaluate() -> None:
        for image, mask in source:
            prediction = plain_predict(model, image.to(opts.device)).numpy()
            total[:] += plain_confusion(mask.numpy(), prediction, NUM_CLASSES)

    return timed(plain_evaluate, opts.device, images=len(dataset))


def predict(opts: argparse.Namespace, *, ours: bool) -> Measurement:
    """Measures a prediction, from an image on the CPU to its class ids there, with a model from a checkpoint."""
    pixels = torch.randint(0, 256, (opts.crop_size, opts.crop_size, 3), dtype=torch.uint8)
    image = pixels.permute(2, 0, 1)  # [3, H, W], channels last in memory, as files are read
    if ours:
        checkpoint = {
            "model_state": our_model(opts).state_dict(),
            "options": {"model": opts.model, "output_stride": opts.output_stride},
            "class_names": VOC_CLASSES,
            "palette": voc_colormap().tolist(),
        }
        model = restore_model(checkpoint, "benchmark", opts.device).model
        return timed(lambda: predict_image(model, image, amp=opts.amp), opts.device)
    model, image = plain_model(opts), image.contiguous()

    def plain() -> None:
        plain_predict(model, F.normalize(image / 255, IMAGENET_MEAN, IMAGENET_STD)[None].to(opts.device))

    return timed(plain, opts.device)


PARTS = {  # smallest first: on the CPU a part's memory is the peak of the process so far
    "confusion_matrix": confusion_matrix,
    "loader": loader,
    "loader_like_for_like": partial(loader, like_for_like=True),
    "loader_2_workers": partial(loader, workers=2),
    "predict": predict,
    "validation": validation,
    "train_step": train_step,
    "train_step_float32": partial(train_step, float32=True),
    "train_step_compiled": partial(train_step, compile=True),
    "train_from_loader": train_from_loader,
    "decoder": decoder,
}
STEPS = {"train_step", "train_step_float32", "train_step_compiled", "decoder"}  # measured per step, not per image
ON_CUDA = {"train_step_float32", "train_from_loader", "decoder"}  # measured on the CPU only if --parts names them
