"""Small data sets on disk, and `main.py` run as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.voc import VOC_CLASSES, voc_colormap
from utils import engine

ROOT = Path(__file__).parent.parent
TINY = (
    "--model deeplabv3plus_mobilenet_v3_large --backbone_weights none --device cpu --amp off --num_workers 0 "
    "--crop_size 33 --batch_size 2 --val_batch_size 2 --print_interval 1 --lr 0.05"
).split()


@pytest.fixture(autouse=True)
def few_threads():
    """Tiny tensors gain nothing from threads, and two threads of a busy machine wait for each other."""
    torch.set_num_threads(1)


def write_picture(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if array.ndim == 2 and path.suffix == ".png":
        picture.putpalette(voc_colormap().tobytes())
    picture.save(path)


def write_voc_layout(
    folder: Path, splits: dict[str, list[str]], *, class_names: list[str] | None = None, sizes=((40, 52), (52, 40))
) -> Path:
    """Pictures and masks (four vertical bands of classes 0..3 with 255 between them) that go with each other."""
    names = VOC_CLASSES if class_names is None else class_names
    for number, name in enumerate(sorted({name for ids in splits.values() for name in ids})):
        height, width = sizes[number % len(sizes)]
        rng = np.random.default_rng(number)
        mask = np.repeat((np.arange(width) * 4 // width)[None], height, axis=0).astype(np.uint8)
        mask = np.minimum(mask, len(names) - 1).astype(np.uint8)
        image = (mask[..., None] * 60 + rng.integers(0, 30, (height, width, 3))).astype(np.uint8)
        mask[:, 1:][mask[:, 1:] != mask[:, :-1]] = 255
        write_picture(folder / "JPEGImages" / f"{name}.jpg", image)
        write_picture(folder / "SegmentationClass" / f"{name}.png", mask)
    for split, ids in splits.items():
        path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in ids))
    if class_names is not None:
        (folder / "class_names.txt").write_text("\n".join(class_names) + "\n")
    return folder


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    """A root with VOCdevkit/VOC2012: 4 training and 3 validation pictures of two sizes."""
    splits = {"train": ["a1", "a2", "a3", "a4"], "val": ["b1", "b2", "b3"]}
    write_voc_layout(tmp_path / "VOCdevkit" / "VOC2012", splits)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same as one's own folder, with four classes of which none is a background."""
    splits = {"train": ["a1", "a2", "a3", "a4"], "val": ["b1", "b2", "b3"]}
    return write_voc_layout(tmp_path / "own", splits, class_names=["sky", "road", "tree", "car"])


def run_main(*arguments: object, script: str = "main.py", cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A script in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


def before(monkeypatch: pytest.MonkeyPatch, name: str, call: int, do: Callable[..., None]) -> None:
    """Makes `do(*arguments)` happen before that call of a public function: `evaluate` or `forward_backward` of
    `utils.engine`, whichever module calls it, or a whole path such as `torch.save`."""
    owner, _, attribute = name.rpartition(".")
    owner = resolve_name(owner) if owner else engine
    inner, calls = getattr(owner, attribute), []

    def wrapped(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            do(*arguments)
        return inner(*arguments, **keywords)

    users = [module for module in list(sys.modules.values()) if vars(module).get(attribute) is inner]
    for place in {id(place): place for place in (owner, *users)}.values():
        monkeypatch.setattr(place, attribute, wrapped)


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, one line on stderr that has all the words, no traceback."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """`real_data(name)`: that folder of the real data that SEG_REAL_DATA names; the test is skipped without it."""

    def find(name: str) -> Path:
        root = os.environ.get("SEG_REAL_DATA")
        if not root:
            pytest.skip(f"SEG_REAL_DATA is not set: it names the folder that holds {name}/")
        if not (Path(root) / name).is_dir():
            pytest.skip(f"SEG_REAL_DATA={root} has no folder {name}/")
        return Path(root) / name

    return find
