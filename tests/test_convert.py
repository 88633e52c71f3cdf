"""Masks as other tools write them, converted and read back as training reads them."""

import base64
import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import write_picture
from PIL import Image

from datasets import build_dataset
from datasets.prepare import convert
from datasets.voc import voc_colormap

RED, GREEN, WHITE = (220, 20, 60), (0, 128, 0), (255, 255, 255)
IDS = np.zeros((40, 60), np.uint8)  # [H, W]: two rectangles on 0
IDS[5:25, 5:25], IDS[10:30, 35:54] = 1, 2
CORNERS = [(5, 5), (25, 5), (25, 25), (5, 25)]  # (x, y) of the first
OTHER = [(35, 10), (54, 10), (54, 30), (35, 30)]


def photo(seed: int = 0, shape: tuple[int, int] = IDS.shape) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def write_photos(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        write_picture(folder / name, photo(number))
    return folder


def write_masks(folder: Path, masks: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / name)
    return folder


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def painted(ids: np.ndarray, *colours: tuple[int, int, int]) -> np.ndarray:
    return np.array([(0, 0, 0), *colours], np.uint8)[ids]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", "a.jpg", "b.jpg")


@pytest.fixture
def run(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture):
    """Converts to tmp_path/out; returns what was printed. `--images` is `photos` unless given."""

    def call(*arguments: object) -> str:
        images = [] if "--images" in arguments else ["--images", photos]
        convert.main([str(argument) for argument in (*images, "--out", tmp_path / "out", *arguments)])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refuse(tmp_path: Path, run, capsys: pytest.CaptureFixture):
    """Asserts exit code 2, one line on stderr with all the words, and that nothing is left; returns stdout."""

    def call(*arguments: object, words: tuple[str, ...]) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as refusal:
            run(*arguments)
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if "error:" in line]
        assert refusal.value.code == 2 and len(lines) == 1
        for word in words:
            assert word in lines[0], lines[0]
        assert sorted(tmp_path.rglob("*")) == before
        return printed.out

    return call


def ids_of(tmp_path: Path, id: str) -> np.ndarray:
    with Image.open(tmp_path / "out" / "SegmentationClass" / f"{id}.png") as mask:
        assert mask.mode == "P"
        return np.array(mask)


def names_of(tmp_path: Path) -> list[str]:
    return (tmp_path / "out" / "class_names.txt").read_text(encoding="utf-8").splitlines()


def list_of(tmp_path: Path, split: str) -> list[str]:
    return (tmp_path / "out" / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(encoding="utf-8").split()


def palette_of(tmp_path: Path, id: str) -> np.ndarray:
    with Image.open(tmp_path / "out" / "SegmentationClass" / f"{id}.png") as mask:
        return np.array(mask.getpalette("RGB")).reshape(-1, 3)


# Colours


def test_colour_masks_keep_their_colours_and_are_named_by_them(tmp_path, run):
    masks = write_masks(tmp_path / "masks", {"a.png": painted(IDS, RED, GREEN), "b.png": painted(IDS, RED, RED)})
    printed = run("--masks", masks)
    assert names_of(tmp_path) == ["background", "#dc143c", "#008000"]
    assert np.array_equal(ids_of(tmp_path, "a"), IDS)
    assert np.array_equal(ids_of(tmp_path, "b"), np.minimum(IDS, 1))
    palette = palette_of(tmp_path, "a")
    assert palette[:3].tolist() == [[0, 0, 0], list(RED), list(GREEN)]
    assert np.array_equal(palette[255], voc_colormap()[255])
    rows = [line.split() for line in printed.splitlines() if " > " in line]
    assert rows[1:4] == [
        ["#000000", ">", "0", "background", "67.50%", "2"],
        ["#dc143c", ">", "1", "#dc143c", "24.58%", "2"],
        ["#008000", ">", "2", "#008000", "7.92%", "1"],
    ]
    assert "--colours" in printed and "fatal" not in printed.lower().replace("fatal: 0", "")
    assert Image.open(tmp_path / "out" / "preview.png").size[0] > 600


def test_training_reads_what_was_written(tmp_path, run):
    run("--masks", write_masks(tmp_path / "masks", {f"{id}.png": painted(IDS, RED, GREEN) for id in "ab"}))
    train, val = (build_dataset("folder", tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train.ids + val.ids) == ["a", "b"]
    assert train.class_names == ["background", "#dc143c", "#008000"]
    assert train.palette[1].tolist() == list(RED)
    image, mask = train[0]
    assert np.array_equal(mask.numpy(), IDS)
    assert (tmp_path / "out" / "JPEGImages" / "a.jpg").read_bytes() == (tmp_path / "photos" / "a.jpg").read_bytes()
    assert image.shape[1:] == mask.shape


def test_colours_can_be_named_in_an_order_and_void_is_255(tmp_path, run):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": painted(IDS, RED, WHITE) for id in "ab"})
    printed = run("--masks", masks, "--colours", "car=#DC143C,floor=#000000,void=#ffffff,sky=#0000ff")
    assert names_of(tmp_path) == ["car", "floor"]
    assert np.array_equal(ids_of(tmp_path, "a"), np.array([1, 0, 255], np.uint8)[IDS])
    assert "classes without a pixel, left out (1): sky" in printed


def test_a_colour_without_a_name_is_refused(tmp_path, refuse):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": painted(IDS, RED, GREEN) for id in "ab"})
    refuse("--masks", masks, "--colours", "floor=#000000,car=#dc143c", words=("--colours", "#008000", "add"))


def test_greys_can_be_colours(tmp_path, run):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": np.array([0, 128, 255], np.uint8)[IDS] for id in "ab"})
    run("--masks", masks, "--colours", "out=#000000,edge=#808080,core=#ffffff")
    assert names_of(tmp_path) == ["out", "edge", "core"]
    assert np.array_equal(ids_of(tmp_path, "a"), IDS)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_soft_edges_and_jpeg_noise_become_the_classes_on_both_sides(tmp_path, run, suffix):
    big = IDS.repeat(8, 0).repeat(8, 1)  # [320, 480]
    dark = np.zeros_like(big)
    dark[40:120, 300:400] = 1  # a third colour, halfway between black and green
    large = [painted(big, RED, GREEN), painted(dark, (0, 64, 0))]
    small = [Image.fromarray(mask).resize((120, 80), Image.BILINEAR) for mask in large]
    photos = tmp_path / "photos"
    for name, mask in zip("ab", small, strict=True):
        write_picture(photos / f"{name}.jpg", photo(0, (80, 120)))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{name}{suffix}", **({"quality": 90} if suffix == ".jpg" else {}))
    printed = run("--masks", tmp_path / "masks")
    assert len(names_of(tmp_path)) == 4 and "near-duplicate colours, merged" in printed
    colours = palette_of(tmp_path, "a")[:4]
    truth = [(0, 0, 0), RED, GREEN, (0, 64, 0)]
    order = [int(np.abs(colours - colour).max(1).argmin()) for colour in truth]
    assert sorted(order) == [0, 1, 2, 3] and order[0] == 0
    expected = np.array(order)[IDS.repeat(2, 0).repeat(2, 1)]
    assert (ids_of(tmp_path, "a") != expected).mean() < 0.02
    # The third colour, passed by every edge between black and green, is nowhere in a mask that does not show it.
    assert order[3] not in ids_of(tmp_path, "a")
    assert order[1] not in ids_of(tmp_path, "b") and order[2] not in ids_of(tmp_path, "b")


def test_thin_lines_of_one_colour_are_a_class(tmp_path, run):
    ids = np.zeros_like(IDS)
    ids[20], ids[:, 30] = 1, 2
    run("--masks", write_masks(tmp_path / "masks", {f"{id}.png": painted(ids, RED, GREEN) for id in "ab"}))
    assert np.array_equal(ids_of(tmp_path, "a"), ids) or np.array_equal(ids_of(tmp_path, "a"), (3 - ids) % 3)
    assert len(names_of(tmp_path)) == 3


def test_thin_lines_of_a_named_colour_survive_soft_edges(tmp_path, run):
    ids = np.zeros((320, 480), np.uint8)
    ids[100:112], ids[200:300, 100:200] = 1, 2
    for name in "ab":
        write_picture(tmp_path / "photos" / f"{name}.jpg", photo(0, (80, 120)))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask = Image.fromarray(painted(ids, RED, GREEN)).resize((120, 80), Image.BILINEAR)
        mask.save(tmp_path / "masks" / f"{name}.png")
    run("--masks", tmp_path / "masks", "--colours", "floor=#000000,crack=#dc143c,tree=#008000")
    written = ids_of(tmp_path, "a")
    assert (written[26] == 1).all() and not (written[:24] == 1).any()
    assert set(np.unique(written)) == {0, 1, 2}


def test_transparent_pixels_count_as_black(tmp_path, run):
    rgba = np.dstack([painted(IDS, RED, GREEN), np.full(IDS.shape, 255, np.uint8)])
    rgba[IDS == 0] = (*WHITE, 0)  # the colour of an eraser
    rgba[IDS == 1, 3] = 100  # a translucent layer is painted
    run("--masks", write_masks(tmp_path / "masks", {f"{id}.png": rgba for id in "ab"}))
    assert np.array_equal(np.array([0, 1, 2])[IDS] > 0, ids_of(tmp_path, "a") > 0)
    assert names_of(tmp_path)[0] == "background" and len(names_of(tmp_path)) == 3


def quantised(path: Path, ids: np.ndarray, order: list[int]) -> None:
    """Saves a palette PNG whose indices have an order of their own."""
    mask = Image.fromarray(np.argsort(order).astype(np.uint8)[ids])
    mask.putpalette(np.array([(0, 0, 0), RED, GREEN], np.uint8)[order].tobytes())
    path.parent.mkdir(exist_ok=True)
    mask.save(path)


def test_palettes_that_differ_are_expanded_as_colours_or_refused(tmp_path, run, refuse):
    quantised(tmp_path / "masks" / "a.png", IDS, [0, 1, 2])
    quantised(tmp_path / "masks" / "b.png", IDS, [2, 0, 1])
    for names in ((), ("--names", "floor,car,tree")):
        refuse("--masks", tmp_path / "masks", *names, words=("palettes", "a.png", "b.png", "--kind"))
    run("--masks", tmp_path / "masks", "--kind", "colours")
    assert np.array_equal(ids_of(tmp_path, "a"), ids_of(tmp_path, "b"))
    assert np.array_equal(ids_of(tmp_path, "a"), IDS)


def test_palettes_among_colour_masks_are_refused_until_the_kind_is_given(tmp_path, run, refuse):
    quantised(tmp_path / "masks" / "a.png", IDS, [2, 0, 1])
    write_masks(tmp_path / "masks", {"b.png": painted(IDS, RED, GREEN)})
    refuse("--masks", tmp_path / "masks", words=("palettes", "a.png", "--kind"))
    run("--masks", tmp_path / "masks", "--kind", "colours")
    assert np.array_equal(ids_of(tmp_path, "a"), IDS) and np.array_equal(ids_of(tmp_path, "b"), IDS)


def test_indices_of_a_palette_are_ids(tmp_path, run):
    for name in "ab":
        quantised(tmp_path / "masks" / f"{name}.png", IDS, [0, 1, 2])
    run("--masks", tmp_path / "masks", "--names", "floor,car,tree")
    assert np.array_equal(ids_of(tmp_path, "a"), IDS)
    assert np.array_equal(palette_of(tmp_path, "a"), voc_colormap())


def test_kind_ids_of_colour_masks_is_refused(tmp_path, refuse):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": painted(IDS, RED, GREEN) for id in "ab"})
    refuse("--masks", masks, "--kind", "ids", words=("--kind ids", "colours"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--names", "a,b,c"], ("--names", "--colours")),
        (["--first_id", "1"], ("--first_id", "colours")),
        (["--kind", "binary", "--names", "a,b,c"], ("--names", "binary")),
        (["--kind", "instances", "--first_id", "1"], ("--first_id", "instances")),
        (["--kind", "binary", "--names", "a,a"], ("'a'", "twice")),
        (["--kind", "binary", "--names", ",a"], ("''", "empty")),
        (["--kind", "colours", "--coco", "c.json"], ("--coco", "--kind")),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, refuse, flags, words):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": painted(IDS, RED, GREEN) for id in "ab"})
    refuse("--masks", masks, *flags, words=words)


def cvat(folder: Path, *, lists: dict[str, str]) -> Path:
    masks = {f"{id}.png": painted(IDS, RED, GREEN) for id in "ab"}
    write_masks(folder / "SegmentationClass", masks)
    write_masks(folder / "SegmentationObject", {f"{id}.png": painted(IDS, GREEN, RED) for id in "ab"})
    rows = [
        "# label:color_rgb:parts:actions",
        "apple:220,20,60::",
        "background:0,0,0::",
        "tree:0,128,0::",
        "x:1,2,200::",
    ]
    (folder / "labelmap.txt").write_text("\n".join(rows) + "\n")
    for name, ids in lists.items():
        path = folder / "ImageSets" / "Segmentation" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ids)
    return folder


@pytest.mark.parametrize("masks", ["cvat/SegmentationClass", "cvat"])
def test_cvat_export_is_named_by_its_labelmap(tmp_path, run, masks):
    cvat(tmp_path / "cvat", lists={"default.txt": "a\nb\n"})
    printed = run("--masks", tmp_path / masks)
    assert names_of(tmp_path) == ["background", "apple", "tree"]
    assert "left out (1): x" in printed
    assert not list((tmp_path / "out" / "ImageSets" / "Segmentation").iterdir())
    data = build_dataset("folder", tmp_path / "out", "train")
    assert np.array_equal(data[0][1].numpy(), IDS)


def test_cvat_subsets_become_lists(tmp_path, run):
    cvat(tmp_path / "cvat", lists={"Train.txt": "a\n", "Validation.txt": "b\n"})
    run("--masks", tmp_path / "cvat" / "SegmentationClass")
    assert (list_of(tmp_path, "train"), list_of(tmp_path, "val")) == (["a"], ["b"])


# Ids, 0 and 255, instances


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (np.where(IDS > 0, 255, 0).astype(np.uint8), []),
        (np.where(IDS > 0, 65535, 0).astype(np.uint16), ["cat"]),
        (IDS > 0, ["floor", "cat"]),
        (np.where(IDS > 0, 255, 0).astype(np.uint8)[..., None].repeat(3, 2), ["cat"]),
    ],
    ids=["grey", "16 bits", "1 bit", "equal channels"],
)
def test_0_and_255_are_background_and_one_class(tmp_path, run, mask, names):
    given = ["--names", ",".join(names)] if names else []
    printed = run("--masks", write_masks(tmp_path / "masks", {f"{id}.png": mask for id in "ab"}), *given)
    assert np.array_equal(ids_of(tmp_path, "a"), IDS > 0)
    assert names_of(tmp_path) == (names if len(names) == 2 else ["background", *(names or ["object"])])
    assert "kind: binary" in printed


def test_noise_of_a_jpeg_of_0_and_255_is_merged(tmp_path, run):
    masks = tmp_path / "masks"
    masks.mkdir()
    big = Image.fromarray(np.where(IDS > 0, 255, 0).astype(np.uint8))
    for name in "ab":
        big.save(masks / f"{name}.JPG", quality=60)
    run("--masks", masks)
    assert np.array_equal(ids_of(tmp_path, "a"), IDS > 0)


def test_ids_below_the_number_of_names_and_255_are_kept(tmp_path, run):
    mask = IDS.copy()
    mask[:2] = 255
    run(
        "--masks",
        write_masks(tmp_path / "masks", {f"{id}.png": mask for id in "ab"}),
        "--names",
        "background,cat,dog",
    )
    assert np.array_equal(ids_of(tmp_path, "a"), mask)
    assert names_of(tmp_path) == ["background", "cat", "dog"]
    assert np.array_equal(palette_of(tmp_path, "a"), voc_colormap())


def test_a_name_without_a_pixel_is_kept_and_the_doctor_says_that_training_would_fail(tmp_path, run, capsys):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": IDS for id in "ab"})
    with pytest.raises(SystemExit):
        run("--masks", masks, "--names", "background,cat,dog,cow")
    assert names_of(tmp_path) == ["background", "cat", "dog", "cow"]
    assert "no pixel of cow (id 3)" in capsys.readouterr().out


def test_ids_from_1_need_background_or_the_flag(tmp_path, run, refuse):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": IDS for id in "ab"})
    refuse("--masks", masks, "--names", "cat,dog", words=("--names", "background", "--first_id 1"))
    run("--masks", masks, "--names", "cat,dog", "--first_id", "1")
    assert np.array_equal(ids_of(tmp_path, "a"), np.array([255, 0, 1])[IDS])
    assert names_of(tmp_path) == ["cat", "dog"]


def test_an_id_without_a_name_is_refused(tmp_path, refuse):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": IDS * 4 for id in "ab"})
    refuse("--masks", masks, "--names", "floor,cat,dog", "--kind", "ids", words=("--names", "id 4"))


def test_ids_without_names_are_named_by_their_values(tmp_path, run):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": IDS * 7 for id in "ab"})
    run("--masks", masks, "--kind", "ids")
    assert names_of(tmp_path) == ["0", "7", "14"]
    assert np.array_equal(ids_of(tmp_path, "a"), IDS)


@pytest.mark.parametrize("bits", [2, 4])
def test_greys_of_few_bits_are_ids(tmp_path, run, bits):
    for name in "ab":
        (tmp_path / "masks").mkdir(exist_ok=True)
        write_grey_png(tmp_path / "masks" / f"{name}.png", IDS, bits)
    run("--masks", tmp_path / "masks", "--names", "floor,cat,dog")
    assert np.array_equal(ids_of(tmp_path, "a"), IDS)


def write_grey_png(path: Path, ids: np.ndarray, bits: int) -> None:
    """Writes a grey PNG of 2 or 4 bits, which Pillow cannot: as a palette PNG whose header says grey."""
    image = Image.fromarray(ids)
    image.putpalette([0, 0, 0] * 2**bits)
    image.save(path, bits=bits)
    data = path.read_bytes()
    start, end = data.index(b"PLTE") - 4, data.index(b"PLTE") + 4 + 3 * 2**bits + 4
    header = data[12:25] + b"\0" + data[26:29]
    path.write_bytes(data[:12] + header + checksum(header) + data[33:start] + data[end:])


def checksum(chunk: bytes) -> bytes:
    import zlib

    return zlib.crc32(chunk).to_bytes(4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_instances_become_one_class(tmp_path, run, dtype):
    mask = IDS.astype(dtype) * (120 if dtype is np.uint8 else 20_000)
    printed = run(
        *("--masks", write_masks(tmp_path / "masks", {f"{id}.png": mask for id in "ab"})),
        *("--kind", "instances", "--names", "cell"),
    )
    assert np.array_equal(ids_of(tmp_path, "a"), IDS > 0)
    assert names_of(tmp_path) == ["background", "cell"] and "instances" in printed


def test_more_values_than_classes_are_instances(tmp_path, run):
    mask = np.zeros(IDS.shape, np.uint16)
    mask[:20] = np.arange(1200).reshape(20, 60)
    printed = run("--masks", write_masks(tmp_path / "masks", {f"{id}.png": mask for id in "ab"}))
    assert np.array_equal(ids_of(tmp_path, "a"), mask > 0) and "kind: instances" in printed


def test_unclear_values_are_shown_and_the_kind_asked_for(tmp_path, run, refuse):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": np.array([0, 128, 255], np.uint8)[IDS] for id in "ab"})
    printed = refuse("--masks", masks, words=("--masks", "--kind", "ids", "colours", "binary", "instances"))
    assert [line.split()[0] for line in printed.splitlines()] == ["value", "0", "128", "255"]
    run("--masks", masks, "--kind", "binary")
    assert np.array_equal(ids_of(tmp_path, "a"), IDS > 0)


@pytest.mark.parametrize("mask", [np.float32(IDS) + 0.5, -IDS.astype(np.int32)], ids=["fractions", "negative"])
def test_values_that_are_no_ids_are_refused(tmp_path, refuse, mask):
    masks = write_masks(tmp_path / "masks", {f"{id}.tif": mask for id in "ab"})
    refuse("--masks", masks, words=("a.tif", "no ids"))


def test_masks_of_one_value_are_refused(tmp_path, refuse):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": painted(IDS * 0, RED) for id in "ab"})
    refuse("--masks", masks, "--kind", "colours", words=("--masks", "colours: 1", "--kind"))


# Polygons


def labelme(shapes: list[dict], **more: object) -> dict:
    size = {"imageHeight": IDS.shape[0], "imageWidth": IDS.shape[1]}
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": "a.jpg",
        "imageData": None,
        **size,
        **more,
    }


def shape(label: str, points: list, kind: str = "polygon") -> dict:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}


def test_labelme_beside_the_images(tmp_path, photos, run):
    image_data = base64.b64encode((photos / "a.jpg").read_bytes()).decode()
    shapes = [shape("dog", OTHER), shape("cat", [(25, 25), (5, 5)], "rectangle"), shape("cat", OTHER[:2], "line")]
    write_json(photos / "a.json", labelme(shapes, imageData=image_data))
    write_json(photos / "b.json", labelme([shape("__ignore__", CORNERS)]))
    printed = run()
    assert names_of(tmp_path) == ["background", "cat", "dog"]
    assert np.array_equal(ids_of(tmp_path, "a"), IDS)
    assert np.array_equal(ids_of(tmp_path, "b"), np.where(IDS == 1, 255, 0))
    assert "shapes without an area, left out (1)" in printed and "kind: polygons" in printed


def test_labelme_order_circles_and_small_over_large(tmp_path, photos, run, refuse):
    shapes = [shape("spot", [(15, 20), (15, 30)], "circle"), shape("all", [(0, 0), (60, 0), (60, 40), (0, 40)])]
    write_json(tmp_path / "json" / "a.json", labelme(shapes))
    write_json(tmp_path / "json" / "b.json", labelme([shape("_background_", CORNERS), shape("all", OTHER)]))
    masks = ("--masks", tmp_path / "json", "--names")
    refuse(*masks, "spot", words=("a.json", "'all'", "--names"))
    run(*masks, "spot,all")
    assert names_of(tmp_path) == ["background", "spot", "all"]
    y, x = np.mgrid[:40, :60]
    assert np.array_equal(ids_of(tmp_path, "a"), np.where(np.hypot(x - 14.5, y - 19.5) < 10, 1, 2))
    assert np.array_equal(ids_of(tmp_path, "b"), IDS // 2 * 2)


def coco(names: list[str], annotations: dict[str, list[dict]], categories: list[dict]) -> dict:
    height, width = IDS.shape
    images = [{"id": k, "file_name": name, "width": width, "height": height} for k, name in enumerate(names)]
    rows = [
        {"id": 1, "iscrowd": 0, "image_id": names.index(n), **row} for n, rows in annotations.items() for row in rows
    ]
    return {"images": images, "annotations": rows, "categories": categories}


CATEGORIES = [
    {"id": 7, "name": "dog"},
    {"id": 3, "name": "cat"},
    {"id": 0, "name": "objects"},
    {"id": 9, "name": "Background"},
]


def flat(corners: list) -> list[int]:
    return [value for corner in corners for value in corner]


def counts_of(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask, columns first, zeros first."""
    pixels = mask.T.ravel().tolist()
    changes = [i for i in range(1, len(pixels)) if pixels[i] != pixels[i - 1]]
    runs = np.diff([0, *changes, len(pixels)]).tolist()
    return [0, *runs] if pixels[0] else runs


def compressed(counts: list[int]) -> str:
    text = ""
    for k, count in enumerate(counts):
        value = count - counts[k - 2] if k > 2 else count
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


@pytest.mark.parametrize("form", ["polygons", "counts", "compressed"])
def test_coco_in_every_form(tmp_path, run, form):
    def segmentation(ids: np.ndarray, corners: list) -> object:
        if form == "polygons":
            # Two halves of one object.
            (left, top), (right, _), (_, bottom), _ = corners
            halves = (
                [(left, top), (right, top), (right, 15), (left, 15)],
                [(left, 15), (right, 15), (right, bottom), (left, bottom)],
            )
            return [flat(half) for half in halves]
        counts = counts_of(ids)
        return {"size": list(ids.shape), "counts": counts if form == "counts" else compressed(counts)}

    rows = [
        {"category_id": 7, "segmentation": segmentation(IDS == 2, OTHER), "iscrowd": int(form != "polygons")},
        {"category_id": 3, "segmentation": segmentation(IDS == 1, CORNERS)},
        {"category_id": 3, "segmentation": [], "bbox": [0, 0, 9, 9]},
        {"category_id": 9, "segmentation": [flat([(10, 10), (12, 10), (12, 12), (10, 12)])]},
    ]
    path = write_json(tmp_path / "instances.json", coco(["a.jpg", "b.jpg", "c.jpg"], {"a.jpg": rows}, CATEGORIES))
    printed = run("--coco", path)
    expected = IDS.copy()
    expected[10:12, 10:12] = 0
    assert np.array_equal(ids_of(tmp_path, "a"), expected)
    assert not ids_of(tmp_path, "b").any()
    assert names_of(tmp_path) == ["background", "cat", "dog"]
    assert "left out (1): objects" in printed and "masks without an image, left out (1): c" in printed
    assert "shapes without an area, left out (1)" in printed


def test_compressed_counts_as_coco_writes_them(tmp_path, photos, run):
    # Of the format's own tools, for a mask of 70 x 50 pixels (width x height).
    text = (
        "0g05b08J4M2N2NA^O1`0OCO=0E090H080IO68DH;>@C>a0_O_O`0j0OWOF<:CM72I24NL43JM92FN;1ENKO72L0LO91J0MO92INO0NO122OO0M"
        "031O000NO31OO11MO40N011MO41MO21L06OL021L06OL021L06OL021L060J040L060J040L060J040L060J040L060J040L060J040L060KO31"
        "L06OL021L06OL021L06OL021L06OL021MO41MO21MO40N100NO310O00M0310O00NO1220NO92IONO91KOMO72M0<1EO:2GN63KM34OLM73JF<;"
        "=1G_O_Ob0=AC`07EH=1IO71H090F0:1DO>1_O1b0>2N2N3L6H]O"
    )
    write_picture(photos / "a.jpg", photo(0, (50, 70)))
    content = coco(["a.jpg", "b.jpg"], {}, CATEGORIES)
    content["images"][0] |= {"width": 70, "height": 50}
    content["annotations"] = [{"image_id": 0, "category_id": 3, "segmentation": {"size": [50, 70], "counts": text}}]
    run("--coco", write_json(tmp_path / "c.json", content))
    assert compressed(counts_of(ids_of(tmp_path, "a"))) == text


def test_roboflow_coco_export_becomes_lists(tmp_path, run):
    rows = [{"category_id": 3, "segmentation": [flat(CORNERS)]}]
    for folder, name in (("train", "a"), ("valid", "b"), ("test", "a")):
        write_photos(tmp_path / "export" / folder, f"{name}.jpg")
        write_json(
            tmp_path / "export" / folder / "_annotations.coco.json",
            coco([f"{name}.jpg"], {f"{name}.jpg": rows}, CATEGORIES),
        )
    run("--images", tmp_path / "export")
    assert [list_of(tmp_path, split) for split in ("train", "val", "test")] == [["train_a"], ["val_b"], ["test_a"]]
    assert np.array_equal(ids_of(tmp_path, "train_a"), IDS == 1)
    assert np.array_equal(build_dataset("folder", tmp_path / "out", "val")[0][1].numpy(), IDS == 1)


def test_a_coco_file_per_split_becomes_lists(tmp_path, run):
    rows = [{"category_id": 3, "segmentation": [flat(CORNERS)]}]
    files = {
        split: write_json(tmp_path / f"{split}.json", coco([name], {name: rows}, CATEGORIES))
        for split, name in (("train", "a.jpg"), ("val", "b.jpg"))
    }
    run("--coco", f"train={files['train']}", "--coco", f"val={files['val']}")
    assert (list_of(tmp_path, "train"), list_of(tmp_path, "val")) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"annotations": [{"image_id": 0, "category_id": 5, "segmentation": [[0, 0, 9, 0, 9, 9]]}]}, ("KeyError",)),
        (
            {"annotations": [{"image_id": 0, "category_id": 3, "segmentation": {"size": [9, 9], "counts": [81]}}]},
            ("9",),
        ),
        (
            {"annotations": [{"image_id": 0, "category_id": 3, "segmentation": [[0, 0, 9, 0, float("nan"), 9]]}]},
            ("finite",),
        ),
        ({"annotations": [{"image_id": 0, "category_id": 3, "segmentation": [[0, 0, 9, 0, 9]]}]}, ("reshape",)),
        ({"categories": []}, ("KeyError",)),
    ],
)
def test_damaged_coco_is_refused(tmp_path, refuse, change, words):
    rows = [{"category_id": 3, "segmentation": [flat(CORNERS)]}]
    path = write_json(tmp_path / "c.json", coco(["a.jpg", "b.jpg"], {"a.jpg": rows}, CATEGORIES) | change)
    refuse("--coco", path, words=("c.json", "export it again", *words))


def test_coco_that_is_no_json_or_of_another_size_is_refused(tmp_path, refuse):
    (tmp_path / "c.json").write_text("{")
    refuse("--coco", tmp_path / "c.json", words=("c.json", "JSONDecodeError"))
    content = coco(["a.jpg", "b.jpg"], {"a.jpg": [{"category_id": 3, "segmentation": [flat(CORNERS)]}]}, CATEGORIES)
    for image in content["images"]:
        image["width"] = 61
    refuse("--coco", write_json(tmp_path / "c.json", content), words=("c.json", "61x40", "60x40", "same size"))
    refuse("--coco", tmp_path / "c.json", "--names", "a,b", words=("--names", "leave it out"))


YAMLS = [
    "names: ['big dog', \"cat\"]\nnc: 2\n",
    "names: [big dog, cat]  # in order\nnc: 2\n",
    "path: .\nnames:\n  0: big dog\n  1: cat\nnc: 2\n",
    "names:\n- big dog\n- 'cat'\ntrain: a\n",
    "names: {0: big dog, 1: cat}\n",
    "names: [\n  big dog,\n  cat,\n]\n",
]


@pytest.mark.parametrize("yaml", YAMLS)
def test_yolo_polygons(tmp_path, run, yaml):
    write_photos(tmp_path / "export" / "train" / "images", "a.jpg")
    write_photos(tmp_path / "export" / "valid" / "images", "b.jpg")
    labels = [
        f"0 {' '.join(str(v) for x, y in OTHER for v in (x / 60, y / 40))}",
        f"1 {' '.join(str(v) for x, y in CORNERS for v in (x / 60, y / 40))}",
        "0 0.5 0.5 0.1 0.1",
    ]
    for folder, text in (("train/labels/a.txt", "\n".join(labels)), ("valid/labels/b.txt", "")):
        (tmp_path / "export" / folder).parent.mkdir()
        (tmp_path / "export" / folder).write_text(text)
    (tmp_path / "export" / "data.yaml").write_text(yaml)
    (tmp_path / "export" / "README.roboflow.txt").write_text(
        "This was exported by a tool that describes itself here."
    )
    printed = run("--images", tmp_path / "export")
    assert names_of(tmp_path) == ["background", "big dog", "cat"]
    assert np.array_equal(ids_of(tmp_path, "train_a"), np.array([0, 2, 1])[IDS])
    assert not ids_of(tmp_path, "val_b").any()
    assert (list_of(tmp_path, "train"), list_of(tmp_path, "val")) == (["train_a"], ["val_b"])
    assert "shapes without an area, left out (1)" in printed


def test_a_yolo_class_without_a_name_is_refused(tmp_path, refuse):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("2 0 0 1 0 1 1\n")
    (tmp_path / "data.yaml").write_text("names: [dog, cat]\n")
    refuse("--masks", tmp_path / "labels", words=("a.txt", "KeyError: 2"))


# Pairs


@pytest.mark.parametrize(
    ("image", "mask", "flags"),
    [
        ("A 1.JPG", "A 1.PNG", []),
        ("a.v2.jpg", "a.v2_mask.png", []),
        ("a.jpg", "a.jpg.png", []),
        ("a.jpeg", "a.jpg_Mask.Png", []),
        ("a.jpg", "a_segmentation.png", ["--mask_suffix", "_segmentation"]),
        (unicodedata.normalize("NFD", "schön.jpg"), unicodedata.normalize("NFC", "schön.png"), []),
        (unicodedata.normalize("NFC", "schön.jpg"), unicodedata.normalize("NFD", "schön.png"), []),
        ("images/street/a.jpg", "masks/street/a.png", []),
        ("rgb/a.jpg", "gt/a.png", []),
    ],
)
def test_a_mask_is_found_by_the_name_of_its_image(tmp_path, run, image, mask, flags):
    write_picture(tmp_path / "own" / image, photo())
    write_picture(tmp_path / "own" / "z.png", photo())
    mask_array = np.where(IDS > 0, 255, 0).astype(np.uint8)
    ending = "_segmentation" if flags else ""
    masks = write_masks(
        tmp_path / "masks", {mask: mask_array, f"z{ending}.png": mask_array, f".hidden{ending}.png": IDS}
    )
    (masks / "Thumbs.db").write_bytes(b"x")
    printed = run("--images", tmp_path / "own", "--masks", masks, *flags)
    written = sorted(path.name for path in (tmp_path / "out" / "SegmentationClass").iterdir())
    assert len(written) == 2 and "left out" not in printed
    assert len(build_dataset("folder", tmp_path / "out", "train")) == 1


def test_masks_beside_their_images(tmp_path, run):
    folder = write_photos(tmp_path / "both", "a.jpg", "b.jpg")
    write_masks(folder, {f"{id}_mask.png": np.where(IDS > 0, 255, 0).astype(np.uint8) for id in "ab"})
    run("--images", folder)
    assert np.array_equal(ids_of(tmp_path, "b"), IDS > 0)
    assert len(list((tmp_path / "out" / "JPEGImages").iterdir())) == 2


def test_what_has_no_partner_is_listed_and_left_out(tmp_path, photos, run):
    write_photos(photos, *(f"more{k}.jpg" for k in range(7)))
    mask = np.where(IDS > 0, 255, 0).astype(np.uint8)
    printed = run("--masks", write_masks(tmp_path / "masks", {"a.png": mask, "b.png": mask, "x.png": mask}))
    assert "images without a mask, left out (7): more0, more1, more2, more3, more4" in printed
    assert "masks without an image, left out (1): x" in printed
    assert len(list((tmp_path / "out" / "JPEGImages").iterdir())) == 2


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"x.png": IDS, "y.png": IDS}, ("'a'", "'x'", "--mask_suffix")),
        ({}, ("'a'", "no mask")),
        ({"a.png": IDS, "a_mask.png": IDS}, ("a.png", "a_mask.png", "two masks")),
        ({"a.png": IDS[:, :-1] * 200, "b.png": IDS * 200}, ("a.png", "59x40", "60x40")),
    ],
)
def test_pairs_that_do_not_fit_are_refused(tmp_path, refuse, masks, words):
    refuse("--masks", write_masks(tmp_path / "masks", masks), "--kind", "binary", words=words)


def test_two_images_of_one_name_are_refused(tmp_path, photos, refuse):
    write_picture(photos / "a.png", photo())
    refuse("--masks", write_masks(tmp_path / "masks", {"a.png": IDS}), words=("a.png", "a.jpg", "rename"))


def test_unreadable_files_are_refused(tmp_path, photos, refuse):
    masks = write_masks(tmp_path / "masks", {"a.png": IDS * 200, "b.png": IDS * 200})
    (masks / "a.png").write_bytes(b"no image")
    refuse("--masks", masks, "--kind", "binary", words=("a.png", "cannot be read"))
    write_masks(masks, {"a.png": IDS * 200})
    (photos / "b.jpg").write_bytes(b"no image")
    refuse("--masks", masks, "--kind", "binary", words=("b.jpg", "cannot be read"))


# Orientations 2 to 4 keep the size: there a mask counts as drawn upright, as annotation tools show images.
@pytest.mark.parametrize(
    ("orientation", "drawn"), [*((o, "upright") for o in range(1, 9)), *((o, "stored") for o in range(5, 9))]
)
def test_turned_images_are_written_upright_with_their_masks(tmp_path, run, orientation, drawn):
    upright_ids, upright = np.where(IDS > 0, 255, 0).astype(np.uint8), painted(IDS, RED, GREEN)
    turns = dict(zip(range(2, 9), (0, 3, 1, 5, 2, 6, 4), strict=True))  # from upright to stored
    stored, stored_ids = Image.fromarray(upright), Image.fromarray(upright_ids)
    if orientation > 1:
        stored, stored_ids = (image.transpose(Image.Transpose(turns[orientation])) for image in (stored, stored_ids))
    exif = Image.Exif()
    exif[0x112] = orientation
    (tmp_path / "own").mkdir()
    (tmp_path / "masks").mkdir()
    for name in ("a.jpg", "b.png"):
        stored.save(tmp_path / "own" / name, exif=exif)
    for name in "ab":
        (Image.fromarray(upright_ids) if drawn == "upright" else stored_ids).save(tmp_path / "masks" / f"{name}.png")
    run("--images", tmp_path / "own", "--masks", tmp_path / "masks")
    for name in ("a.jpg", "b.png"):
        assert np.array_equal(ids_of(tmp_path, name[0]), IDS > 0)
        with Image.open(tmp_path / "out" / "JPEGImages" / name) as image:
            assert image.getexif().get(0x112, 1) == 1
            tolerance = 60 if name == "a.jpg" else 0
            assert np.abs(np.array(image).astype(int) - upright).mean() <= tolerance / 4
        if orientation == 1:
            assert (tmp_path / "out" / "JPEGImages" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_turned_tiff_and_damaged_exif_data(tmp_path, run):
    (tmp_path / "own").mkdir()
    exif = Image.Exif()
    exif[0x112] = 6
    stored = Image.fromarray(painted(IDS, RED, GREEN)).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "own" / "a.tif", exif=exif)
    Image.fromarray(photo()).save(tmp_path / "own" / "b.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12")
    mask = np.where(IDS > 0, 255, 0).astype(np.uint8)
    run("--images", tmp_path / "own", "--masks", write_masks(tmp_path / "masks", {"a.png": mask, "b.png": mask}))
    for split in ("train", "val"):
        image, written = build_dataset("folder", tmp_path / "out", split)[0]
        assert image.shape[1:] == written.shape == IDS.shape and np.array_equal(written, IDS > 0)


def test_images_in_no_split_and_a_missing_val_are_said(tmp_path, run):
    write_photos(tmp_path / "own", "train/a.jpg", "test/b.jpg", "c.jpg")
    mask = np.where(IDS > 0, 255, 0).astype(np.uint8)
    masks = write_masks(tmp_path / "masks", {"train/a.png": mask, "test/b.png": mask, "c.png": mask})
    printed = run("--images", tmp_path / "own", "--masks", masks)
    assert (list_of(tmp_path, "train"), list_of(tmp_path, "test")) == (["train_a"], ["test_b"])
    assert "so in no list (1): c" in printed and "--val_split test" in printed


# The command


def digests(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_prints_the_table_and_writes_nothing(tmp_path, run):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": painted(IDS, RED, GREEN) for id in "ab"})
    before = sorted(tmp_path.rglob("*"))
    printed = run("--masks", masks, "--dry_run")
    assert "#dc143c" in printed and "next:" not in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_doctor_finds_is_said_at_the_end(tmp_path, run, capsys):
    with pytest.raises(SystemExit) as refusal:
        run("--masks", write_masks(tmp_path / "masks", {"a.png": painted(IDS, RED, GREEN)}))
    printed = capsys.readouterr()
    assert refusal.value.code == 2 and "FATAL" in printed.out and "training would fail" in printed.err
    assert np.array_equal(ids_of(tmp_path, "a") > 0, IDS > 0)


def test_the_source_is_not_touched_and_an_output_not_overwritten(tmp_path, run, refuse):
    cvat(tmp_path / "source", lists={"default.txt": "a\nb\n"})
    before = digests(tmp_path / "source") | digests(tmp_path / "photos")
    run("--masks", tmp_path / "source")
    assert digests(tmp_path / "source") | digests(tmp_path / "photos") == before
    written = digests(tmp_path / "out")
    refuse("--masks", tmp_path / "source", words=("--out", "exists already"))
    assert digests(tmp_path / "out") == written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--masks", "nowhere"], ("--masks nowhere", "no such folder")),
        (["--out", "photos/out"], ("--out", "inside --images")),
        (["--colours", "red"], ("--colours", "name=#rrggbb")),
        (["--kind", "letters"], ("--kind", "letters")),
        (["--coco", "nowhere.json"], ("nowhere.json", "cannot be read")),
    ],
)
def test_flags_that_cannot_be_used(tmp_path, monkeypatch, refuse, arguments, words):
    monkeypatch.chdir(tmp_path)
    refuse(*arguments, words=words)


def test_a_disk_error_leaves_nothing(tmp_path, monkeypatch, refuse):
    masks = write_masks(tmp_path / "masks", {f"{id}.png": painted(IDS, RED, GREEN) for id in "ab"})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.shutil, "copyfile", fail)
    refuse("--masks", masks, words=("out", "No space left", "free space"))
