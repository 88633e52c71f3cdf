"""Builds the augmented training set of PASCAL VOC 2012: 10,582 images, annotated by VOC and SBD.

    python -m datasets.prepare.sbd --sbd benchmark.tgz    # once; also takes the extracted folder
    python main.py --year 2012_aug                        # trains on it

SBD (Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011) annotates 11,355 VOC images, but its own
splits overlap VOC's. The set is everything in SBD or in VOC's `train`, minus VOC's `val`. If both have a mask, VOC's
is copied byte for byte, because SBD's masks have no void borders. All the images are in VOC's `JPEGImages`.
"""

import io
import lzma
import re
import shlex
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from torchvision.datasets import SBDataset
from tqdm import tqdm

from datasets.files import UNREADABLE, VOID, read_ids
from datasets.prepare.download import BAD_TAR
from datasets.voc import VOC_CLASSES, VOCSegmentation, voc_colormap
from utils.cli import Parser, friendly_errors
from utils.errors import InputError
from utils.files import cannot_write, make_folder, replacing, write_text

NUM_IMAGES, NUM_SBD = 10_582, 11_355  # in the built set; in SBD
LIST, MASKS = "ImageSets/Segmentation/train_aug.txt", "SegmentationClassAug"
SBD_LISTS = {"train.txt", "val.txt"}  # together they name every mask of SBD
WANTED = re.compile(r"(?:.*/)?dataset/(cls/(?!\._).+\.mat|train\.txt|val\.txt)", re.DOTALL)  # macOS adds ._ files
PLAIN = re.compile(r"cls/[0-9]{4}_[0-9]{6}\.mat|train\.txt|val\.txt")  # an id of digits cannot leave its folder
DAMAGED = (*BAD_TAR, OSError, EOFError, zlib.error, lzma.LZMAError)  # raised for a bad tar, whatever its compression


def built_ids(root: str | Path) -> list[str] | None:
    """Returns the ids of the set under `root`, or None if its list or any mask is missing."""
    voc = Path(root) / "VOCdevkit" / "VOC2012"
    if not (voc / LIST).is_file() or not (voc / LIST).stat().st_size:
        return None
    ids = read_ids(voc / LIST)
    return ids if {path.stem for path in (voc / MASKS).glob("*.png")}.issuperset(ids) else None


def build(sbd: str | Path, root: str | Path) -> dict[str, int]:
    """Writes `SegmentationClassAug/<id>.png`, then `train_aug.txt`. Rewrites masks that an interrupted build left.

    sbd: `benchmark.tgz` (compressed or not; nothing is extracted to disk) or the extracted folder.
    Returns the number of masks from "sbd" and from "voc", and of SBD's masks left out because they are in "val".
    Raises InputError for missing, damaged or truncated files, and for a mask that does not match its image.
    """
    sbd, root = Path(sbd), Path(root)
    voc = root / "VOCdevkit" / "VOC2012"
    if not voc.is_dir():
        advice = "set --data_root to the folder that holds VOCdevkit, or run main.py --download first"
        raise InputError(f"{voc}: there is no such folder; {advice}")
    if not sbd.exists():
        raise InputError(f"--sbd {sbd}: there is no such archive or folder; get it from {SBDataset.url}")
    own = VOCSegmentation(root)
    own.require_masks()
    own.require_images()
    val_ids = set(read_ids((voc / LIST).with_name("val.txt")))
    try:
        from scipy.io import loadmat  # nothing else needs scipy
    except ImportError:
        raise InputError("--sbd: reading SBD's .mat files needs scipy; run pip install scipy") from None
    try:
        with FileLock(root / "train_aug.txt.lock", timeout=0):
            return _build(sbd, voc, own=own, val_ids=val_ids, loadmat=loadmat)
    except Timeout:
        raise InputError(f"{root}: another process is building the set there; wait until it is done") from None
    except OSError as error:
        raise cannot_write(Path(error.filename or voc), error) from None


def _build(
    sbd: Path, voc: Path, *, own: VOCSegmentation, val_ids: set[str], loadmat: Callable[..., dict]
) -> dict[str, int]:
    make_folder(voc / MASKS)
    own_ids, palette = set(own.ids) - val_ids, voc_colormap().tobytes()
    not_needed = own_ids | val_ids
    for index, id in enumerate(own.ids):
        if id in own_ids:
            _require_size(own.mask(index).numpy(), own.images[index], str(own.masks[index]))
            with replacing(voc / MASKS / f"{id}.png") as temporary:
                temporary.write_bytes(own.masks[index].read_bytes())
    found, named, lists, without_image = set(), set(), set(), set()
    files = tqdm(_files(sbd), "reading SBD", NUM_SBD + len(SBD_LISTS), unit="file", disable=None)
    for name, data in files:
        if name in SBD_LISTS:
            lists.add(name)
            named.update(data.decode(errors="replace").split())
            continue
        id, jpeg = Path(name).stem, voc / "JPEGImages" / f"{Path(name).stem}.jpg"
        found.add(id)
        if id in not_needed:
            continue
        if not jpeg.is_file():
            without_image.add(id)
            continue
        mask = _class_ids(data, loadmat, f"{sbd}: {name}")
        _require_size(mask, jpeg, f"{sbd}: {name}")
        image = Image.fromarray(mask)
        image.putpalette(palette)
        with replacing(voc / MASKS / f"{id}.png") as temporary:
            image.save(temporary, "PNG")
    # A truncated tar or folder does not show by itself that its end is missing.
    if lacks := [f"dataset/{name}" for name in SBD_LISTS - lists] or [f"cls/{id}.mat" for id in named - found]:
        raise InputError(f"--sbd {sbd}: lacks {min(lacks)} ({len(lacks)} such files); get all of {SBDataset.url}")
    if without_image:
        jpeg = voc / "JPEGImages" / f"{min(without_image)}.jpg"
        raise InputError(f"{jpeg}: missing ({len(without_image)} such images of SBD); add all images of VOC 2012")
    # Last, because a set without its list counts as not built.
    write_text(voc / LIST, "".join(f"{id}\n" for id in sorted(found | own_ids) if id not in val_ids))
    return {"sbd": len(found - not_needed), "voc": len(own_ids), "val": len(found & val_ids)}


def _files(sbd: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the files of SBD's folder `dataset` with their contents: `train.txt`, `val.txt` and `cls/<id>.mat`."""
    try:
        if sbd.is_dir():
            folders = (sbd, sbd / "dataset", sbd / "benchmark_RELEASE" / "dataset")
            dataset = next((folder for folder in folders if (folder / "cls").is_dir()), None)
            if dataset is None:
                raise InputError(
                    f"--sbd {sbd}: has no dataset/cls; give benchmark.tgz or the folder benchmark_RELEASE"
                )
            for path in sorted([*dataset.glob("*.txt"), *(dataset / "cls").glob("*.mat")]):
                name = path.relative_to(dataset).as_posix()
                if WANTED.fullmatch(f"dataset/{name}"):
                    _require_plain(sbd, str(path.relative_to(sbd)), name=name, is_file=path.is_file())
                    yield name, path.read_bytes()
        else:
            with tarfile.open(sbd) as archive:
                for member in archive:
                    if match := WANTED.fullmatch(member.name):
                        _require_plain(sbd, member.name, name=match[1], is_file=member.isreg())
                        yield match[1], archive.extractfile(member).read()
    except InputError:
        raise
    except DAMAGED as error:
        # tarfile writes a line for each compression.
        reason = " ".join(str(error).split())
        raise InputError(f"--sbd {sbd}: cannot be read ({reason}); get it again from {SBDataset.url}") from None


def _require_plain(sbd: Path, path: str, *, name: str, is_file: bool) -> None:
    if not (is_file and PLAIN.fullmatch(name)) or ".." in Path(path).parts:
        raise InputError(f"--sbd {sbd}: {path!r} is not a plain file cls/<year>_<number>.mat; remove it")


def _class_ids(data: bytes, loadmat: Callable[..., dict], where: str) -> np.ndarray:
    """Reads the mask in a .mat file of SBD, uint8 class ids `[H, W]`. `where` names the file in errors."""
    try:
        mask = loadmat(io.BytesIO(data), variable_names="GTcls")["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # scipy guarantees nothing: damaged bytes also raise TypeError and IndexError
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{where}: GTcls.Segmentation cannot be read ({reason}); get SBD again") from None
    if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8 or mask.ndim != 2:
        raise InputError(f"{where}: GTcls.Segmentation is not a uint8 matrix; get SBD again")
    stray = mask[(mask >= len(VOC_CLASSES)) & (mask != VOID)]
    if stray.size:
        classes = f"a class (0..{len(VOC_CLASSES) - 1})"
        raise InputError(f"{where}: value {stray[0]} is neither {classes} nor void ({VOID}); get SBD again")
    return mask


def _require_size(mask: np.ndarray, jpeg: Path, where: str) -> None:
    """Raises InputError unless the mask `[H, W]` has the size given in the image's header."""
    try:
        with Image.open(jpeg) as image:
            width, height = image.size
    except UNREADABLE as error:
        raise InputError(f"{jpeg}: cannot be read as an image ({error}); replace it") from None
    if mask.shape != (height, width):
        raise InputError(
            f"{where}: the mask is {mask.shape[1]}x{mask.shape[0]}, its image {jpeg} {width}x{height}; "
            "they must have the same size, take both from the original releases"
        )


@friendly_errors
def main(argv: list[str] | None = None) -> None:
    """Runs the command line above."""
    parser = Parser(
        prog="python -m datasets.prepare.sbd", description="Build VOC 2012's augmented training set from SBD."
    )
    add = parser.add_argument
    add("--sbd", required=True, metavar="PATH", help="benchmark.tgz, or the folder extracted from it")
    add("--data_root", default="datasets/data", metavar="DIR", help="the folder that holds VOCdevkit")
    args = parser.parse_args(argv)
    ids = built_ids(args.data_root)
    if ids is not None:
        path = Path(args.data_root) / "VOCdevkit" / "VOC2012" / LIST
        print(f"{path} exists with all its masks: nothing to do (delete it to rebuild the set)")
    else:
        counts = build(args.sbd, args.data_root)
        print(f"{counts['sbd']} masks from SBD, {counts['voc']} from VOC; {counts['val']} of SBD left out (in val)")
        ids = built_ids(args.data_root)
    differs = "" if len(ids) == NUM_IMAGES else f", not {NUM_IMAGES}: SBD or VOC's lists differ from the releases"
    print(f"{len(ids)} images in train_aug{differs}")
    root = "" if args.data_root == parser.get_default("data_root") else f" --data_root {shlex.quote(args.data_root)}"
    print(f"next: python main.py --year 2012_aug{root}")


if __name__ == "__main__":
    main()
