import numpy as np
import pytest
import torch
from PIL import Image

from datasets.files import read_image, read_mask, read_size
from utils.errors import InputError

MASK = np.array([[0, 1, 255], [2, 2, 0]], np.uint8)


@pytest.mark.parametrize("mode", ["P", "L"])
def test_mask_holds_the_ids_of_palette_and_grey_files(tmp_path, mode):
    picture = Image.fromarray(MASK)
    if mode == "P":
        picture.putpalette([9, 9, 9] * 256)  # the colours do not matter
    picture.save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", 3)
    assert mask.dtype == torch.uint8 and (mask.numpy() == MASK).all()
    assert read_size(tmp_path / "m.png") == (2, 3)


def test_one_bit_mask_is_ids_0_and_1(tmp_path):
    Image.fromarray(MASK > 0).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", 2).tolist() == [[0, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_mask_in_colours_is_refused(tmp_path, mode):
    Image.fromarray(MASK).convert(mode).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=rf"m\.png: a {mode} picture, but a mask holds class ids"):
        read_mask(tmp_path / "m.png", 3)


@pytest.mark.parametrize("value", [3, 254])
def test_value_that_is_neither_a_class_nor_void_is_refused_by_name(tmp_path, value):
    Image.fromarray(np.where(MASK == 1, value, MASK).astype(np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=rf"m\.png: value {value} is neither a class \(0\.\.2\) nor void"):
        read_mask(tmp_path / "m.png", 3)


def test_sixteen_bit_value_is_not_wrapped_into_a_class(tmp_path):
    Image.fromarray(np.full((2, 2), 256, np.uint16)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="value 256"):
        read_mask(tmp_path / "m.png", 3)


@pytest.mark.parametrize("content", [b"", b"no picture at all"], ids=["empty", "text"])
def test_file_that_is_no_picture_is_refused_by_name(tmp_path, content):
    for name, read in (("m.png", lambda p: read_mask(p, 3)), ("i.jpg", read_image), ("j.png", read_image)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: cannot be read"):
            read(tmp_path / name)
    with pytest.raises(InputError, match=r"m\.png: cannot be read"):
        read_size(tmp_path / "m.png")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_picture_cut_short_is_refused_not_filled_with_grey(tmp_path, suffix):
    path = tmp_path / f"i.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"i\.{suffix}: cannot be read"):
        read_image(path)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_any_jpeg_comes_out_as_rgb(tmp_path, mode):
    Image.new("RGB", (4, 6), (200, 200, 200)).convert(mode).save(tmp_path / "i.jpg")
    image = read_image(tmp_path / "i.jpg")
    assert image.shape == (3, 6, 4) and image.dtype == torch.uint8
    assert (image.int() - 200).abs().max() < 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_greys_of_16_bits_are_scaled_not_cut_off(tmp_path, suffix):
    grey = np.array([[0, 8000, 32896, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / f"i.{suffix}")
    assert read_image(tmp_path / f"i.{suffix}")[:, 0].tolist() == [[0, 31, 128, 255]] * 3


def test_errors_are_one_line(tmp_path):
    (tmp_path / "i.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "i.jpg")
    assert "\n" not in str(error.value)
