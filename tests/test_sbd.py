import io
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from conftest import ROOT, assert_refused, before, write_picture
from filelock import FileLock
from PIL import Image

from datasets import build_dataset
from datasets.prepare import sbd
from datasets.voc import voc_colormap
from utils.errors import InputError

TRAIN, VAL = ["2007_000032", "2007_000039"], ["2007_000033", "2007_000042"]  # in VOC
SBD = {"train": ["2007_000032", "2008_000002", "2007_000042"], "val": ["2008_000007", "2010_000123"]}
ONLY_SBD = ["2008_000002", "2008_000007", "2010_000123"]  # in none of VOC's lists
SIZES = [(30, 41), (41, 30), (33, 36)]
CLS = "benchmark_RELEASE/dataset/cls"


def class_ids(id: str, source: str) -> np.ndarray:
    """Returns a mask that differs for each id and source, in the size of the id."""
    numbers = np.random.default_rng([int(id.replace("_", "")), source == "sbd"])
    height, width = SIZES[int(id[-1]) % len(SIZES)]
    mask = numbers.integers(0, 21, (height // 3 + 1, width // 3 + 1)).repeat(3, 0).repeat(3, 1)  # [H + 1.., W + 1..]
    mask = mask[:height, :width].astype(np.uint8)  # [H, W]
    if source == "voc":
        mask[:, ::7] = 255
    return mask


def mat(mask: object, *, field: str = "Segmentation", struct: str = "GTcls") -> bytes:
    """Returns a file like SBD's: a struct with the mask, a cell of sparse boundaries, the classes present."""
    boundaries = np.empty((20, 1), object)
    for row in range(20):
        boundaries[row, 0] = scipy.sparse.csc_matrix(np.eye(5, dtype=bool))
    present = np.setdiff1d(mask, [0]).astype(np.uint8)[:, None]
    content = {struct: {field: mask, "Boundaries": boundaries, "CategoriesPresent": present}}
    scipy.io.savemat(file := io.BytesIO(), content, do_compression=True)
    return file.getvalue()


def release() -> dict[str, bytes]:
    """Returns SBD's files by their names in the archive."""
    files = {f"{CLS}/{id}.mat": mat(class_ids(id, "sbd")) for ids in SBD.values() for id in ids}
    files |= {f"benchmark_RELEASE/dataset/img/{id}.jpg": b"an image" for id in ONLY_SBD}
    files |= {f"benchmark_RELEASE/dataset/inst/{id}.mat": b"instances" for id in ONLY_SBD}
    lists = {f"benchmark_RELEASE/dataset/{name}.txt": "\n".join(ids).encode() for name, ids in SBD.items()}
    return {"benchmark_RELEASE/README": b"read me", **files, **lists}


def archive(path: Path, files: dict[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def extracted(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    for id in [*TRAIN, *VAL, *ONLY_SBD]:
        height, width = class_ids(id, "sbd").shape
        write_picture(folder / "JPEGImages" / f"{id}.jpg", np.zeros((height, width, 3), np.uint8))
    for id in [*TRAIN, *VAL]:
        write_picture(folder / "SegmentationClass" / f"{id}.png", class_ids(id, "voc"))
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, ids in {"train": TRAIN, "val": VAL}.items():
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return archive(tmp_path / "benchmark.tgz", release())


def run(source: Path, voc: Path) -> None:
    sbd.main(["--sbd", str(source), "--data_root", str(voc.parent.parent)])


def assert_built(voc: Path) -> None:
    assert (voc / sbd.LIST).read_text().splitlines() == sorted(TRAIN + ONLY_SBD)
    assert sorted(path.name for path in (voc / sbd.MASKS).iterdir()) == [
        f"{id}.png" for id in sorted(TRAIN + ONLY_SBD)
    ]
    for id in TRAIN:
        name = f"{id}.png"
        assert (voc / sbd.MASKS / name).read_bytes() == (voc / "SegmentationClass" / name).read_bytes()
    for id in ONLY_SBD:
        with Image.open(voc / sbd.MASKS / f"{id}.png") as image:
            assert image.mode == "P"
            assert np.array_equal(image, class_ids(id, "sbd"))
            colours = np.array(image.convert("RGB"))
        assert np.array_equal(colours, voc_colormap()[class_ids(id, "sbd")])


def refuse(source: Path, voc: Path, capsys: pytest.CaptureFixture, *words: str) -> None:
    """Asserts exit code 2, one line with all the words, and that no list is written."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as refusal:
        run(source, voc)
    lines = capsys.readouterr().err.splitlines()
    assert refusal.value.code == 2
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert not (voc / sbd.LIST).exists()


def state(voc: Path) -> dict[str, tuple[int, int]]:
    paths = [voc / sbd.LIST, *(voc / sbd.MASKS).iterdir()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


def test_the_set_is_sbd_and_train_minus_val_and_vocs_masks_win(voc, source, capsys):
    run(source, voc)
    assert_built(voc)
    out = capsys.readouterr().out
    assert "3 masks from SBD, 2 from VOC; 1 of SBD left out (in val)" in out
    assert "5 images in train_aug, not 10582" in out
    assert f"next: python main.py --year 2012_aug --data_root {voc.parent.parent}" in out


@pytest.mark.parametrize("given", ["", "benchmark_RELEASE", "benchmark_RELEASE/dataset"])
def test_an_extracted_folder_works_at_any_of_its_levels(voc, tmp_path, given):
    extra = {f"{CLS}/._2008_000002.mat": b"of macOS", "benchmark_RELEASE/dataset/notes.txt": b"mine"}
    run(extracted(tmp_path / "sbd", release() | extra) / given, voc)
    assert_built(voc)


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:xz"])
def test_other_compressions_and_a_leading_dot_work(voc, tmp_path, mode):
    files = {f"./{name}": content for name, content in release().items()}
    run(archive(tmp_path / "packed", files | {f"./{CLS}/._2008_000002.mat": b"of macOS"}, mode), voc)
    assert_built(voc)


def test_an_id_of_val_is_left_out_even_if_train_lists_it(voc, source):
    with (voc / "ImageSets" / "Segmentation" / "train.txt").open("a") as file:
        file.write(f"{VAL[0]}\n")
    run(source, voc)
    assert_built(voc)


def test_main_opens_what_was_built(voc, source):
    run(source, voc)
    dataset = build_dataset("voc", voc.parent.parent, "train", year="2012_aug")
    assert dataset.ids == sorted(TRAIN + ONLY_SBD)
    for id, where in [("2008_000002", "sbd"), ("2007_000032", "voc")]:
        image, mask = dataset[dataset.ids.index(id)]
        assert image.shape[-2:] == mask.shape
        assert np.array_equal(mask.numpy(), class_ids(id, where))


def test_an_existing_set_is_left_unchanged_and_needs_no_source(voc, source, capsys):
    run(source, voc)
    before = state(voc)
    capsys.readouterr()
    run(voc / "nothing here", voc)
    assert "nothing to do" in capsys.readouterr().out
    assert state(voc) == before


@pytest.mark.parametrize("remnant", ["a missing mask", "an empty list"])
def test_a_set_with_a_gap_is_not_taken_as_complete(voc, source, remnant):
    run(source, voc)
    if remnant == "an empty list":
        (voc / sbd.LIST).write_text("")
    else:
        (voc / sbd.MASKS / "2008_000007.png").unlink()
    run(source, voc)
    assert_built(voc)


@pytest.mark.parametrize("after", range(6))  # 2 masks of VOC, 3 of SBD, the list
def test_an_interrupted_build_has_no_list_and_is_completed(voc, source, monkeypatch, after):
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as interrupted:
        before(patch, "utils.files.replacing", after + 1, interrupt)
        run(source, voc)
    assert interrupted.value.code == 130
    assert not (voc / sbd.LIST).exists()
    assert len(list((voc / sbd.MASKS).iterdir())) == after
    run(source, voc)
    assert_built(voc)


def test_masks_without_a_list_are_rewritten(voc, source):
    write_picture(voc / sbd.MASKS / "2008_000002.png", np.zeros((5, 5), np.uint8))
    write_picture(voc / sbd.MASKS / "2007_000032.png", np.zeros((5, 5), np.uint8))
    run(source, voc)
    assert_built(voc)


def test_two_builds_do_not_mix(voc, source, capsys):
    with FileLock(voc.parent.parent / "train_aug.txt.lock"):
        refuse(source, voc, capsys, "another process")
    run(source, voc)
    assert_built(voc)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{CLS}/../../../../2008_000009.mat", ["../2008_000009.mat"]),
        (f"../../{CLS}/2008_000009.mat", ["../../benchmark"]),
        (f"{CLS}/../cls/2008_000009.mat", ["../cls"]),
        (f"{CLS}/deeper/2008_000009.mat", ["deeper"]),
        (f"{CLS}/cat.mat", ["cat.mat"]),
        (f"{CLS}/2008_000009\nx.mat", ["2008_000009\\nx.mat"]),
    ],
)
def test_a_member_outside_the_folder_or_without_an_id_is_named_and_writes_nothing(voc, tmp_path, capsys, name, words):
    packed = archive(tmp_path / "benchmark.tgz", release() | {name: mat(class_ids("2008_000002", "sbd"))})
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    refuse(packed, voc, capsys, str(packed), *words)
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.parent for path in new} <= {voc / sbd.MASKS, voc.parent.parent}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_not_a_plain_file_is_named(voc, tmp_path, capsys, kind):
    member = tarfile.TarInfo(f"{CLS}/2008_000009.mat")
    member.type, member.linkname = kind, "/etc/passwd"
    refuse(archive(tmp_path / "benchmark.tgz", release() | {member.name: member}), voc, capsys, member.name)


def test_a_stray_file_in_a_folder_is_named(voc, tmp_path, capsys):
    folder = extracted(tmp_path / "sbd", release())
    (folder / CLS / "2008_000009.mat").mkdir()
    refuse(folder, voc, capsys, f"{CLS}/2008_000009.mat")
    (folder / CLS / "2008_000009.mat").rename(folder / "away")
    (folder / CLS / "cat.mat").write_bytes(b"")
    refuse(folder, voc, capsys, f"{CLS}/cat.mat")


HEIGHT, WIDTH = class_ids("2008_000002", "sbd").shape
BAD_MASKS = {
    "no MATLAB file": (b"not a .mat file", ["cannot be read"]),
    "empty": (b"", ["cannot be read"]),
    "cut": (mat(class_ids("2008_000002", "sbd"))[:300], ["cannot be read"]),
    "no GTcls": (mat(class_ids("2008_000002", "sbd"), struct="GTinst"), ["KeyError", "GTcls"]),
    "no Segmentation": (mat(class_ids("2008_000002", "sbd"), field="Mask"), ["Segmentation", "cannot be read"]),
    "floats": (mat(np.zeros((HEIGHT, WIDTH))), ["not a uint8 matrix"]),
    "a volume": (mat(np.zeros((HEIGHT, WIDTH, 3), np.uint8)), ["not a uint8 matrix"]),
    "a class too many": (mat(np.full((HEIGHT, WIDTH), 21, np.uint8)), ["value 21", "0..20"]),
    "turned": (mat(np.zeros((WIDTH, HEIGHT), np.uint8)), [f"{HEIGHT}x{WIDTH}", f"{WIDTH}x{HEIGHT}"]),
}


@pytest.mark.parametrize("fault", BAD_MASKS)
def test_a_bad_mask_is_named(voc, tmp_path, capsys, fault):
    content, words = BAD_MASKS[fault]
    folder = extracted(tmp_path / "sbd", release() | {f"{CLS}/2008_000002.mat": content})
    refuse(folder, voc, capsys, "cls/2008_000002.mat", *words)


def test_void_in_a_mask_of_sbd_is_kept(voc, tmp_path):
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    run(extracted(tmp_path / "sbd", release() | {f"{CLS}/2008_000002.mat": mat(mask)}), voc)
    assert np.array_equal(Image.open(voc / sbd.MASKS / "2008_000002.png"), mask)


def test_damaged_bytes_give_a_mask_or_one_line_never_a_traceback():
    good, numbers, refused = mat(class_ids("2008_000002", "sbd")), random.Random(1), 0
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(numbers.randint(1, 4)):
            damaged[numbers.randrange(len(damaged))] = numbers.randrange(256)
        try:
            mask = sbd._class_ids(bytes(damaged), scipy.io.loadmat, "here")
            assert mask.dtype == np.uint8 and mask.ndim == 2
        except InputError as error:
            refused += 1
            assert str(error).startswith("here: ") and "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_truncated_archive_is_refused_wherever_it_was_cut(voc, tmp_path, capsys, mode):
    whole = archive(tmp_path / "whole", release(), mode).read_bytes()
    # The last quarter of a plain tar holds the lists and the padding after them.
    for share in (0, 0.1, 0.3, 0.5, 0.7):
        cut = tmp_path / "benchmark.tgz"
        cut.write_bytes(whole[: int(len(whole) * share) // 512 * 512])
        refuse(cut, voc, capsys, str(cut), "benchmark.tgz")


def test_masks_in_sbds_lists_must_exist(voc, tmp_path, capsys):
    files = release()
    del files[f"{CLS}/2008_000007.mat"]
    refuse(extracted(tmp_path / "a", files), voc, capsys, "lacks cls/2008_000007.mat (1 such")
    files = release()
    del files["benchmark_RELEASE/dataset/val.txt"]
    refuse(archive(tmp_path / "b.tgz", files), voc, capsys, "lacks dataset/val.txt")


def test_an_invalid_source_is_named(voc, tmp_path, capsys):
    refuse(tmp_path / "none.tgz", voc, capsys, "none.tgz", "no such", "https://")
    refuse(voc, voc, capsys, str(voc), "dataset/cls")
    (tmp_path / "text.tgz").write_text("not found" * 200)
    refuse(tmp_path / "text.tgz", voc, capsys, "text.tgz", "cannot be read")
    refuse(archive(tmp_path / "other.tgz", {"a/b.txt": b"c"}), voc, capsys, "other.tgz", "lacks dataset/train.txt")


def test_an_image_that_voc_lacks_is_named_and_counted(voc, source, capsys):
    for id in ("2008_000007", "2010_000123"):
        (voc / "JPEGImages" / f"{id}.jpg").unlink()
    refuse(source, voc, capsys, "2008_000007.jpg", "2 such images")


def test_an_image_of_voc_that_is_missing_or_of_another_size_is_named(voc, source, capsys):
    image = voc / "JPEGImages" / f"{TRAIN[0]}.jpg"
    write_picture(image, np.zeros((9, 9, 3), np.uint8))
    refuse(source, voc, capsys, f"{TRAIN[0]}.png", "9x9")
    image.write_bytes(b"no image")
    refuse(source, voc, capsys, f"{TRAIN[0]}.jpg", "cannot be read")
    image.unlink()
    refuse(source, voc, capsys, f"{TRAIN[0]}.jpg", "missing")


@pytest.mark.parametrize("part", ["", "ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"])
def test_a_part_of_voc_that_is_missing_is_named(voc, source, capsys, part):
    (voc / part).rename(voc.parent / "away")
    refuse(source, voc, capsys, str(voc / part))


def test_a_folder_that_cannot_be_written_is_named(voc, source, capsys):
    (voc / sbd.MASKS).write_text("a file")
    refuse(source, voc, capsys, sbd.MASKS, "cannot be written")


def test_missing_scipy_is_named_with_its_install_command(voc, source, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refuse(source, voc, capsys, "pip install scipy")


def test_the_command_refuses_in_one_line(tmp_path):
    command = [sys.executable, "-m", "datasets.prepare.sbd", "--sbd", str(tmp_path), "--data_root", str(tmp_path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert_refused(refused, str(tmp_path / "VOCdevkit" / "VOC2012"), "--data_root", "main.py --download first")


def test_the_command_has_help(capsys):
    with pytest.raises(SystemExit) as done:
        sbd.main(["--help"])
    out = capsys.readouterr().out
    assert not done.value.code and "--sbd" in out and "--data_root" in out and "datasets.prepare.sbd" in out


def test_an_archive_whose_header_makes_no_sense_is_refused(voc, tmp_path, capsys):
    odd = tarfile.TarInfo("benchmark_RELEASE/dataset/cls/2008_000099.mat")
    odd.pax_headers = {"GNU.sparse.map": "a,b"}
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(odd)
    refuse(path, voc, capsys, "cannot be read")
