import runpy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import datasets.files
from datasets.files import existing_folder, read_class_names, read_ids, read_image, read_mask, read_size
from utils.errors import InputError

MASK = np.array([[0, 1, 255], [2, 2, 0]], np.uint8)


@pytest.mark.parametrize("mode", ["P", "L"])
def test_mask_holds_the_ids_of_palette_and_grey_files(tmp_path, mode):
    image = Image.fromarray(MASK)
    if mode == "P":
        image.putpalette([9, 9, 9] * 256)  # the colours do not matter
    image.save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", 3)
    assert mask.dtype == torch.uint8 and (mask.numpy() == MASK).all()
    assert read_size(tmp_path / "m.png") == (2, 3)


def test_one_bit_mask_is_ids_0_and_1(tmp_path):
    Image.fromarray(MASK > 0).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", 2).tolist() == [[0, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_mask_in_colours_is_refused(tmp_path, mode):
    Image.fromarray(MASK).convert(mode).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=rf"m\.png: holds colours \(mode {mode}\), but a mask holds ids"):
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


@pytest.mark.parametrize("content", [b"", b"no image at all"], ids=["empty", "text"])
def test_file_that_is_not_an_image_is_refused_by_name(tmp_path, content):
    for name, read in (("m.png", lambda p: read_mask(p, 3)), ("i.jpg", read_image), ("j.png", read_image)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: cannot be read"):
            read(tmp_path / name)
    with pytest.raises(InputError, match=r"m\.png: cannot be read"):
        read_size(tmp_path / "m.png")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_image_is_refused_not_filled_with_grey(tmp_path, suffix):
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
def test_16_bit_greys_are_scaled_not_clipped(tmp_path, suffix):
    grey = np.array([[0, 8000, 32896, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / f"i.{suffix}")
    assert read_image(tmp_path / f"i.{suffix}")[:, 0].tolist() == [[0, 31, 128, 255]] * 3


def test_errors_are_one_line(tmp_path):
    (tmp_path / "i.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "i.jpg")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [-1, -256, -(2**31)])
def test_a_negative_mask_value_is_not_wrapped_into_a_class_or_void(tmp_path, value):
    Image.fromarray(np.full((2, 2), value, np.int32)).save(tmp_path / "m.tif")
    with pytest.raises(InputError, match=rf"m\.tif: value {value} is neither"):
        read_mask(tmp_path / "m.tif", 3)


@pytest.mark.parametrize("error", [NotImplementedError("no such pixels"), AssertionError(), RuntimeError("a\nb")])
def test_whatever_pillow_raises_becomes_an_input_error_of_one_line_with_a_reason(tmp_path, monkeypatch, error):
    path = tmp_path / "i.png"
    Image.fromarray(MASK).save(path)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    for read in (read_image, read_size, lambda path: read_mask(path, 3)):
        with pytest.raises(
            InputError, match=r"i\.png: cannot be read as an? \w+ \((no such pixels|AssertionError|a)\);"
        ):
            read(path)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "i.jpg").touch()
    with pytest.raises(InputError, match=r"i\.jpg: cannot be read as an image \(it is empty\); replace it"):
        read_image(tmp_path / "i.jpg")


def test_pillows_warnings_are_hidden_and_others_are_not(tmp_path):
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")  # 90 million pixels: a warning, no error
    image = Image.fromarray(MASK)
    image.putpalette([9, 9, 9] * 256)
    image.save(tmp_path / "transparent.png", transparency=bytes([255] * 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = runpy.run_path(datasets.files.__file__)  # again, because pytest resets the filters set on import
        assert files["read_size"](tmp_path / "large.png") == (9500, 9500)
        assert files["read_image"](tmp_path / "transparent.png").unique().tolist() == [9]
        with pytest.raises(UserWarning):
            warnings.warn("something else", stacklevel=1)


@pytest.mark.parametrize("id", ["../a", "a/../../b", "..", "/etc/a", "//a", "a\\b", "..\\a"])
def test_an_id_that_points_outside_its_folder_is_refused_naming_the_list(tmp_path, id):
    (tmp_path / "val.txt").write_text(f"good\n{id}\n")
    with pytest.raises(InputError, match=r"val\.txt: the id .* points outside the data; write names"):
        read_ids(tmp_path / "val.txt")


def test_an_id_may_have_sub_folders_dots_and_spaces(tmp_path):
    (tmp_path / "val.txt").write_text("a/b\nv1..2\n..a\na b\n.a\n")
    assert read_ids(tmp_path / "val.txt") == ["a/b", "v1..2", "..a", "a b", ".a"]


def test_an_id_too_long_for_a_file_name_is_refused_and_the_longest_allowed_fits(tmp_path):
    (tmp_path / "val.txt").write_text("é" * 120)
    (id,) = read_ids(tmp_path / "val.txt")
    (tmp_path / f"{id}.png.tmp").touch()
    (tmp_path / "val.txt").write_text("é" * 121)
    with pytest.raises(InputError, match=r"val\.txt: the id 'é+'\.\.\. is longer than 240 bytes"):
        read_ids(tmp_path / "val.txt")


@pytest.mark.parametrize("reader", [read_ids, read_class_names])
def test_a_list_in_utf_16_is_refused_naming_the_encoding(tmp_path, reader):
    for encoding in ("utf-16", "utf-16-le"):
        (tmp_path / "list.txt").write_text("sky\nroad\n", encoding=encoding)
        with pytest.raises(InputError, match=r"list\.txt: .*; save it as UTF-8"):
            reader(tmp_path / "list.txt")


def test_a_path_that_is_too_long_does_not_exist(tmp_path):
    long = tmp_path / ("a" * 5000)
    for read in (existing_folder, read_ids, read_class_names, read_image):
        with pytest.raises(InputError, match="aaa"):
            read(long)
