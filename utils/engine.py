"""Chooses the device and runs a model on it: a training step, predictions, an evaluation."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.files import VOID
from network._deeplab import DeepLab
from network.fast import fold_batchnorm
from utils.cli import is_out_of_memory
from utils.distributed import all_sum, broadcast_buffers, is_main, local_rank, rank, world_size
from utils.errors import InputError
from utils.loss import summed_cross_entropy
from utils.metrics import ConfusionMatrix
from utils.signals import StopSignals

MAX_SCALE = 4.0  # for --tta: sixteen times the pixels and the memory
log = logging.getLogger("deeplab")


def choose_device(name: str) -> torch.device:
    """Returns the device for `--device`: "auto" is CUDA if there is one, otherwise the CPU.

    Under torchrun each process gets the GPU of its local rank. Raises InputError for a device that cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world_size() > 1 and name != "cpu":
        if name != "cuda":
            raise InputError(f"--device {name}: under torchrun each process chooses its GPU; give cuda or cpu")
        if local_rank() >= (count := torch.cuda.device_count()):
            raise InputError(f"--nproc_per_node: at least {local_rank() + 1} processes for {count} GPUs; lower it")
        name = f"cuda:{local_rank()}"
        torch.cuda.set_device(name)
    try:
        # torch warns about device names that it reserves for itself.
        with warnings.catch_warnings(action="ignore"):
            return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise InputError(f"--device {name}: cannot be used here ({reason}); try --device cpu") from None


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Returns the autocast dtype for `--amp`, None for float32.

    "auto" is bfloat16 where the device supports it natively, float16 on older GPUs with tensor cores (compute
    capability 7, except the GTX 16 series), and float32 elsewhere.
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
        raise InputError("--amp fp16: needs a GPU; on the CPU use bf16 or off")
    return {"auto": None, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Returns a context of mixed precision in `dtype`; None leaves float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def seed_step(seed: int, itr: int) -> None:
    """Seeds dropout for one iteration from (seed, iteration, rank), so that a resumed run draws the same masks."""
    torch.manual_seed(int(np.random.SeedSequence((seed, itr, rank())).generate_state(1)[0]))


def compile_model(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the forward pass for `--compile`, compiled at its first call.

    If compiling fails, it warns once and runs the plain model from then on. The model keeps its weights.
    """
    forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model)

    def call(images: torch.Tensor) -> torch.Tensor:
        nonlocal forward
        try:
            return forward(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # torch.compile and the compilers behind it raise anything
            if forward is model:
                raise
            forward = model
            reason = (str(error).splitlines() or ["unknown"])[0]
            log.warning(f"--compile: failed, training goes on without it ({reason})")
            return model(images)

    call.no_sync = getattr(model, "no_sync", contextlib.nullcontext)  # several processes: see forward_backward
    return call


def forward_backward(
    net: Callable[[torch.Tensor], torch.Tensor],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    scaler: torch.amp.GradScaler,
    amp: torch.dtype | None,
    parts: int = 1,
) -> torch.Tensor:
    """Accumulates the gradients of one step; returns the loss of the step, on the device.

    images and targets: uint8 `[B, 3, H, W]` and `[B, H, W]`, this process's share of the step's batch. It passes in
    `parts` parts, which saves memory. Each part is weighted by its share of the step's valid pixels. So the mean
    losses (cross-entropy and focal loss) do not depend on how parts and processes share the void. Other losses rank
    or sum the pixels of a part.
    """
    total = torch.zeros((), device=images.device)
    valid = all_sum((targets != VOID).sum()).clamp_min(1)  # in the whole step
    without_exchange = getattr(net, "no_sync", contextlib.nullcontext)
    for part, (x, y) in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True), 1):
        with without_exchange() if part < parts else contextlib.nullcontext():
            with autocast(images.device, amp):
                loss = criterion(net(x), y)
            if parts * world_size() > 1:
                loss = loss * ((y != VOID).sum() / valid)
            # Times the processes, because the exchange averages over them.
            scaler.scale(loss * world_size()).backward()
            total += loss.detach()
    return all_sum(total)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode for the block, then back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Tta(NamedTuple):
    """Test-time augmentation: the mean over the scales and, with `flip`, over the image and its mirror image."""

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)


def parse_tta(text: str) -> Tta:
    """Reads `--tta`: "flip" and scales, separated by commas, such as "flip,0.5,1.0"; without a scale it is 1.0.

    Raises InputError for anything else, and for a scale that is given twice.
    """
    found: list[str | float] = []
    for item in (item.strip() for item in text.split(",")):
        try:
            value = item if item == "flip" else float(item)
        except ValueError:
            raise InputError(f"--tta {text}: {item!r} is neither flip nor a scale; try flip,0.75,1.0,1.25") from None
        if value != "flip" and not 0 < value <= MAX_SCALE:
            raise InputError(f"--tta {text}: the scale {item} is out of range; give up to {MAX_SCALE:g}")
        if value in found:
            raise InputError(f"--tta {text}: {item} is given twice; give it once")
        found.append(value)
    return Tta("flip" in found, tuple(value for value in found if value != "flip") or (1.0,))


@torch.inference_mode()
def predict(
    model: DeepLab,
    images: torch.Tensor,
    amp: torch.dtype | None = None,
    *,
    tta: Tta | None = None,
    masks: torch.Tensor | None = None,
    loss_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """Predicts class ids, uint8 `[B, H, W]`, for uint8 RGB `[B, 3, H, W]` with a model in evaluation mode.

    With `loss_sum`, a float32 scalar on the device, it adds the `summed_cross_entropy` of `masks` to it; not with
    `tta`, which has no logits.
    """
    if tta is None or tta == Tta():
        # The logits themselves, because close ones tie in the softmax.
        with autocast(images.device, amp):
            scores = model(images)  # [B, C, H, W]
    else:
        scores = tta_probabilities(model, images, amp, tta=tta)  # [B, C, H, W]
    # On the CPU max is many times faster than argmax.
    predictions = scores.max(dim=1).indices.to(torch.uint8)  # [B, H, W]
    # Last, so that a batch that does not fit the memory adds nothing.
    if loss_sum is not None:
        loss_sum += summed_cross_entropy(scores, masks)
    return predictions


@torch.inference_mode()
def predict_with_confidence(
    model: DeepLab, images: torch.Tensor, amp: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicts class ids like `predict`, and the probability of each, float32 `[B, H, W]` in 0..1."""
    with autocast(images.device, amp):
        logits = model(images)  # [B, C, H, W]
    return logits.max(dim=1).indices.to(torch.uint8), logits.softmax(dim=1).amax(dim=1)  # [B, H, W] each


def predict_in_parts(
    model: DeepLab,
    images: torch.Tensor,
    amp: torch.dtype | None = None,
    *,
    tta: Tta | None = None,
    masks: torch.Tensor | None = None,
    loss_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """Predicts like `predict`, and halves the batch as often as the memory requires.

    Raises InputError if one image does not fit.
    """
    try:
        return predict(model, images, amp, tta=tta, masks=masks, loss_sum=loss_sum)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(images) == 1:
            size = " x ".join(map(str, images.shape[-2:]))
            raise InputError(
                f"validation: the device's memory is too small for one image of {size}; try --amp bf16 or "
                "--device cpu"
            ) from None
    # Outside the handler, because the memory of the failed attempt is only freed now.
    parts = zip(images.chunk(2), [None, None] if masks is None else masks.chunk(2), strict=True)
    return torch.cat([predict_in_parts(model, x, amp, tta=tta, masks=y, loss_sum=loss_sum) for x, y in parts])


@torch.inference_mode()
def tta_probabilities(
    model: DeepLab, images: torch.Tensor, amp: torch.dtype | None = None, *, tta: Tta
) -> torch.Tensor:
    """Averages class probabilities over all scales and flips, float32 `[B, C, H, W]` (1802.02611, section 4).

    images: uint8 RGB `[B, 3, H, W]`. Passes are summed one by one, so the largest scale decides the memory.
    """
    size, inputs, total = images.shape[-2:], model.normalize(images), 0.0
    for scale in tta.scales:
        scaled = [max(1, round(side * scale)) for side in size]
        resized = _resize(inputs, scaled, antialias=True)  # [B, 3, h, w]
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
    amp: torch.dtype | None = None,
    tta: Tta | None = None,
    on_batch: Callable[[list[int], torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
    stop: StopSignals | None = None,
    loss_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """Evaluates a model; returns the confusion matrix, int64 `[C, C]` (rows = target), summed over the processes.

    loader: batches of images and masks, uint8, as `SameSizeBatches` composes them. `on_batch(indices, images, masks,
    predictions)` receives each batch: indices into the data set, uint8 RGB `[B, 3, H, W]` and uint8 class ids
    `[B, H, W]` twice, on the model's device. After a signal to any process (`stop`) the matrix is incomplete.
    `loss_sum`, a float32 zero on that device, becomes the sum of the cross-entropy over the pixels in the matrix.
    """
    # The main process saves its own batch-norm statistics, so those are evaluated.
    broadcast_buffers(model)
    device = model.device
    # On a GPU the gain has not been measured.
    model = fold_batchnorm(model) if device.type == "cpu" else model
    confusion = ConfusionMatrix(loader.dataset.num_classes, device)
    hidden = None if is_main() else True  # None: hidden only where there is no terminal
    bar = tqdm(loader, desc="validation", unit="batch", leave=False, dynamic_ncols=True, disable=hidden)
    with evaluating(model):
        for done, (indices, (images, masks)) in enumerate(zip(loader.batch_sampler, bar, strict=True), 1):
            # Not asked of all processes, because they have different numbers of batches.
            if stop is not None and stop.received:
                break
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            predictions = predict_in_parts(model, images, amp, tta=tta, masks=masks, loss_sum=loss_sum)
            confusion.update(masks, predictions)
            if on_batch is not None:
                on_batch(indices, images, masks, predictions)
            # Not after every batch, because each look waits for the device.
            if done % 10 == 0 and not bar.disable:
                bar.set_postfix_str(f"mIoU={confusion.compute()['Mean IoU']:.4f}", refresh=False)
    if loss_sum is not None:
        all_sum(loss_sum)
    return all_sum(confusion.matrix())
