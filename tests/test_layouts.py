"""The folders that annotation tools write open as they are: layouts, names of files, lists and class names."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from datasets.folder import FolderSegmentation
from tests.conftest import write_picture
from utils.errors import InputError

MASK = np.repeat(np.arange(2, dtype=np.uint8), 4)[None].repeat(6, axis=0)  # 6 x 8, left 0, right 1
PHOTO = np.full((6, 8, 3), 90, np.uint8)
NAMES = ["train/a", "train/b", "train/c", "val/d", "test/e"]


def write_pairs(folder: Path, image: str, mask: str, names: list[str], class_names: str = "sky\nroad\n") -> Path:
    """Writes pairs. `{0}` stands for the split in front of a name, `{1}` for the name."""
    for name in names:
        write_picture(folder / image.format(*name.split("/")), PHOTO)
        write_picture(folder / mask.format(*name.split("/")), MASK)
    (folder / "class_names.txt").write_text(class_names)
    return folder


def opened(folder: Path, split: str, **options) -> list[str]:
    """The ids of a split, all of whose pairs can be read."""
    dataset = FolderSegmentation(folder, split, **options)
    assert all(dataset.pair(index)[1].tolist() == MASK.tolist() for index in range(len(dataset)))
    return dataset.ids


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{0}/{1}.jpg", "masks/{0}/{1}.png"),
        ("images/{0}/{1}.jpg", "labels/{0}/{1}.png"),
        ("images/{0}/{1}.JPG", "annotations/{0}/{1}.PNG"),
        ("img_dir/{0}/{1}.jpg", "ann_dir/{0}/{1}.png"),
        ("{0}/images/{1}.jpg", "{0}/masks/{1}.png"),
        ("{0}/img_dir/{1}.png", "{0}/ann_dir/{1}.png"),
        ("{0}/JPEGImages/{1}.jpg", "{0}/SegmentationClass/{1}.png"),
        ("{0}/{1}.jpg", "{0}/{1}_mask.png"),
        ("{0}/{1}.jpg", "{0}/{1}.png"),
        ("images/{0}/{1}.jpg", "masks/{0}/{1}_mask.png"),
        ("images/{0}/{1}.jpg", "masks/{0}/{1}.jpg.png"),
        ("images/{0}/{1}.jpg", "masks/{0}/{1}.bmp"),
        ("images/{0}/{1}.jpg", "masks/{0}/{1}.tif"),
        ("images/{0}/{1}.jpg", "masks/{0}/{1}.GIF"),
    ],
)
def test_folders_of_splits_above_or_below_images_and_masks_are_the_splits(tmp_path, image, mask):
    folder = write_pairs(tmp_path, image, mask, NAMES)
    splits = {split: opened(folder, split) for split in ("train", "val", "test")}
    assert splits == {"train": ["train/a", "train/b", "train/c"], "val": ["val/d"], "test": ["test/e"]}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{1}.jpg", "masks/{1}.png"),
        ("{1}.jpg", "{1}_mask.png"),
        ("JPEGImages/{1}.jpg", "SegmentationClass/{1}.png"),
    ],
)
def test_ids_without_lists_or_folders_are_divided_in_the_order_of_their_names(tmp_path, image, mask):
    folder = write_pairs(tmp_path, image, mask, [f"/{number:02}" for number in range(20)])
    train, val = (FolderSegmentation(folder, split, seed=3) for split in ("train", "val"))
    assert val.ids == ["08", "12", "16", "18"]  # as versions that knew only VOC's layout drew them
    assert sorted(train.ids + val.ids) == [f"{number:02}" for number in range(20)] and train.made_split


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_valid_and_validation_are_val(tmp_path, name):
    folder = write_pairs(tmp_path, "{0}/{1}.jpg", "{0}/{1}_mask.png", ["train/a", f"{name}/b"])
    assert opened(folder, "val") == [f"{name}/b"] == opened(folder, name)


def test_train_without_val_is_divided_and_test_is_not_validated_on(tmp_path):
    folder = write_pairs(tmp_path, "images/{0}/{1}.jpg", "masks/{0}/{1}.png", NAMES[:3] + NAMES[4:])
    train, val = opened(folder, "train"), opened(folder, "val")
    assert sorted(train + val) == NAMES[:3] and len(val) == 1
    assert opened(folder, "test") == ["test/e"]
    assert opened(folder, "train", named=("train", "test")) == NAMES[:3]  # the user validates on test


@pytest.mark.parametrize("lists", ["ImageSets/Segmentation", "."])
def test_lists_count_more_than_folders(tmp_path, lists):
    folder = write_pairs(tmp_path, "images/{0}/{1}.jpg", "masks/{0}/{1}.png", NAMES)
    (folder / lists).mkdir(parents=True, exist_ok=True)
    (folder / lists / "train.txt").write_text("val/d\n")
    (folder / lists / "val.txt").write_text("train/a\n")
    assert (opened(folder, "train"), opened(folder, "val")) == (["val/d"], ["train/a"])


def test_a_single_list_of_another_name_is_divided_unless_it_is_asked_for(tmp_path):
    folder = write_pairs(tmp_path, "JPEGImages/{1}.jpg", "SegmentationClass/{1}.png", NAMES)
    path = folder / "ImageSets" / "Segmentation" / "default.txt"
    path.parent.mkdir(parents=True)
    path.write_text("a\nb\nd\n")  # not all
    train, val = FolderSegmentation(folder, "train"), FolderSegmentation(folder, "val")
    assert sorted(train.ids + val.ids) == ["a", "b", "d"] and train.made_split and val.made_split
    assert opened(folder, "default") == ["a", "b", "d"]
    with pytest.raises(
        InputError, match=r"val\.txt: there is no such split list; choose from default with --train_split"
    ):
        FolderSegmentation(folder, "val", named=("default", "val"))


def test_a_list_named_train_alone_is_not_divided(tmp_path):
    folder = write_pairs(tmp_path, "JPEGImages/{1}.jpg", "SegmentationClass/{1}.png", NAMES)
    (folder / "train.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"val\.txt: there is no such split list; choose from train with"):
        FolderSegmentation(folder, "val")


@pytest.mark.parametrize(
    "line",
    [
        "a.jpg",
        "a.JPG",
        "a -1",
        "a  1",
        "JPEGImages/a.jpg",
        "/JPEGImages/a.jpg /SegmentationClass/a.png",
        "a.jpg a.png",
    ],
)
def test_lists_may_have_suffixes_and_the_second_column_of_voc(tmp_path, line):
    folder = write_pairs(tmp_path, "JPEGImages/{1}.jpg", "SegmentationClass/{1}.png", NAMES)
    (folder / "train.txt").write_text(f"{line}\n")
    assert opened(folder, "train") == ["a"]


def test_an_id_that_looks_like_a_file_name_or_has_a_space_is_an_id(tmp_path):
    folder = write_pairs(tmp_path, "images/{1}.jpg", "masks/{1}.png", ["/a.jpg", "/b 1", "/c"])
    (folder / "train.txt").write_text("a.jpg\nb 1\nc\n")
    assert opened(folder, "train") == ["a.jpg", "b 1", "c"]


def test_what_systems_leave_behind_is_neither_a_sample_nor_a_list(tmp_path):
    folder = write_pairs(tmp_path, "{0}/{1}.jpg", "{0}/{1}_mask.png", NAMES)
    for path in (
        "train/._a.jpg",
        "train/._a_mask.png",
        "train/.DS_Store",
        "train/Thumbs.db",
        "train/.hidden/x_mask.png",
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"no image")
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "._train.txt").write_bytes(b"\0\5\26\7")
    assert opened(folder, "train") == ["train/a", "train/b", "train/c"]


def test_composed_and_decomposed_forms_of_a_name_are_one(tmp_path):
    folder, name = tmp_path, "stra\u00dfe_\u00fc"
    composed, decomposed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    assert composed != decomposed
    write_pairs(folder, "images/{1}.jpg", "masks/{1}.png", ["/b"])
    write_picture(folder / "images" / f"{composed}.jpg", PHOTO)
    write_picture(folder / "masks" / f"{decomposed}.png", MASK)
    (folder / "train.txt").write_text(f"{decomposed}\n", encoding="utf-8")
    assert opened(folder, "train") == [composed]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["images/a.jpg", "images/a.png", "masks/a.png"], r"images/a\.jpg: a\.png beside it has the same id"),
        (["images/a.jpg", "masks/a.png", "masks/a_mask.png"], r"masks/a\.png: a_mask\.png beside it has the same id"),
        (["images/a.jpg", "masks/a.png", "masks/a.bmp"], r"masks/a\.bmp: a\.png beside it has the same id"),
    ],
)
def test_ambiguous_names_are_refused_with_the_candidates(tmp_path, files, message):
    for path in (*files, "images/b.jpg", "masks/b.png"):
        write_picture(tmp_path / path, MASK if "masks" in path else PHOTO)
    (tmp_path / "class_names.txt").write_text("sky\nroad\n")
    with pytest.raises(InputError, match=message):
        [FolderSegmentation(tmp_path, split) for split in ("train", "val")]


def test_a_file_outside_the_folders_of_splits_is_refused(tmp_path):
    folder = write_pairs(tmp_path, "images/{0}/{1}.jpg", "masks/{0}/{1}.png", [*NAMES, "extra/f"])
    with pytest.raises(InputError, match=r"masks/extra/f\.png: lies outside the folders train, val, test"):
        FolderSegmentation(folder)


def test_jpeg_masks_are_refused_with_the_reason_and_the_converter(tmp_path):
    folder = write_pairs(tmp_path, "images/{0}/{1}.jpg", "masks/{0}/{1}.jpg", NAMES)
    message = rf"a JPEG mask, whose lossy .* --images {folder} --out {folder}_converted"
    with pytest.raises(InputError, match=message):
        opened(folder, "train")


def test_a_jpeg_beside_a_mask_is_an_illustration(tmp_path):
    folder = write_pairs(tmp_path, "images/{0}/{1}.jpg", "masks/{0}/{1}.png", NAMES)
    write_picture(folder / "masks" / "train" / "a.jpg", PHOTO)
    assert opened(folder, "train") == NAMES[:3]


@pytest.mark.parametrize(
    "files",
    [
        ["images/a.jpg", "labels/a.txt"],
        ["images/train/a.jpg", "labels/train/a.txt"],
        ["train/images/a.jpg", "train/labels/a.txt"],
        ["images/a.jpg", "annotations/instances_train.json"],
        ["train/a.jpg", "train/_annotations.coco.json"],
        ["a.jpg", "a.json"],
        ["images/a.jpg", "annotations/a.json"],
    ],
)
def test_polygons_lead_to_the_converter(tmp_path, files):
    for path in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        write_picture(tmp_path / path, PHOTO) if path.endswith("jpg") else (tmp_path / path).write_text("{}")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(InputError, match="holds polygons, not a mask; convert them") as refused:
        FolderSegmentation(tmp_path)
    assert str(refused.value).endswith(f"--images {tmp_path} --out {tmp_path}_converted")


def test_a_folder_without_masks_is_refused(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg", PHOTO)
    with pytest.raises(InputError, match="has no masks; docs/own_masks.md"):
        FolderSegmentation(tmp_path)


# Class names


@pytest.mark.parametrize("name", ["class_names.txt", "classes.txt", "labels.txt"])
def test_class_names_may_be_in_any_of_three_files(tmp_path, name):
    folder = write_pairs(tmp_path, "images/{0}/{1}.jpg", "masks/{0}/{1}.png", NAMES)
    (folder / "class_names.txt").rename(folder / name)
    assert FolderSegmentation(folder).class_names == ["sky", "road"]


def test_roboflows_list_lies_in_the_folder_of_a_split(tmp_path):
    folder = write_pairs(
        tmp_path, "{0}/{1}.jpg", "{0}/{1}_mask.png", [name.replace("val", "valid") for name in NAMES]
    )
    (folder / "class_names.txt").unlink()
    for split in ("train", "valid", "test"):
        (folder / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, road\n")
    assert FolderSegmentation(folder).class_names == ["background", "road"]
    assert opened(folder, "val") == ["valid/d"]


def test_without_names_the_ids_are_counted_and_the_command_writes_the_file(tmp_path):
    folder = write_pairs(tmp_path, "images/{1}.jpg", "masks/{1}.png", NAMES)
    (folder / "class_names.txt").unlink()
    with pytest.raises(InputError) as refused:
        FolderSegmentation(folder)
    expected = f"printf '%s\\n' background class_1 > {folder}/class_names.txt"
    assert f"the masks hold 0: 50.0%, 1: 50.0%; write the names in this order, a line each: {expected}" in str(
        refused.value
    )


@pytest.mark.parametrize("values", [(0, 255), (0, 128, 255), (0, 100)])
def test_without_names_values_that_are_no_ids_lead_to_the_converter(tmp_path, values):
    folder = write_pairs(tmp_path, "images/{1}.jpg", "masks/{1}.png", NAMES)
    (folder / "class_names.txt").unlink()
    write_picture(folder / "masks" / "a.png", np.array([values], np.uint8))
    for name in "bcde":
        write_picture(folder / "masks" / f"{name}.png", np.array([values], np.uint8))
    with pytest.raises(
        InputError, match=r"not ids from 0 on; convert the masks: python -m datasets\.prepare\.convert"
    ):
        FolderSegmentation(folder)


def test_without_names_masks_in_colours_lead_to_the_converter(tmp_path):
    folder = write_pairs(tmp_path, "images/{1}.jpg", "masks/{1}.png", NAMES)
    (folder / "class_names.txt").unlink()
    write_picture(folder / "masks" / "a.png", PHOTO)
    with pytest.raises(InputError, match=rf"holds colours .*convert --images {folder} --out {folder}_converted"):
        FolderSegmentation(folder)


def test_one_name_needs_another_for_everything_else(tmp_path):
    folder = write_pairs(tmp_path, "images/{1}.jpg", "masks/{1}.png", NAMES, class_names="road\n")
    with pytest.raises(InputError, match="lists one class; add a first line for everything else"):
        FolderSegmentation(folder)


# Greys of fewer than 8 bits


@pytest.mark.parametrize(("bits", "values"), [(1, [0, 1]), (2, [0, 1, 3]), (4, [0, 1, 5, 15])])
def test_grey_pngs_of_few_bits_hold_ids(tmp_path, bits, values):
    folder = write_pairs(tmp_path, "images/{1}.jpg", "masks/{1}.png", NAMES, "\n".join(map(str, range(16))))
    png = grey_png(np.array([values], np.uint8), bits)
    for name in "abcde":
        (folder / "masks" / f"{name}.png").write_bytes(png)
    assert FolderSegmentation(folder).mask(0).tolist() == [values]


def grey_png(ids: np.ndarray, bits: int) -> bytes:
    """A grey PNG of so many bits a pixel, which Pillow does not write."""
    import struct
    import zlib

    rows = b"".join(
        b"\0" + np.packbits((row[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)).tobytes() for row in ids
    )
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
