"""A trained network as one ONNX file, which is kept only if it computes what PyTorch computes."""

import contextlib
import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from network._deeplab import DeepLab
from network.fold import folded
from utils.engine import normalize
from utils.errors import InputError
from utils.files import replacing, temporary_of

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # that nothing else needs
OPSETS = range(18, 24)  # those that torch's exporter writes by itself: older ones it would have to convert to
DEFAULT_OPSET = 18  # the graph is the same in each of them, and more programs read the oldest
CHECKED_SIZES = ((2, 129, 161), (1, 256, 256), (1, 97, 130))  # batch, height, width
LEAST_AGREEMENT = 0.999  # of the pixels of each size
LARGEST_ERROR = 1e-3  # of the logits, relative; correct files were off by less than 1e-5


class FromPixels(nn.Module):
    """uint8 RGB `[B, 3, H, W]` to float32 logits `[B, C, H, W]` and uint8 class ids `[B, H, W]`.

    uint8, as decoders give pictures: they take a quarter of the memory, and nobody can pass 0..1 by mistake.
    """

    def __init__(self, model: DeepLab) -> None:
        super().__init__()
        self.model = model
        for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(value)[:, None, None] * 255)  # [3, 1, 1]

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model((image.float() - self.mean) / self.std)
        return logits, logits.argmax(dim=1).to(torch.uint8)  # [B, C, H, W], [B, H, W]


def check_target(path: Path, opset: int) -> None:
    """Raises InputError for all that is known before the work: an opset that there is not, a path that cannot be
    written, a package that is missing."""
    if opset not in OPSETS:
        raise InputError(f"--export_opset {opset}: there are {OPSETS[0]} to {OPSETS[-1]}; try {DEFAULT_OPSET}")
    if path.suffix != ".onnx":
        raise InputError(f"--export {path}: give a file name that ends in .onnx")
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(f"--export: needs {package}; pip install {' '.join(PACKAGES)}") from None
    with _refusing(path):
        temporary_of(path).touch()
        temporary_of(path).unlink()
    if path.is_dir():
        raise InputError(f"--export {path}: is a folder; give a file name in it")


def export_onnx(
    model: DeepLab,
    path: str | Path,
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    about: dict[str, str] | None = None,
    opset: int = DEFAULT_OPSET,
    log: Callable[[str], None] = print,
) -> float:
    """Writes `model`, on any device and in any mode, as `FromPixels` to one ONNX file for any batch, height, width.

    The metadata are `about`, and as JSON `class_names` and `palette`: uint8 RGB `[256, 3]`, of which the rows of the
    classes are kept. The file takes its name only if `check` accepts it, and one that has the name stays until then.
    Returns the lowest agreement of the class maps, `LEAST_AGREEMENT` to 1. Raises InputError as `check_target` and
    `check` do, and for an export that fails.
    """
    path = Path(path)
    check_target(path, opset)
    model = copy.deepcopy(model).eval().cpu().float()
    colours = palette[: len(class_names)].tolist()
    metadata = {**(about or {}), "class_names": json.dumps(list(class_names)), "palette": json.dumps(colours)}
    with _refusing(path), replacing(path) as temporary:
        content = _serialized(FromPixels(folded(model)).eval(), opset=opset, metadata=metadata)
        temporary.write_bytes(content)
        agreement = check(temporary, model, log=log)
    log(f"{path}: {len(content) / 1e6:.1f} MB, opset {opset}, image uint8 RGB [batch, 3, height, width]")
    return agreement


def _serialized(model: nn.Module, *, opset: int, metadata: dict[str, str]) -> bytes:
    import onnx

    with _quiet():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, 97, 129, dtype=torch.uint8),),  # a side of 1 the exporter would take for fixed
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=["logits", "classes"],
            dynamic_shapes={"image": {0: "batch", 2: "height", 3: "width"}},
            verbose=False,
        )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    for part in (proto.graph, *proto.graph.node):  # the exporter's notes, with paths of source files on this machine
        del part.metadata_props[:]
    return proto.SerializeToString()


def check(file: Path, model: DeepLab, *, log: Callable[[str], None]) -> float:
    """The lowest share of pixels of a picture size whose class, by onnxruntime, is that of the model in float32.

    Raises InputError where it is below `LEAST_AGREEMENT`, or the logits are off by more than `LARGEST_ERROR`: where
    a model sees one class everywhere, the class map alone says little.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; below that onnxruntime writes to the screen
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    agreements = []
    for seed, size in enumerate(CHECKED_SIZES):
        images = smooth_pictures(*size, seed=seed)
        with torch.inference_mode():
            expected = model(normalize(images))  # [B, C, H, W]
        logits, classes = map(torch.from_numpy, session.run(["logits", "classes"], {"image": images.numpy()}))
        same = classes.view_as(expected[:, 0]) == expected.max(dim=1).indices  # [B, H, W]
        error = ((logits.view_as(expected) - expected).norm() / expected.norm().clamp_min(1e-12)).item()
        agreements.append(same.double().mean().item())
        found = f"{agreements[-1]:.3%} of the class map as in PyTorch, logits off by {error:.0e} of their norm"
        log(f"{' x '.join(map(str, images.shape))}: {found}")
        if not (agreements[-1] >= LEAST_AGREEMENT and error <= LARGEST_ERROR):  # NaN is refused too
            raise InputError(f"{found}, where {LEAST_AGREEMENT:.1%} and {LARGEST_ERROR:.0e} are needed")
    return min(agreements)


def smooth_pictures(batch: int, height: int, width: int, *, seed: int) -> torch.Tensor:
    """Soft blobs of all colours, uint8 `[batch, 3, height, width]`: in noise a network sees little but its mean."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    images = F.interpolate(coarse * 340 - 42, (height, width), mode="bicubic", align_corners=False)  # [B, 3, H, W]
    return images.clamp(0, 255).to(torch.uint8)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Makes one line of what the libraries inside raise, which is of any kind."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--export {path}: cannot be written ({error.strerror or error}); give another path"
        ) from None
    except Exception as error:
        told = str(error.__cause__ or error).strip() or type(error).__name__
        raise InputError(
            f"--export {path}: refused, nothing was written ({told.splitlines()[0][:300]}); try another "
            f"--export_opset, or pip install --upgrade {' '.join(PACKAGES)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints, warns and logs."""
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
