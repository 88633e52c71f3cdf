import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from datasets.voc import VOC_CLASSES, VOCSegmentation, decode_target, voc_colormap
from tests.conftest import write_picture
from utils.errors import InputError


def test_an_item_is_a_uint8_image_and_its_class_ids_including_void(voc_root):
    dataset = VOCSegmentation(voc_root, "2012", "train")
    image, mask = dataset[0]
    assert len(dataset) == 4 and dataset.num_classes == 21
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8 and image.shape == (3, 40, 52)
    assert isinstance(mask, tv_tensors.Mask) and mask.dtype == torch.uint8 and mask.shape == (40, 52)
    assert set(mask.unique().tolist()) == {0, 1, 2, 3, 255}


def test_the_data_set_owns_names_count_palette_and_ids(voc_root):
    dataset = VOCSegmentation(voc_root, "2012", "val")
    assert dataset.ids == ["b1", "b2", "b3"]
    assert dataset.class_names == VOC_CLASSES and VOC_CLASSES[15] == "person" and len(VOC_CLASSES) == 21
    assert dataset.sizes() == [(40, 52), (52, 40), (40, 52)]


def test_colours_are_those_of_the_development_kit():
    colours = voc_colormap()
    assert colours[[0, 1, 2, 7, 15, 20]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 128],
        [192, 128, 128],
        [0, 64, 128],
    ]
    assert colours[255].tolist() == [224, 224, 192]
    assert len(np.unique(colours, axis=0)) == 256


@pytest.mark.parametrize("shape", [(), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_decode_target_colours_any_shape_and_leaves_its_argument_alone(voc_root, shape, make):
    ids = np.resize([15, 255, 0, 1], shape).tolist() if shape else 255
    target = make(ids)
    before = target.clone() if isinstance(target, torch.Tensor) else target.copy()
    colours = VOCSegmentation(voc_root).decode_target(target)
    assert colours.shape == (*shape, 3) and colours.dtype == np.uint8
    assert (colours == voc_colormap()[np.array(ids)]).all()
    assert (target == before).all()


def test_decode_target_of_a_plain_int():
    assert decode_target(15, voc_colormap()).tolist() == [192, 128, 128]


def test_decode_target_gives_a_copy_of_the_palette():
    palette = voc_colormap()
    decode_target(np.array(0), palette)[...] = 7
    assert (palette == voc_colormap()).all()


@pytest.mark.parametrize(("target", "error"), [([0.5], TypeError), ([-1], ValueError), ([256], ValueError)])
def test_decode_target_rejects_anything_but_class_ids(target, error):
    with pytest.raises(error):
        decode_target(np.array(target), voc_colormap())


def test_a_missing_folder_is_named_with_the_flag(tmp_path):
    with pytest.raises(InputError, match=r"VOC2012: there is no such folder.*--data_root"):
        VOCSegmentation(tmp_path)


def test_a_missing_split_is_named_with_the_existing_lists(voc_root):
    with pytest.raises(InputError, match=r"tset\.txt: there is no such split list.*choose from train, val"):
        VOCSegmentation(voc_root, "2012", "tset")


def test_empty_split_is_refused(voc_root):
    (voc_root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text("\n\n")
    with pytest.raises(InputError, match=r"train\.txt: the split is empty"):
        VOCSegmentation(voc_root)


def test_missing_mask_is_refused_when_the_set_is_opened(voc_root):
    (voc_root / "VOCdevkit/VOC2012/SegmentationClass/a2.png").unlink()
    with pytest.raises(InputError, match=r"a2\.png: the mask is missing \(1 of 4"):
        VOCSegmentation(voc_root).require_masks()


def test_missing_images_are_counted_and_refused_only_when_one_is_read(voc_root):
    for name in ("a2", "a3"):
        (voc_root / f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg").unlink()
    dataset = VOCSegmentation(voc_root)
    assert [path.stem for path in dataset.missing_images] == ["a2", "a3"]
    with pytest.raises(InputError, match=r"a2\.jpg: the image is missing \(2 of 4"):
        dataset[0]


def test_unknown_year_is_refused(voc_root):
    with pytest.raises(InputError, match="--year 2007"):
        VOCSegmentation(voc_root, "2007")


@pytest.fixture
def augmented(voc_root):
    voc = voc_root / "VOCdevkit" / "VOC2012"
    for name in ("a1", "a2", "a3"):
        write_picture(voc / "SegmentationClassAug" / f"{name}.png", np.full((40, 52), 5, np.uint8))
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("a1\na3\n")
    return voc_root


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt", "train_aug.txt"])
def test_2012_aug_trains_on_its_list_and_masks_wherever_the_list_is(augmented, place):
    beside = augmented / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt"
    beside.rename(augmented / place)
    dataset = VOCSegmentation(augmented, "2012_aug", "train")
    assert dataset.ids == ["a1", "a3"]
    assert set(dataset[0][1].unique().tolist()) == {5}


def test_2012_aug_validates_on_the_masks_of_2012(augmented):
    dataset = VOCSegmentation(augmented, "2012_aug", "val")
    assert dataset.ids == ["b1", "b2", "b3"]
    assert set(dataset[0][1].unique().tolist()) == {0, 1, 2, 3, 255}


def test_2012_aug_refuses_a_list_that_shares_an_id_with_val(augmented):
    (augmented / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt").write_text("a1\nb2\n")
    with pytest.raises(InputError, match=r"train_aug\.txt: b2 is also in val \(1"):
        VOCSegmentation(augmented, "2012_aug", "train").require_masks()


def test_2012_aug_without_its_list_says_where_it_belongs(voc_root):
    with pytest.raises(InputError, match=r"train_aug\.txt: missing"):
        VOCSegmentation(voc_root, "2012_aug", "train")


def test_the_real_masks_open_without_their_images(real_data):
    train = VOCSegmentation(real_data("voc2012_masks"), "2012", "train")
    val = VOCSegmentation(real_data("voc2012_masks"), "2012", "val")
    assert (len(train), len(val)) == (1464, 1449)
    assert len(train.missing_images) == 1464
    with pytest.raises(InputError, match=r"2007_000032\.jpg: the image is missing \(1464 of 1464"):
        train[0]
