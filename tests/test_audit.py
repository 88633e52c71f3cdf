"""What no single file shows: classes without a pixel, palettes that differ, turned photographs, deep greys.

Training, test and doctor judge alike.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from datasets import build_dataset
from datasets.audit import absent_classes, mismatches
from datasets.files import read_image
from datasets.prepare.check import check_dataset
from tests.conftest import TINY, assert_refused, run_main, write_picture
from utils.errors import InputError

PHOTO = np.arange(40 * 56 * 3, dtype=np.uint32).reshape(40, 56, 3).astype(np.uint8)


def write_data(
    folder: Path, masks: dict[str, np.ndarray], class_names: str, lists: dict[str, str] | None = None
) -> Path:
    for number, (name, mask) in enumerate(masks.items()):
        write_picture(folder / "images" / f"{name}.png", PHOTO + np.uint8(number))
        write_picture(folder / "masks" / f"{name}.png", mask.astype(np.uint8))
    for name, ids in (lists or {"train": "a b c", "val": "d e"}).items():
        (folder / f"{name}.txt").write_text("\n".join(ids.split()))
    (folder / "class_names.txt").write_text("\n".join(class_names.split()))
    return folder


def halves(left: int, right: int) -> np.ndarray:
    return np.repeat([left, right], 28)[None].repeat(40, axis=0)


def absent(folder: Path, split: str = "train", *, allow_absent: bool = False):
    return list(absent_classes(build_dataset("folder", folder, split), allow_absent=allow_absent))


def train(folder: Path, tmp_path: Path, *flags: str):
    data = ["--dataset", "folder", "--data_root", folder, "--run_dir", tmp_path / "runs", "--run_name", "r"]
    return run_main(*data, *TINY, "--total_itrs", 1, *flags)


# Classes without a pixel


def test_masks_of_0_and_255_are_refused_with_the_command_that_converts_them(tmp_path):
    folder = write_data(tmp_path / "d", dict.fromkeys("abcde", halves(0, 255)), "background crack")
    result = train(folder, tmp_path)
    command = f"--images {folder} --out {folder}_converted"
    assert_refused(result, "no pixel of crack (id 1)", "0: 50.0%, 255 (void): 50.0%", "if 255 means crack", command)
    assert not (tmp_path / "runs").exists()
    (finding,) = check_dataset("folder", folder)[0]
    assert finding.fatal and f"{finding.path}: {finding.problem}" in result.stderr


def test_allow_absent_trains_all_the_same_and_the_mean_says_so(tmp_path):
    folder = write_data(tmp_path / "d", dict.fromkeys("abcde", halves(0, 1)), "sky road tree")
    result = train(folder, tmp_path, "--allow_absent")
    assert result.returncode == 0, result.stderr
    assert "warning: " in result.stdout and "no pixel of tree (id 2) in the 3 masks of train" in result.stdout
    (finding,) = check_dataset("folder", folder, allow_absent=True)[0]
    assert not finding.fatal
    test = train(folder, tmp_path, "--test_only")
    assert test.returncode == 0 and "no pixel of tree (id 2) in the 2 masks of val" in test.stdout


def test_a_class_that_only_other_splits_show_is_a_warning_with_the_way_out(tmp_path):
    masks = {**dict.fromkeys("abc", halves(0, 1)), **dict.fromkeys("de", halves(0, 2))}
    folder = write_data(tmp_path / "d", masks, "sky road tree")
    (finding,) = absent(folder)
    assert not finding.fatal and "tree (id 2)" in finding.problem and "but d.png shows it" in finding.problem
    assert "move some ids between the lists" in finding.problem
    for name in ("train", "val"):
        (folder / f"{name}.txt").unlink()
    for name in "abcde":
        write_picture(folder / "masks" / f"{name}.png", halves(0, 1).astype(np.uint8))
    unlucky = build_dataset("folder", folder, "val").ids[0]
    write_picture(folder / "masks" / f"{unlucky}.png", halves(0, 2).astype(np.uint8))
    (finding,) = absent(folder)
    assert not finding.fatal and "--random_seed" in finding.problem and "train.txt" in finding.problem


def test_ids_that_count_from_1_are_named_as_a_possibility(tmp_path):
    folder = write_data(
        tmp_path / "d", dict.fromkeys("abcde", halves(1, 2)), "sky road tree"
    )  # tree, 3, is in no mask
    (finding,) = absent(folder)
    assert finding.fatal and "if the ids count from 1, convert the masks" in finding.problem
    assert "--first_id 1" in finding.problem
    folder = write_data(tmp_path / "e", {**dict.fromkeys("abcde", halves(1, 2)), "b": halves(1, 3)}, "sky road tree")
    with pytest.raises(InputError, match=r"value 3 is neither .* --first_id 1 \(if the ids count from 1 to 3\)"):
        build_dataset("folder", folder, "train").mask(1)


@pytest.mark.parametrize("name", ["voc", "shapes"])
def test_on_published_and_generated_data_it_is_a_warning(voc_root, name, monkeypatch):
    findings = check_dataset(name, voc_root, ["train"])[0]
    assert [finding.fatal for finding in findings] == ([False] if name == "voc" else [])


def test_masks_are_read_until_each_class_has_been_seen(tmp_path, monkeypatch):
    folder = write_data(tmp_path / "d", dict.fromkeys("abcde", halves(0, 1)), "sky road")
    dataset, read = build_dataset("folder", folder, "train"), []
    mask = dataset.mask
    monkeypatch.setattr(dataset, "mask", lambda index: read.append(index) or mask(index))
    assert list(absent_classes(dataset, allow_absent=False)) == [] and read == [0]


def test_masks_that_cannot_be_read_are_left_to_their_reader(tmp_path):
    folder = write_data(tmp_path / "d", dict.fromkeys("abcde", halves(0, 1)), "sky road")
    (folder / "masks" / "a.png").write_bytes(b"no image")
    assert absent(folder) == []
    for name in "bcde":
        (folder / "masks" / f"{name}.png").write_bytes(b"no image")
    assert absent(folder) == []
    assert_refused(train(folder, tmp_path), "cannot be read as a mask")


def test_samples_that_skip_bad_leaves_out_are_not_counted(tmp_path):
    folder = write_data(tmp_path / "d", {**dict.fromkeys("bcde", halves(0, 1)), "a": halves(0, 2)}, "sky road tree")
    (folder / "images" / "a.png").write_bytes(b"no image")
    result = train(folder, tmp_path, "--skip_bad")
    assert (
        result.returncode == 0
        and "no pixel of tree (id 2) in the 2 masks of train, but a.png shows it" in result.stdout
    )


def test_a_mean_over_some_classes_says_so_in_log_and_card(tmp_path):
    folder = write_data(
        tmp_path / "d", {**dict.fromkeys("abc", halves(0, 1)), "d": halves(0, 0), "e": halves(0, 0)}, "sky road"
    )
    arguments = ["--dataset", "folder", "--data_root", folder, "--run_dir", tmp_path, "--run_name", "r", *TINY]
    main.main([*map(str, arguments), "--total_itrs", "1", "--lr", "0"])
    model = torch.load(tmp_path / "r/best.pth", weights_only=True)
    last = [name for name in model["model_state"] if name.startswith("classifier") and name.endswith("bias")][-1]
    model["model_state"][last] += torch.tensor([1e6, -1e6])  # sky everywhere
    torch.save(model, tmp_path / "r/best.pth")
    main.main([*map(str, arguments), "--test_only"])
    log = (tmp_path / "r/test_val/log.txt").read_text()
    lines = log.splitlines()
    assert lines[lines.index("Mean IoU: 1.000000") + 1] == "Classes in the mean: 1 of 2"
    assert json.loads((tmp_path / "r/test_val/card.json").read_text())["classes_in_mean"] == 1
    assert "road,nan,nan,nan,nan" in (tmp_path / "r/test_val/class_iou.csv").read_text().splitlines()


# Palettes


def write_palette_mask(path: Path, ids: np.ndarray, colours: list[tuple[int, int, int]]) -> None:
    mask = Image.fromarray(ids.astype(np.uint8))
    mask.putpalette([value for colour in colours for value in colour])
    mask.save(path)


def palette_data(folder: Path, second: list[tuple[int, int, int]], ids: np.ndarray) -> Path:
    write_data(folder, dict.fromkeys("abcde", halves(0, 1)), "sky road")
    for name in "abcde":
        write_palette_mask(folder / "masks" / f"{name}.png", halves(0, 1), [(0, 0, 0), (255, 0, 0)])
    write_palette_mask(folder / "masks" / "e.png", ids, second)
    return folder


def test_an_id_with_two_colours_is_refused_with_two_files_and_both_ways_out(tmp_path):
    folder = palette_data(tmp_path / "d", [(255, 0, 0), (0, 0, 0)], halves(0, 1))
    result = train(folder, tmp_path)
    assert_refused(result, "a.png: id 0 is #000000 here, but #ff0000 in", "e.png", "--kind colours", "--kind ids")
    (finding,) = check_dataset("folder", folder)[0]
    assert finding.fatal and finding.problem in result.stderr


@pytest.mark.parametrize(
    ("second", "ids"),
    [
        ([(0, 0, 0), (255, 0, 0), (9, 9, 9)], halves(0, 1)),  # a longer palette
        ([(0, 0, 0), (0, 0, 9)], halves(0, 0)),  # differs in an id that the file does not use
        ([(0, 0, 0), (1, 1, 1)], halves(0, 1)),  # a grey ramp says nothing
        ([(0, 0, 0)], halves(0, 0)),
    ],
)
def test_palettes_that_agree_in_what_is_used_are_accepted(tmp_path, second, ids):
    folder = palette_data(tmp_path / "d", second, ids)
    assert mismatches([build_dataset("folder", folder, split) for split in ("train", "val")]) == []


def test_pixels_are_not_read_where_palettes_agree(tmp_path, monkeypatch):
    folder = palette_data(tmp_path / "d", [(0, 0, 0), (255, 0, 0)], halves(0, 1))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were read"))
    assert mismatches([build_dataset("folder", folder, split) for split in ("train", "val")]) == []


# Orientation, transparency, deep greys


def write_photo(path: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def turned_data(folder: Path, orientation: int, size: tuple[int, int], mask: tuple[int, int]) -> Path:
    """Images of that size as they are stored, the first with the orientation and with a mask of another size."""
    stored = PHOTO[: size[0], : size[1]]
    write_data(folder, dict.fromkeys("abcde", np.arange(size[0] * size[1]).reshape(size) % 2), "sky road")
    for number, name in enumerate("abcde"):
        write_picture(folder / "images" / f"{name}.png", stored + np.uint8(number))
    write_photo(folder / "images" / "a.png", stored, orientation)
    write_picture(folder / "masks" / "a.png", (np.arange(mask[0] * mask[1]).reshape(mask) % 2).astype(np.uint8))
    return folder


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_photographs_are_turned_upright_in_training_as_in_predict(tmp_path, orientation):
    folder = turned_data(tmp_path, orientation, (40, 56), (56, 40))
    dataset = build_dataset("folder", folder, "train")
    assert torch.equal(dataset.pair(0)[0], read_image(folder / "images" / "a.png"))
    assert dataset.pair(0)[0].shape == (3, 56, 40) and mismatches([dataset]) == []


def test_an_image_whose_mask_fits_only_the_stored_pixels_is_kept_as_stored_with_a_warning(tmp_path):
    folder = turned_data(tmp_path / "d", 6, (40, 56), (40, 56))
    dataset = build_dataset("folder", folder, "train")
    stored = torch.from_numpy(PHOTO).permute(2, 0, 1)
    assert torch.equal(dataset.pair(0)[0], stored) and torch.equal(dataset.image(0), stored)
    (finding,) = mismatches([dataset])
    assert not finding.fatal and "its mask fits the stored pixels, so these are kept (1 files)" in finding.problem
    assert "predict has no mask and will turn" in finding.problem
    assert [finding.problem for finding in check_dataset("folder", folder)[0]] == [finding.problem]
    result = train(folder, tmp_path)
    assert result.returncode == 0 and finding.problem in result.stdout


@pytest.mark.parametrize(("orientation", "size"), [(3, (40, 56)), (6, (40, 40))])
def test_where_sizes_cannot_tell_the_image_is_upright_and_it_is_said(tmp_path, orientation, size):
    folder = turned_data(tmp_path, orientation, size, size)
    dataset = build_dataset("folder", folder, "train")
    assert torch.equal(dataset.pair(0)[0], read_image(folder / "images" / "a.png"))
    (finding,) = mismatches([dataset])
    assert not finding.fatal and "its size does not tell if the mask fits (1 files)" in finding.problem


def test_a_size_error_names_a_turn(tmp_path):
    folder = turned_data(tmp_path, 1, (40, 56), (56, 40))
    with pytest.raises(InputError, match=r"the mask is 40x56, its image 56x40; one of them is turned by 90 degrees"):
        build_dataset("folder", folder, "train").pair(0)
    folder = turned_data(tmp_path, 6, (40, 56), (30, 30))
    with pytest.raises(InputError, match=r"the mask is 30x30, its image 40x56; they must have the same size"):
        build_dataset("folder", folder, "train").pair(0)


def test_transparent_parts_are_white_in_training_too(tmp_path):
    folder = write_data(tmp_path, dict.fromkeys("abcde", halves(0, 1)), "sky road")
    pixels = np.dstack([PHOTO, np.where(halves(0, 1) == 1, 0, 255).astype(np.uint8)])
    write_picture(folder / "images" / "a.png", pixels)
    image = build_dataset("folder", folder, "train").pair(0)[0]
    assert (image[:, :, 28:] == 255).all() and torch.equal(
        image[:, :, :28], torch.from_numpy(PHOTO).permute(2, 0, 1)[:, :, :28]
    )


@pytest.mark.parametrize(("highest", "found"), [(1023, True), (4095, True), (4096, False), (65535, False)])
def test_values_of_10_and_12_bits_in_16_bit_images_are_said_and_not_scaled(tmp_path, highest, found):
    folder = write_data(tmp_path, dict.fromkeys("abcde", halves(0, 1)), "sky road")
    for name in "abcde":
        Image.fromarray(np.linspace(0, highest, 40 * 56).reshape(40, 56).astype(np.uint16)).save(
            folder / f"images/{name}.png"
        )
    findings = mismatches([build_dataset("folder", folder, split) for split in ("train", "val")])
    assert [finding.fatal for finding in findings] == [False] * found
    assert all(f"reach only {highest} of 65535" in finding.problem for finding in findings)
    assert int(read_image(folder / "images" / "a.png").max()) == round(highest / 257)
