import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset
from datasets.folder import FolderSegmentation
from datasets.voc import voc_colormap
from tests.conftest import write_picture
from utils.errors import InputError


def test_names_and_count_come_from_the_folder(folder):
    dataset = build_dataset("folder", folder, "train")
    assert dataset.class_names == ["sky", "road", "tree", "car"] and dataset.num_classes == 4
    assert dataset[0][0].shape == (3, 40, 52)
    assert not dataset.made_split


def test_labels_file_of_labelme_may_list_its_ignored_class(folder):
    (folder / "class_names.txt").write_text("__ignore__\r\n_background_\r\ncar \r\nsky\r\ntree\r\n\r\n")
    assert FolderSegmentation(folder).class_names == ["_background_", "car", "sky", "tree"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing; the masks hold 0: 25.0%.*printf"),
        ("a\nb\na\n", "'a' is listed twice"),
        ("a\n", "lists one class; add a first line"),
    ],
)
def test_unusable_class_names_are_refused(folder, text, message):
    path = folder / "class_names.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=rf"class_names\.txt: {message}"):
        FolderSegmentation(folder)


def test_older_labelme_folder_of_masks_is_found(folder):
    (folder / "SegmentationClass").rename(folder / "SegmentationClassPNG")
    (folder / "SegmentationClass").mkdir()
    (folder / "SegmentationClass" / "a1.npy").touch()
    assert FolderSegmentation(folder).masks[0].parent.name == "SegmentationClassPNG"


def test_older_labelme_folder_works_alone(folder):
    (folder / "SegmentationClass").rename(folder / "SegmentationClassPNG")
    assert len(FolderSegmentation(folder)) == 4


def test_images_may_have_another_format(folder):
    for path in list((folder / "JPEGImages").iterdir()):
        with Image.open(path) as image:
            image.save(path.with_suffix(".PNG"), format="PNG")
        path.unlink()
    assert FolderSegmentation(folder)[0][0].shape == (3, 40, 52)


def test_mask_of_another_size_than_its_image_is_refused_with_both_sizes(folder):
    write_picture(folder / "SegmentationClass" / "a1.png", np.zeros((40, 51), np.uint8))
    with pytest.raises(InputError, match=r"a1\.png: the mask is 51x40, its image 52x40"):
        FolderSegmentation(folder)[0]


def test_colours_are_those_of_the_masks_own_palette(folder):
    own = np.arange(768, dtype=np.uint8).reshape(256, 3)[::-1]
    for path in (folder / "SegmentationClass").glob("*.png"):
        with Image.open(path) as image:
            image.putpalette(own.tobytes())
            image.save(path)
    palette = FolderSegmentation(folder).palette
    assert (palette[:4] == own[:4]).all() and (palette[255] == own[255]).all()


@pytest.mark.parametrize("mode", ["L", "grey ramp", "all black"])
def test_masks_without_distinct_colours_get_those_of_voc(folder, mode):
    for path in (folder / "SegmentationClass").glob("*.png"):
        image = Image.fromarray(np.array(Image.open(path)))
        if mode == "grey ramp":
            image.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
        elif mode == "all black":
            image.putpalette(bytes(768))
        image.save(path)
    assert (FolderSegmentation(folder).palette == voc_colormap()).all()


@pytest.fixture
def without_lists(folder):
    for path in (folder / "ImageSets" / "Segmentation").iterdir():
        path.unlink()
    return folder


def test_without_lists_the_ids_are_divided_80_to_20_by_the_seed(without_lists):
    for number in range(43):
        write_picture(without_lists / "SegmentationClass" / f"c{number:02}.png", np.zeros((4, 4), np.uint8))
    train, val = (FolderSegmentation(without_lists, split, seed=3) for split in ("train", "val"))
    assert train.made_split and (len(train), len(val)) == (40, 10)
    assert not set(train.ids) & set(val.ids) and len(set(train.ids) | set(val.ids)) == 50
    assert FolderSegmentation(without_lists, "val", seed=3).ids == val.ids
    assert FolderSegmentation(without_lists, "val", seed=4).ids != val.ids


def test_division_gives_each_side_at_least_one_image_and_writes_nothing(without_lists):
    for name in ("a3", "a4", "b1", "b2", "b3"):
        (without_lists / "SegmentationClass" / f"{name}.png").unlink()
    before = sorted(without_lists.rglob("*"))
    assert len(FolderSegmentation(without_lists, "train")) == len(FolderSegmentation(without_lists, "val")) == 1
    assert sorted(without_lists.rglob("*")) == before


def test_lists_of_an_earlier_division_are_used_again(without_lists, tmp_path):
    (tmp_path / "val.txt").write_text("a4\n")
    assert FolderSegmentation(without_lists, "val", lists=tmp_path).ids == ["a4"]


def test_without_lists_there_is_no_test_split(without_lists):
    with pytest.raises(InputError, match="has no split test; choose from train, val"):
        FolderSegmentation(without_lists, "test")


def test_one_mask_cannot_be_divided(without_lists):
    for path in list((without_lists / "SegmentationClass").glob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(InputError, match="one mask cannot be divided"):
        FolderSegmentation(without_lists)


def test_camvid_opens_with_its_own_classes_and_colours(real_data):
    sizes = [len(build_dataset("folder", real_data("camvid"), split)) for split in ("train", "val", "test")]
    dataset = build_dataset("folder", real_data("camvid"), "test")
    assert sizes == [367, 101, 233]
    assert dataset.class_names[0] == "sky" and dataset.num_classes == 11
    assert dataset.palette[0].tolist() == [128, 128, 128]
    image, mask = dataset[0]
    assert image.shape == (3, 360, 480) and int(mask[mask != 255].max()) <= 10
