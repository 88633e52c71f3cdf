import csv
import os
import struct
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.files import read_image
from datasets.voc import voc_colormap
from network import build_model
from tests.test_checkpoint import complete
from utils.checkpoint import save_checkpoint
from utils.engine import predict
from utils.errors import InputError
from utils.pictures.plotting import overlay
from utils.pictures.predict import (
    list_images,
    output_names,
    predict_files,
    predict_image,
    predict_image_with_confidence,
    spans,
)
from utils.weights import load
from utils.weights.load import load_model

NAMES = ["sky", "road", "tree", "car"]
MOBILENET = "deeplabv3plus_mobilenet_v3_large"


class ByColour(nn.Module):
    """Class k where red is nearest to 10 k: the answer at a pixel depends on nothing else."""

    device = torch.device("cpu")

    def __init__(self, num_classes=7):
        super().__init__()
        self.num_classes, self.seen = num_classes, []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        red = x[:, :1].float()  # [B, 1, H, W]
        return -(red - 10 * torch.arange(self.num_classes).view(1, -1, 1, 1)).square()  # [B, C, H, W]


class Scripted(nn.Module):
    """The n-th tile gets the n-th logits everywhere."""

    device = torch.device("cpu")

    def __init__(self, *logits):
        super().__init__()
        self.logits = list(logits)

    def forward(self, x):
        return torch.tensor(self.logits.pop(0)).view(1, -1, 1, 1).expand(-1, -1, *x.shape[-2:])


class LocalContrast(nn.Module):
    """Brighter or darker than the whole, looked at through a window: zero padding and image pooling are the two
    ways in which a tile differs from its place in the picture."""

    device = torch.device("cpu")

    def forward(self, x):
        x = (x.float().mean(dim=1, keepdim=True) - 116) / 58  # [B, 1, H, W]
        contrast = F.avg_pool2d(x, 9, 1, padding=4) - x.mean(dim=(2, 3), keepdim=True)
        return torch.cat([contrast, -contrast], dim=1)  # [B, 2, H, W]


def colours(height, width, num_classes=7):
    """A picture for `ByColour`, and its classes, none of them 0."""
    ids = torch.randint(1, num_classes, (height, width), generator=torch.Generator().manual_seed(0))
    return torch.stack([10 * ids, ids, ids]).to(torch.uint8), ids.to(torch.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model(MOBILENET, num_classes=4)
    model(torch.randn(4, 3, 65, 65))  # batch norms that have seen something
    return model.eval()


# The model


def test_model_comes_from_the_checkpoint_alone(model, tmp_path, monkeypatch):
    options = {"model": MOBILENET, "output_stride": 16, "backbone_weights": "imagenet", "data_root": "/gone"}
    known = {"options": options, "class_names": NAMES, "palette": voc_colormap().tolist()}
    save_checkpoint(tmp_path / "a.pth", complete(model_state=model.state_dict(), **known))
    monkeypatch.setattr(load, "download", lambda *_: pytest.fail("a download"))
    loaded, class_names, palette, stored = load_model(tmp_path / "a.pth", torch.device("cpu"))
    assert class_names == NAMES and stored == options and not any(module.training for module in loaded.modules())
    assert palette.dtype == np.uint8 and (palette == voc_colormap()).all()
    assert loaded.backbone["0"][0].weight.is_contiguous(memory_format=torch.channels_last)
    image = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    assert torch.equal(predict(loaded, image), predict(model, image))


def test_checkpoint_that_is_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--ckpt .*typo\.pth: no such file"):
        load_model(tmp_path / "typo.pth", torch.device("cpu"))


# One picture, in tiles


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("size", [(31, 45), (70, 64), (1, 1)])
def test_picture_up_to_the_tile_is_predicted_exactly_as_in_one_piece(model, size, amp):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    model.train()
    prediction = predict_image(model, image, amp=amp, tile=max(size[0], 64))
    assert model.training  # as it was
    model.eval()
    assert prediction.dtype == torch.uint8
    assert torch.equal(prediction, predict(model, image[None], amp)[0])


@pytest.mark.parametrize("size", [(200, 133), (133, 200), (65, 64), (64, 65), (65, 65), (300, 20), (1, 500)])
@pytest.mark.parametrize(("tile", "overlap"), [(64, None), (64, 0), (79, 39), (64, 32), (100, 17)])
def test_every_pixel_of_a_large_picture_is_predicted_as_in_one_piece(size, tile, overlap):
    image, ids = colours(*size)
    fake = ByColour()
    prediction = predict_image(fake, image, tile=tile, overlap=overlap)
    assert prediction.dtype == torch.uint8 and prediction.is_contiguous()
    assert torch.equal(prediction, ids)
    assert all(shape[0] == 1 and max(shape[2:]) <= tile for shape in fake.seen)


@pytest.mark.parametrize("size", [(64, 300), (300, 64)])
def test_model_sees_each_tile_upright(model, size):
    image = (255 * torch.linspace(0, 1, size[1]).repeat(3, size[0], 1)).to(torch.uint8)  # brighter to the right

    class Upright(ByColour):
        def forward(self, x):
            assert (x.float().diff(dim=3) >= 0).all() and (x.diff(dim=2) == 0).all()
            return super().forward(x)

    fake = Upright()
    predict_image(fake, image, tile=64)
    assert len(fake.seen) > 4


def test_tiles_cover_a_side_evenly_on_the_grid_with_the_overlap_at_least():
    for tile in (64, 79, 128):
        for overlap in (0, 8, tile // 3, tile // 2):
            for size in range(1, 700, 3):
                found = spans(size, tile, overlap)
                if size <= tile:
                    assert found == [(0, size)]
                    continue
                assert found[0][0] == 0 and found[-1][1] == size
                assert all(start % 16 == 0 and stop - start <= tile for start, stop in found)
                (side,) = {stop - start for start, stop in found[:-1]}
                assert side % 16 == 0
                steps = [b[0] - a[0] for a, b in pairwise(found)]
                assert max(steps) - min(steps) <= 16
                assert all(a[1] - b[0] >= overlap for a, b in pairwise(found))
                longest = (tile - tile % 16 - overlap) // 16 * 16
                assert (len(steps) - 1) * longest < size - (tile - tile % 16)  # one tile less would not do
                shorter = (side - 16 - overlap) // 16 * 16
                assert len(steps) * shorter < size - (side - 16) or side == 64  # nor would smaller tiles


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_confidence_is_the_probability_of_the_class_that_is_predicted(model, amp):
    image = torch.randint(0, 256, (3, 70, 45), dtype=torch.uint8)
    ids, confidence = predict_image_with_confidence(model, image, amp=amp)
    assert torch.equal(ids, predict_image(model, image, amp=amp))
    with torch.inference_mode(), torch.autocast("cpu", amp, enabled=amp is not None):
        probabilities = model(image[None])[0].softmax(dim=0)  # [C, H, W]
    assert confidence.dtype == torch.float32
    assert torch.equal(confidence, probabilities.gather(0, ids[None].long())[0])


@pytest.mark.parametrize("size", [(200, 133), (133, 200), (65, 65), (1, 500)])
@pytest.mark.parametrize("overlap", [None, 0, 32])
def test_blended_tiles_give_the_probabilities_of_one_piece(size, overlap):
    class Unsure(ByColour):
        def forward(self, x):
            return super().forward(x) / 100

    image = torch.randint(0, 70, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fake = Unsure()
    ids, confidence = predict_image_with_confidence(fake, image, tile=64, overlap=overlap)
    one_piece = fake(image[None])[0].softmax(dim=0).amax(dim=0)  # [H, W]
    assert len(fake.seen) > 2 and confidence.is_contiguous()
    assert torch.allclose(confidence, one_piece, atol=1e-5) and one_piece.std() > 0.05
    assert torch.equal(ids, predict_image(fake, image, tile=64, overlap=overlap))


def test_confidence_between_two_tiles_is_that_of_their_weighted_mean():
    # As below: tiles at 0..64 and 48..112, with class 0 ahead by 4 in the first and class 1 by 2 in the second.
    fake = Scripted([4.0, 0.0], [0.0, 2.0])
    image = torch.zeros(3, 64, 112, dtype=torch.uint8)
    _, confidence = predict_image_with_confidence(fake, image, tile=64, overlap=16)
    x = torch.arange(112) + 0.5
    first, second = (64 - x).clamp(0, 64).square() * (x < 64), (x - 48).clamp(0, 64).square() * (x > 48)
    first, second = torch.where(x < 48, 1.0, first), torch.where(x > 64, 1.0, second)
    ahead = (4 * first - 2 * second) / (first + second)
    assert torch.allclose(confidence, ahead.abs().sigmoid().expand(64, 112), atol=1e-5)


@pytest.mark.parametrize("turned", [False, True], ids=["beside", "below"])
@pytest.mark.parametrize(("second", "border"), [(1.0, 56), (3.0, 54)])
def test_logits_of_two_tiles_fade_into_each_other_by_their_squared_distance_to_the_edge(turned, second, border):
    # Tiles at 0..64 and 48..112: class 0 with logit 1 in the first, class 1 with 1 or 3 in the second. They are
    # level where (64 - x)^2 is as much, or three times as much, as (x - 48)^2: at 56 and at 53.9.
    size = (112, 64) if turned else (64, 112)
    fake = Scripted([1.0, 0.0], [0.0, second])
    prediction = predict_image(fake, torch.zeros(3, *size, dtype=torch.uint8), tile=64, overlap=16)
    expected = (torch.arange(112) >= border).to(torch.uint8).expand(64, 112)
    assert torch.equal(prediction.T if turned else prediction, expected)


@pytest.mark.parametrize(("length", "other"), [(240, 32), (256, 0)])
def test_tiles_share_an_eighth_by_default(length, other):
    tiles = []
    for overlap in (None, 16, other):
        fake = ByColour()
        predict_image(fake, colours(length, 20)[0], tile=128, overlap=overlap)
        tiles.append(len(fake.seen))
    assert tiles[0] == tiles[1] != tiles[2]


@pytest.mark.parametrize(("first", "second", "border"), [(1.0, 100.0, 20), (100.0, 1.0, 60)])
def test_tiles_do_not_fade_at_the_pictures_edge(first, second, border):
    # Tiles at 0..64 and 16..80: 100 (x - 16)^2 is (64 - x)^2 at 20.4, 100 (64 - x)^2 is (x - 16)^2 at 59.6.
    fake = Scripted([first, 0.0], [0.0, second])
    prediction = predict_image(fake, torch.zeros(3, 64, 80, dtype=torch.uint8), tile=64)
    assert torch.equal(prediction[0], (torch.arange(80) >= border).to(torch.uint8))


def test_tiles_are_predicted_in_the_precision_that_is_asked_for():
    class Precise(ByColour):
        def forward(self, x):
            self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            return super().forward(x)

    for amp in (None, torch.bfloat16):
        fake = Precise()
        predict_image(fake, colours(100, 20)[0], amp=amp, tile=64)
        assert len(fake.seen) > 1 and fake.dtype == amp


def seams(size, tile, overlap):
    """At the tiles' edges over elsewhere: how often tiles and one piece disagree; tiles over one piece: how often
    the class changes across those edges."""
    generator, fake = torch.Generator().manual_seed(0), LocalContrast()
    edges = torch.tensor(sorted({edge for span in spans(size, tile, overlap) for edge in span} - {0, size}))
    distance = (torch.arange(size)[:, None] + 0.5 - edges).abs().amin(dim=1)
    near = torch.minimum(distance[:, None], distance) < 4  # [H, W]
    wrong, changes, changes_in_one = torch.zeros(size, size), 0, 0
    for _ in range(8):
        rough = torch.randn(1, 3, size // 8, size // 8, generator=generator)
        image = F.interpolate(rough, size=(size, size), mode="bicubic")[0].mul(60).add(128).clamp(0, 255).byte()
        tiled, whole = predict_image(fake, image, tile=tile, overlap=overlap), predict(fake, image[None])[0]
        wrong += tiled != whole
        changes += (tiled[:, edges] != tiled[:, edges - 1]).sum() + (tiled[edges] != tiled[edges - 1]).sum()
        changes_in_one += (whole[:, edges] != whole[:, edges - 1]).sum() + (whole[edges] != whole[edges - 1]).sum()
    return wrong[near].mean() / wrong[~near].mean(), changes / changes_in_one


def test_seams_show_where_tiles_only_touch():
    disagreement, changes = seams(256, 128, 0)  # tiles at 0..128 and 128..256
    assert disagreement > 4 and changes > 4


@pytest.mark.parametrize(("size", "overlap"), [(240, 16), (224, 32)])
def test_seams_do_not_show_where_tiles_overlap(size, overlap):
    disagreement, changes = seams(size, 128, overlap)
    assert disagreement < 1.15 and changes < 1.15


class LargestFloats(TorchDispatchMode):
    """The most elements that a floating-point tensor had."""

    most = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("turned", [False, True], ids=["high", "wide"])
def test_logits_that_are_kept_do_not_grow_with_the_longer_side(turned):
    most = []
    for length in (400, 1600):
        image, ids = colours(length, 200)
        image, ids = (image.mT, ids.mT) if turned else (image, ids)
        with LargestFloats() as floats:
            assert torch.equal(predict_image(ByColour(), image, tile=64), ids)
        most.append(floats.most)
    assert most == [7 * 64 * 200] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tile": 63}, "--tile 63: too small; give 64 or more"),
        ({"tile": 64, "overlap": 33}, "--overlap 33: out of range; give 0 to 32, half of --tile 64"),
        ({"tile": 64, "overlap": -1}, "--overlap -1: out of range; give 0 to 32"),
    ],
)
def test_tile_and_overlap_that_cannot_work_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        predict_image(ByColour(), colours(10, 10)[0], **flags)


# Pictures of any format

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def shown(path):
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".gif", ".jpg"])
def test_colours_of_every_format_are_read(tmp_path, suffix):
    array = np.repeat(RGB[:1, :4].repeat(8, axis=0), 8, axis=1)  # four colours in blocks, as JPEG likes them
    path = tmp_path / f"a{suffix}"
    Image.fromarray(array).save(path, **{".webp": {"lossless": True}, ".jpg": {"quality": 100}}.get(suffix, {}))
    picture = shown(path)
    assert picture.shape == array.shape
    if suffix == ".jpg":
        assert abs(picture.astype(int) - array).mean() < 6
    else:
        assert (picture == array).all()


def test_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (50, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (shown(tmp_path / "a.gif") == 50).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_grey_one_bit_palette_and_cmyk_become_rgb(tmp_path, mode):
    picture = Image.fromarray(RGB).convert(mode)
    picture.save(tmp_path / "a.tif")
    assert (shown(tmp_path / "a.tif") == np.array(picture.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_lie_on_white(tmp_path, mode):
    alpha = np.resize(np.array([0, 128, 255], np.uint8), GREY.shape)
    base = GREY[..., None].repeat(3, axis=2) if mode == "LA" else RGB
    picture = Image.fromarray(np.dstack([base, alpha]))
    (picture if mode != "LA" else picture.convert("LA")).save(tmp_path / "a.png")
    if mode == "PA":  # a palette whose entries are transparent
        picture.quantize(64).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as stored:
            assert stored.mode == "P" and "transparency" in stored.info
    expected = base * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    difference = abs(shown(tmp_path / "a.png") - expected)
    assert (difference[alpha == 0] == 0).all()
    assert difference.max() <= (40 if mode == "PA" else 1)  # 64 colours are not all of them
    if mode != "PA":
        assert (difference[alpha == 255] == 0).all()


def test_colour_marked_as_transparent_lies_on_white(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png", transparency=int(GREY[2, 3]))
    expected = np.where(GREY[2, 3] == GREY, 255, GREY)
    assert (shown(tmp_path / "a.png") == expected[..., None]).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_to_eight_not_clipped(tmp_path, suffix):
    deep = np.array([[0, 256, 257, 1000, 32768, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / f"a{suffix}")
    assert shown(tmp_path / f"a{suffix}")[0, :, 0].tolist() == [0, 1, 1, 4, 128, 255]


def test_sixteen_bit_grey_with_a_transparent_value_is_scaled_too(tmp_path):
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / "a.png", transparency=257)
    assert shown(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 255]


def test_sixteen_bit_colours_are_scaled_to_eight(tmp_path):
    deep = RGB.astype(">u2") * 257
    lines = b"".join(b"\0" + line.tobytes() for line in deep)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "a.png").write_bytes(content)
    assert (shown(tmp_path / "a.png") == RGB).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([0, 100, 200], np.float32), [0, 100, 200]),
        (np.array([0, 257, 65535], np.float32), [0, 1, 255]),
        (np.array([0, 257, 40000], np.int32), [0, 1, 156]),
        (np.array([0, 2**30, 2**31 - 1], np.int32), [0, 128, 255]),
    ],
)
def test_floats_and_long_integers_are_scaled_by_the_smallest_full_scale_that_holds_them(tmp_path, values, expected):
    Image.fromarray(values[None]).save(tmp_path / "a.tif")
    assert shown(tmp_path / "a.tif")[0, :, 2].tolist() == expected


@pytest.mark.parametrize("value", [-1, 1e6, float("nan")])
def test_greys_outside_every_scale_are_refused_with_their_range(tmp_path, value):
    Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: grey values .* are not in 0\.\.65535"):
        read_image(tmp_path / "a.tif")


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),  # a quarter turn clockwise
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_picture_is_turned_upright_as_its_exif_orientation_says(tmp_path, suffix, orientation):
    array = np.kron(np.array([[0, 60, 120], [180, 240, 30]], np.uint8), np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(array).convert("RGB").save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    difference = abs(shown(path)[..., 0].astype(int) - UPRIGHT[orientation](array))
    assert difference.max() <= (12 if suffix == ".jpg" else 0)
    if suffix == ".jpg":
        assert read_image(path, fits=(16, 24)).shape == (3, 16, 24)  # a mask of that size may fit no other way


@pytest.mark.parametrize("content", [b"no header", b"MM\0*\0"], ids=["text", "cut short"])
def test_broken_exif_data_do_not_make_a_picture_unreadable(tmp_path, content):
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\0\0" + content)
    with Image.open(tmp_path / "a.png") as picture, pytest.raises((SyntaxError, struct.error)):
        picture.getexif()
    assert (shown(tmp_path / "a.png") == RGB).all()


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\xff\xd8\xff\xe0 cut"])
def test_file_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.jpg: cannot be read as an image"):
        read_image(tmp_path / "a.jpg")


def test_picture_that_is_cut_short_is_refused(tmp_path):
    Image.fromarray(RGB.repeat(20, axis=0)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image"):
        read_image(tmp_path / "a.png")


# Files and folders


def save(path, height=20, width=30):
    """A picture for `ByColour`; returns its classes."""
    image, ids = colours(height, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return ids.numpy()


def run(paths, out, **flags):
    names = [f"class {k}" for k in range(8)]  # the last is in no picture
    return predict_files(ByColour(8), paths, out, class_names=names, palette=voc_colormap(), **flags)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def listed(folder, out=None):
    """The images in a folder, by their paths in it, and the number of other files."""
    paths, others = list_images(folder, out)
    return [path.relative_to(folder).as_posix() for path in paths], others


def test_pictures_of_a_folder_are_listed_by_name_whatever_the_case_of_their_suffix(tmp_path):
    touch(tmp_path, "b.JPG", "a.png", "c.Tiff", "d.txt", "folder.png/e.gif", "street/1/f.webp", "street/a.bmp")
    names = ["a.png", "b.JPG", "c.Tiff", "folder.png/e.gif", "street/1/f.webp", "street/a.bmp"]
    assert listed(tmp_path) == (names, 1)
    assert list_images(str(tmp_path / "d.txt")) == ([tmp_path / "d.txt"], 0)


def test_hidden_files_and_folders_do_not_count(tmp_path):
    touch(tmp_path, "a.png", ".a.png", ".DS_Store", "sub/Thumbs.db", "sub/desktop.ini", ".git/b.png", "sub/.c/d.txt")
    assert listed(tmp_path) == (["a.png"], 0)
    touch(tmp_path, "notes.txt", "sub/e.csv", "sub/no suffix")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop").symlink_to("loop")
    assert listed(tmp_path) == (["a.png"], 5)


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "photos/a.png", "elsewhere/b.png")
    (tmp_path / "photos/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/once more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "photos")
    assert listed(tmp_path / "photos") == (["a.png", "more/b.png"], 0)


def test_what_was_predicted_before_is_no_input(tmp_path, monkeypatch):
    touch(
        tmp_path, "a.png", "out/masks/a.png", "out/overlays/a.jpg", "out/shares.csv", "out/other.png", "outside/b.png"
    )
    assert listed(tmp_path, tmp_path / "out") == (["a.png", "outside/b.png"], 0)
    monkeypatch.chdir(tmp_path)
    assert listed(tmp_path, "out") == (["a.png", "outside/b.png"], 0)
    assert listed(tmp_path / "out", tmp_path / "out") == (["other.png"], 0)


def test_confidence_that_was_written_before_is_no_input(tmp_path):
    touch(tmp_path, "a.png", "out/confidence/a.png", "elsewhere/confidence/b.png")
    assert listed(tmp_path, tmp_path / "out") == (["a.png", "elsewhere/confidence/b.png"], 0)


def test_folder_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(InputError, match=r"--input .*closed: cannot be read \(Permission denied\); change"):
        list_images(tmp_path)


def test_input_that_has_no_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--input .*gone: no such file or folder"):
        list_images(tmp_path / "gone")
    touch(tmp_path, "notes.txt", "sub/.hidden.png")
    with pytest.raises(InputError, match=r"--input .*: has no images \(\.bmp "):
        list_images(tmp_path)


@pytest.mark.parametrize("flags", [{}, {"tile": 64, "overlap": 16}], ids=["one piece", "tiles"])
def test_each_picture_gets_mask_overlay_and_shares(tmp_path, flags):
    ids = {name: save(tmp_path / f"{name}.png", *size) for name, size in (("a", (20, 30)), ("b", (300, 70)))}
    out = tmp_path / "new" / "out"
    assert run(list_images(tmp_path)[0], out, **flags) == []
    assert files_in(out) == ["masks/a.png", "masks/b.png", "overlays/a.jpg", "overlays/b.jpg", "shares.csv"]
    for name, expected in ids.items():
        with Image.open(out / "masks" / f"{name}.png") as mask:
            assert mask.mode == "P" and (np.array(mask) == expected).all()
            assert (np.array(mask.convert("RGB")) == voc_colormap()[expected]).all()
        image = read_image(tmp_path / f"{name}.png")
        overlay(image, torch.from_numpy(expected), voc_colormap()).save(tmp_path / "expected.jpg")
        with Image.open(out / "overlays" / f"{name}.jpg") as drawn, Image.open(tmp_path / "expected.jpg") as whole:
            assert (np.array(drawn) == np.array(whole)).all()
    with (out / "shares.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["picture", "mask", *(f"class {k}" for k in range(8)), "void"]
    assert [row[:2] for row in rows[1:]] == [["a.png", "masks/a.png"], ["b.png", "masks/b.png"]]
    for row, expected in zip(rows[1:], ids.values(), strict=True):
        shares = [*(np.bincount(expected.flatten(), minlength=8) / expected.size), 0]
        assert [float(value) for value in row[2:]] == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize("flags", [{}, {"tile": 64, "overlap": 16}], ids=["one piece", "tiles"])
def test_confidence_is_written_as_grey_and_unsure_pixels_become_void(tmp_path, flags):
    # Red 10 k is class k for certain; red 10 k + 5 is k or k + 1, each with a half.
    red = np.tile(np.array([[20, 30, 35, 40]], np.uint8), (80, 25))
    Image.fromarray(np.dstack([red] * 3)).save(tmp_path / "a.png")
    run([tmp_path / "a.png"], tmp_path / "out", confidence=True, min_confidence=0.6, **flags)
    files = ["confidence/a.png", "masks/a.png", "overlays/a.jpg", "shares.csv"]
    assert files_in(tmp_path / "out") == files
    with Image.open(tmp_path / "out/confidence/a.png") as grey, Image.open(tmp_path / "out/masks/a.png") as mask:
        assert grey.mode == "L" and (abs(np.array(grey) - np.where(red == 35, 127.5, 255)) <= 0.5).all()
        expected = np.where(red == 35, 255, red // 10)
        assert mask.mode == "P" and (np.array(mask) == expected).all()
    image = read_image(tmp_path / "a.png")
    overlay(image, torch.from_numpy(expected), voc_colormap()).save(tmp_path / "expected.jpg")
    with Image.open(tmp_path / "out/overlays/a.jpg") as drawn, Image.open(tmp_path / "expected.jpg") as whole:
        assert (np.array(drawn) == np.array(whole)).all()
    with (tmp_path / "out/shares.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert [float(row[name]) for name in ("class 2", "class 3", "class 4", "void")] == [0.25] * 4
    run([tmp_path / "a.png"], tmp_path / "void", min_confidence=0.6, **flags)
    assert files_in(tmp_path / "void") == files[1:]


def test_confidence_that_would_overwrite_an_input_is_refused(tmp_path):
    save(tmp_path / "confidence" / "a.png")
    with pytest.raises(InputError, match=r"confidence/a\.png: is an input and would be overwritten"):
        run([tmp_path / "confidence" / "a.png"], tmp_path, confidence=True)
    run([tmp_path / "confidence" / "a.png"], tmp_path)
    assert files_in(tmp_path / "confidence") == ["a.png"]


def test_pictures_of_one_name_are_kept_apart(tmp_path):
    assert output_names([Path(name) for name in ("a.jpg", "a.png", "b.png")]) == ["a.jpg", "a.png", "b"]
    assert output_names([Path(name) for name in ("a.png", "A.PNG", "a.png-2.png")]) == [
        "a.png",
        "A.PNG-2",
        "a.png-2-2",
    ]
    assert output_names([Path("x/a.png"), Path("y/a.png"), Path("A.PNG")]) == ["x/a", "y/a", "A"]
    assert output_names([Path("x/a.png"), Path("x/a.jpg"), Path("X/a.bmp")]) == ["x/a.png", "x/a.jpg", "X/a.bmp"]
    assert output_names([Path(name) for name in ("a.b", "a.c", "a.b.png")]) == ["a.b", "a.c", "a.b-2"]
    expected = [save(tmp_path / name, *size) for name, size in (("a.bmp", (5, 6)), ("a.png", (7, 8)))]
    run(list_images(tmp_path)[0], tmp_path / "out")
    for name, ids in zip(("a.bmp.png", "a.png.png"), expected, strict=True):
        with Image.open(tmp_path / "out" / "masks" / name) as mask:
            assert (np.array(mask) == ids).all()


def test_folders_of_the_input_come_back_in_the_output(tmp_path):
    names = ["a.png", "street/0001.png", "street/0002.bmp", "street/night/0001.png", "street/night/0001.jpg"]
    ids = {name: save(tmp_path / "photos" / name, 20 + number, 30) for number, name in enumerate(names)}
    (tmp_path / "photos/street/0000.jpg").write_bytes(b"no picture")
    paths, _ = list_images(tmp_path / "photos")
    (problem,) = run(paths, tmp_path / "out", root=tmp_path / "photos")
    assert "street/0000.jpg: cannot be read" in problem
    stems = ["a", "street/0001", "street/0002", "street/night/0001.jpg", "street/night/0001.png"]
    written = [
        f"{folder}/{stem}.{kind}" for folder, kind in (("masks", "png"), ("overlays", "jpg")) for stem in stems
    ]
    assert files_in(tmp_path / "out") == sorted([*written, "shares.csv"])
    with (tmp_path / "out/shares.csv").open(newline="") as file:
        rows = [row[:2] for row in csv.reader(file)][1:]
    assert [row[0] for row in rows] == sorted(names, key=Path)
    for name, mask in rows:
        if not name.endswith(".jpg"):  # whose pixels change when it is saved
            with Image.open(tmp_path / "out" / mask) as picture:
                assert (np.array(picture) == ids[name]).all()


def test_unreadable_files_are_returned_and_do_not_stop_the_rest(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"")
    unreadable = run(list_images(tmp_path)[0], tmp_path / "out")
    assert len(unreadable) == 2
    for line, name in zip(unreadable, ("a.jpg", "c.png"), strict=True):
        assert line.startswith(f"{tmp_path / name}: cannot be read as an image")
    assert files_in(tmp_path / "out") == ["masks/b.png", "overlays/b.jpg", "shares.csv"]


def test_input_of_which_nothing_can_be_read_is_refused_and_leaves_nothing(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of the 2 images can be read; the first problem: .*a\.jpg: cannot be"):
        run(list_images(tmp_path)[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_name_that_is_no_text_is_predicted_too(tmp_path):
    path = Path(f"{tmp_path}/a\udce9.png")
    try:
        save(path)
    except OSError:
        pytest.skip("this file system takes no such names")
    assert run([path], tmp_path / "out") == []
    assert (
        (tmp_path / "out" / "shares.csv")
        .read_text(encoding="utf-8")
        .splitlines()[1]
        .startswith("a?.png,masks/a?.png,")
    )


@pytest.mark.parametrize("failing", ["a.png", "a.jpg"])
def test_write_that_fails_leaves_the_earlier_file_whole(tmp_path, monkeypatch, failing):
    save(tmp_path / "a.bmp")
    run([tmp_path / "a.bmp"], tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("masks/a.png", "overlays/a.jpg")}
    save(tmp_path / "a.bmp", 40, 50)
    whole = Image.Image.save

    def full_disk(picture, path, **arguments):
        if path.name.startswith(failing):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        whole(picture, path, **arguments)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(InputError, match=rf"{failing}: cannot be written \(No space left on device\); free space"):
        run([tmp_path / "a.bmp"], tmp_path / "out")
    after = {name: (tmp_path / "out" / name).read_bytes() for name in before}
    kept = [name for name in before if after[name] == before[name]]
    assert kept == (list(before) if failing == "a.png" else ["overlays/a.jpg"])


def test_out_that_is_a_file_is_refused(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match=r"out/masks: cannot be written .* choose another path"):
        run([tmp_path / "a.png"], tmp_path / "out")


def test_picture_that_would_be_overwritten_is_refused_and_kept(tmp_path):
    save(tmp_path / "overlays" / "a.jpg")
    before = (tmp_path / "overlays" / "a.jpg").read_bytes()
    with pytest.raises(InputError, match=r"overlays/a\.jpg: is an input and would be overwritten"):
        run([tmp_path / "overlays" / "a.jpg"], tmp_path)
    assert (tmp_path / "overlays" / "a.jpg").read_bytes() == before
