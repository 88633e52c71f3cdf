"""What a trained or half-trained model does with batches: predict and evaluate, on the device to the last."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.files import VOID
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from network._deeplab import DeepLab
from network.fold import folded
from utils.distributed import ALONE, World
from utils.errors import InputError
from utils.metrics import ConfusionMatrix


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """`--device`: "auto" is CUDA where there is one and the CPU otherwise. Of several processes each has a GPU of its
    own, that of its local rank. Raises InputError for a device that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world.size > 1 and name != "cpu":
        if name != "cuda":
            raise InputError(f"--device {name}: under torchrun each process chooses its GPU; give cuda or cpu")
        if world.local_rank >= (count := torch.cuda.device_count()):
            raise InputError(f"--nproc_per_node: there are {count} GPUs for {world.local_rank + 1} or more processes")
        name = f"cuda:{world.local_rank}"
        torch.cuda.set_device(name)
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that torch has for itself; refused or not
            return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise InputError(f"--device {name}: cannot be used here ({reason}); try --device cpu") from None


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """`--amp`: the dtype of autocast, None for float32.

    "auto" is bfloat16 where the device computes in it by itself, float16 on older GPUs with tensor cores (compute
    capability 7, but for the GTX 16 series), and float32 elsewhere.
    """
    if name == "auto" and device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        has_tensor_cores = torch.cuda.get_device_capability(device)[0] == 7
        has_tensor_cores &= "GTX 16" not in torch.cuda.get_device_name(device)
        return torch.float16 if has_tensor_cores else None
    if name == "auto" and device.type == "cpu":
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return torch.bfloat16 if has_bf16() else None
    if name == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16: is for GPUs; on the CPU use bf16 or off")
    return {"auto": None, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Mixed precision in `dtype` inside; None leaves float32."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def compiled(model: nn.Module, warn: Callable[[str], None]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`--compile`: the model's forward pass, compiled at its first call; where that fails, the plain one from then
    on, after one call of `warn`. The weights stay the model's own."""
    forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model)

    def call(images: torch.Tensor) -> torch.Tensor:
        nonlocal forward
        try:
            return forward(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of torch.compile, or of the compilers that it calls: of any kind
            if forward is model:
                raise
            forward = model
            warn(f"--compile: fails here, training goes on without ({(str(error).splitlines() or ['unknown'])[0]})")
            return model(images)

    return call


@cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Kept per device: a copy to a GPU at every batch would wait for it.
    return torch.tensor(IMAGENET_MEAN, device=device) * 255, torch.tensor(IMAGENET_STD, device=device) * 255


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 RGB `[B, 3, H, W]` to float32 with ImageNet's mean 0 and deviation 1, on the same device, in
    channels-last order, which convolutions prefer."""
    mean, std = (value.repeat(images.shape[-1]) for value in _statistics(images.device))  # [3 W]
    # By whole rows, for the CPU: three channels are too few to compute with at a time, which costs it twice the time.
    rows = images.permute(0, 2, 3, 1).flatten(2).float()  # [B, H, 3 W]
    return rows.sub_(mean).div_(std).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)  # [B, 3, H, W]


def forward_backward(
    forward: Callable[[torch.Tensor], torch.Tensor],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    images: torch.Tensor,
    targets: torch.Tensor,
    scaler: torch.amp.GradScaler,
    amp: torch.dtype | None,
    parts: int,
    world: World = ALONE,
) -> torch.Tensor:
    """Adds the gradients of one step's batch, uint8 `[B, 3, H, W]` and `[B, H, W]`, to those that are there, in
    `parts` pieces for want of memory; returns the loss of the step, on the device.

    Of several processes each has its own part of the batch; the loss is that of the whole, and so are the gradients
    where `forward` is of `world.replicated`. Each piece counts by its valid pixels. So cross-entropy and focal loss,
    which are means over these, are those of the whole step, however unevenly void is shared out; other losses rank or
    sum the pixels of a piece.
    """
    total = torch.zeros((), device=images.device)
    valid = world.sum((targets != VOID).sum()).clamp_min(1)  # of the whole step
    exchange_later = getattr(forward, "no_sync", contextlib.nullcontext)
    for part, (some, their) in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True), 1):
        with exchange_later() if part < parts else contextlib.nullcontext():
            with autocast(images.device, amp):
                loss = criterion(forward(normalize(some)), their)
            if parts * world.size > 1:
                loss = loss * ((their != VOID).sum() / valid)
            scaler.scale(loss * world.size).backward()  # the exchange of gradients divides by it
            total += loss.detach()
    return world.sum(total)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, whatever mode it was in again after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Tta(NamedTuple):
    """Test-time augmentation: the mean over the scales and, with `flip`, over the picture and its mirror image."""

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)


MAX_SCALE = 4.0  # sixteen times the pixels, and the memory


def parse_tta(text: str) -> Tta:
    """`--tta`: "flip" and scales of the sides, separated by commas, like "flip,0.5,1.0"; without a scale it is 1.0.

    Raises InputError for anything else, also for a scale that is given twice.
    """
    found: list[str | float] = []
    for item in (item.strip() for item in text.split(",")):
        try:
            value = item if item == "flip" else float(item)
        except ValueError:
            raise InputError(f"--tta {text}: {item!r} is neither flip nor a scale; try flip,0.75,1.0,1.25") from None
        if value != "flip" and not 0 < value <= MAX_SCALE:
            raise InputError(f"--tta {text}: the scale {item} is not above 0 and up to {MAX_SCALE:g}")
        if value in found:
            raise InputError(f"--tta {text}: {item} is there twice; give it once")
        found.append(value)
    return Tta("flip" in found, tuple(value for value in found if value != "flip") or (1.0,))


@torch.inference_mode()
def predict(
    model: DeepLab, images: torch.Tensor, amp: torch.dtype | None = None, *, tta: Tta | None = None
) -> torch.Tensor:
    """Class ids, uint8 `[B, H, W]`, of uint8 RGB `[B, 3, H, W]` by a model in evaluation mode."""
    if tta is None or tta == Tta():  # by the logits themselves, for close ones tie in the softmax
        with autocast(images.device, amp):
            scores = model(normalize(images))  # [B, C, H, W]
    else:
        scores = tta_probabilities(model, images, amp, tta=tta)  # [B, C, H, W]
    return scores.max(dim=1).indices.to(torch.uint8)  # max is many times faster than argmax on the CPU


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or the CPU, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def predict_in_parts(
    model: DeepLab, images: torch.Tensor, amp: torch.dtype | None = None, *, tta: Tta | None = None
) -> torch.Tensor:
    """As `predict`, with half of the batch at a time, and half of that, where the memory does not suffice.

    Raises InputError where it does not suffice for one picture.
    """
    try:
        return predict(model, images, amp, tta=tta)
    except torch.OutOfMemoryError:
        if len(images) == 1:
            size = " x ".join(map(str, images.shape[-2:]))
            raise InputError(
                f"validation: the memory does not suffice for one picture of {size}; give --amp bf16 or --device cpu"
            ) from None
    # Out of the handler: what the failed attempt took is freed only now.
    return torch.cat([predict_in_parts(model, part, amp, tta=tta) for part in images.chunk(2)])


@torch.inference_mode()
def tta_probabilities(
    model: DeepLab, images: torch.Tensor, amp: torch.dtype | None = None, *, tta: Tta
) -> torch.Tensor:
    """The mean of the class probabilities over all scales and flips, float32 `[B, C, H, W]` (1802.02611, section 4).

    `images` is uint8 RGB `[B, 3, H, W]`. One pass after the other is added up: memory goes by the largest scale.
    """
    size, pictures, total = images.shape[-2:], normalize(images), 0.0
    for scale in tta.scales:
        scaled = [max(1, round(side * scale)) for side in size]
        resized = _resize(pictures, scaled, antialias=True)  # [B, 3, h, w]
        for flip in (False, True) if tta.flip else (False,):
            with autocast(images.device, amp):
                logits = model(resized.flip(-1) if flip else resized)  # [B, C, h, w]
            probabilities = _resize(logits.float().softmax(dim=1), size)  # [B, C, H, W]
            total += probabilities.flip(-1) if flip else probabilities
    return total / (len(tta.scales) * (1 + tta.flip))


def _resize(x: torch.Tensor, size: Sequence[int], *, antialias: bool = False) -> torch.Tensor:
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False, antialias=antialias)


def evaluate(
    model: DeepLab,
    loader: DataLoader,
    *,
    num_classes: int,
    amp: torch.dtype | None = None,
    tta: Tta | None = None,
    on_batch: Callable[[list[int], torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
    quiet: bool = False,
) -> ConfusionMatrix:
    """The confusion matrix of a model over a loader whose batches are `(images, masks)`, uint8, as
    `SameSizeBatches` makes them.

    `on_batch(indices, images, masks, predictions)` sees each batch in that order: the indices in the data set, uint8
    RGB `[B, 3, H, W]`, and uint8 class ids `[B, H, W]` twice, all on the model's device. `quiet`: without a bar.
    """
    device = model.device
    model = folded(model) if device.type == "cpu" else model  # on GPUs not measured
    confusion = ConfusionMatrix(num_classes, device)
    hidden = quiet or None  # None: where there is no terminal
    bar = tqdm(loader, desc="validation", unit="batch", leave=False, dynamic_ncols=True, disable=hidden)
    with evaluating(model):
        for done, (indices, (images, masks)) in enumerate(zip(loader.batch_sampler, bar, strict=True), 1):
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            predictions = predict_in_parts(model, images, amp, tta=tta)
            confusion.update(masks, predictions)
            if on_batch is not None:
                on_batch(indices, images, masks, predictions)
            if done % 10 == 0 and not bar.disable:  # each look waits for the device
                bar.set_postfix_str(f"mIoU={confusion.compute()['Mean IoU']:.4f}", refresh=False)
    return confusion
