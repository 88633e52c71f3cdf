"""Exports a trained network as one ONNX file, which is kept only if it computes the same as PyTorch."""

import argparse
import contextlib
import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets.files import is_folder
from network import build_model
from network._deeplab import DeepLab
from network.fast import fold_batchnorm
from utils.errors import InputError
from utils.files import replacing, temporary_of
from utils.weights.load import load_checkpoint, load_model_state, resolve_model

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # only the export needs them
OPSETS = range(18, 24)  # what torch's exporter writes directly; it would have to convert to older ones
DEFAULT_OPSET = 18  # the graph is the same in each, and more programs read the oldest
CHECKED_SIZES = ((2, 129, 161), (1, 256, 256), (1, 97, 130))  # batch, height, width
LEAST_AGREEMENT = 0.999  # share of the pixels at each size
LARGEST_ERROR = 1e-3  # relative error of the logits; correct files were off by less than 1e-5


class WithClassMap(nn.Module):
    """Maps uint8 RGB `[B, 3, H, W]` to float32 logits `[B, C, H, W]` and uint8 class ids `[B, H, W]`.

    uint8 as image decoders return it: a quarter of the memory, and nobody can pass 0..1 by mistake.
    """

    def __init__(self, model: DeepLab) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(image)
        return logits, logits.argmax(dim=1).to(torch.uint8)  # [B, C, H, W], [B, H, W]


def check_target(path: Path, opset: int) -> None:
    """Raises InputError for problems that show before the export.

    These are an unsupported opset, a path that cannot be written, and a missing package.
    """
    if opset not in OPSETS:
        raise InputError(f"--export_opset {opset}: not supported; choose {OPSETS[0]} to {OPSETS[-1]}")
    if path.suffix != ".onnx":
        raise InputError(f"--export {path}: must end in .onnx; give another file name")
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(f"--export: {package} is missing; pip install {' '.join(PACKAGES)}") from None
    if is_folder(path):
        raise InputError(f"--export {path}: this is a folder; give the name of a file in it")
    with _refusing(path):
        temporary_of(path).touch()
        temporary_of(path).unlink()


def export_checkpoint(opts: argparse.Namespace) -> dict:
    """Exports `--ckpt` for `--export`. Returns an empty dictionary: there are no scores."""
    check_target(Path(opts.export), opts.export_opset)
    checkpoint = load_checkpoint(opts.ckpt, model=opts.model)
    resolve_model(opts, checkpoint)
    class_names, palette = checkpoint["class_names"], np.array(checkpoint["palette"], np.uint8)
    model = build_model(
        opts.model,
        num_classes=len(class_names),
        output_stride=opts.output_stride,
        separable_conv=opts.separable_conv,
    )
    load_model_state(model, checkpoint, opts.ckpt)
    about = {"model": opts.model, "output_stride": str(opts.output_stride)}
    export_onnx(model, opts.export, class_names=class_names, palette=palette, about=about, opset=opts.export_opset)
    return {}


def export_onnx(
    model: DeepLab,
    path: str | Path,
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    about: dict[str, str] | None = None,
    opset: int = DEFAULT_OPSET,
) -> float:
    """Writes `model` as `WithClassMap` to one ONNX file for any batch size, height and width.

    model: plain layers, as `build_model` returns them, on any device and in any mode. The metadata are `about` and,
    as JSON, `class_names` and the rows of `palette` (uint8 RGB `[256, 3]`) that belong to them. The file gets its
    name only if `check` accepts it; an existing file stays until then. Returns the lowest agreement of the class
    maps, `LEAST_AGREEMENT` to 1. Raises InputError as `check_target` and `check` do, and if the export fails.
    """
    path = Path(path)
    check_target(path, opset)
    model = copy.deepcopy(model).eval().cpu().float()
    colours = palette[: len(class_names)].tolist()
    metadata = {**(about or {}), "class_names": json.dumps(list(class_names)), "palette": json.dumps(colours)}
    with _refusing(path):
        content = _serialized(WithClassMap(fold_batchnorm(model)).eval(), opset=opset, metadata=metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        with _refusing(path):
            agreement = check(temporary, model)
    print(f"{path}: {len(content) / 1e6:.1f} MB, opset {opset}, image uint8 RGB [batch, 3, height, width]")
    return agreement


def _serialized(model: nn.Module, *, opset: int, metadata: dict[str, str]) -> bytes:
    import onnx

    with _quiet():
        program = torch.onnx.export(
            model,
            # No side is 1, because the exporter would take it to be fixed.
            (torch.zeros(2, 3, 97, 129, dtype=torch.uint8),),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=["logits", "classes"],
            dynamic_shapes={"image": {0: "batch", 2: "height", 3: "width"}},
            verbose=False,
        )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    # These are the exporter's notes, with local source paths.
    for part in (proto.graph, *proto.graph.node):
        del part.metadata_props[:]
    return proto.SerializeToString()


def check(file: Path, model: DeepLab) -> float:
    """Returns the lowest share of pixels, over `CHECKED_SIZES`, that onnxruntime and the model in float32 agree on.

    Raises InputError if it is below `LEAST_AGREEMENT`, or if the logits differ by more than `LARGEST_ERROR`: where a
    model sees one class everywhere, the class map alone says little.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; below that onnxruntime writes to the screen
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    agreements = []
    for seed, size in enumerate(CHECKED_SIZES):
        images = smooth_images(*size, seed=seed)
        with torch.inference_mode():
            expected = model(images)  # [B, C, H, W]
        logits, classes = map(torch.from_numpy, session.run(["logits", "classes"], {"image": images.numpy()}))
        same = classes.view_as(expected[:, 0]) == expected.max(dim=1).indices  # [B, H, W]
        error = ((logits.view_as(expected) - expected).norm() / expected.norm().clamp_min(1e-12)).item()
        agreements.append(same.double().mean().item())
        found = f"{agreements[-1]:.3%} of the class map as in PyTorch, logits off by {error:.0e} of their norm"
        print(f"{' x '.join(map(str, images.shape))}: {found}")
        # Written so that NaN is refused too.
        if not (agreements[-1] >= LEAST_AGREEMENT and error <= LARGEST_ERROR):
            raise InputError(f"{found}; at least {LEAST_AGREEMENT:.1%} and at most {LARGEST_ERROR:.0e} are required")
    return min(agreements)


def smooth_images(batch: int, height: int, width: int, *, seed: int) -> torch.Tensor:
    """Draws soft blobs in all colours, uint8 `[batch, 3, height, width]`: a network sees little in noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    images = F.interpolate(coarse * 340 - 42, (height, width), mode="bicubic", align_corners=False)  # [B, 3, H, W]
    return images.clamp(0, 255).to(torch.uint8)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turns any error that the libraries raise inside the block into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--export {path}: cannot be written ({error.strerror or error}); give another path"
        ) from None
    except Exception as error:
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise InputError(
            f"--export {path}: refused, nothing was written ({reason.splitlines()[0][:300]}); try another "
            f"--export_opset, or pip install --upgrade {' '.join(PACKAGES)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses what the exporter prints, warns and logs."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    finally:
        logging.disable(before)
