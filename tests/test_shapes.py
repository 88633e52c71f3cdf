import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import shapes
from datasets.voc import voc_colormap
from tests.conftest import before
from utils.errors import InputError

ROOT = Path(__file__).parent.parent
SMALL = {"num_classes": 4, "num_images": 14, "size": 64, "seed": 5}
FOLDERS = {"JPEGImages", "SegmentationClass", "ImageSets"}


def read_list(folder: Path, split: str) -> list[str]:
    return (folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().splitlines()


def read_masks(folder: Path, split: str) -> list[np.ndarray]:
    return [np.array(Image.open(folder / "SegmentationClass" / f"{id}.png")) for id in read_list(folder, split)]


def read_pixels(folder: Path, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields RGB `[n, 3]` and class ids `[n]` of the pixels of each image that are not void."""
    for id, mask in zip(read_list(folder, split), read_masks(folder, split), strict=True):
        colours = np.array(Image.open(folder / "JPEGImages" / f"{id}.jpg"))
        yield colours[mask != 255].astype(int), mask[mask != 255].astype(int)


def table_miou(folder: Path, table: np.ndarray, levels: int) -> float:
    """Returns the mean IoU on val of predicting `table[RGB]`, each channel in so many `levels`."""
    num_classes = len((folder / "class_names.txt").read_text().splitlines())
    confusion = np.zeros((num_classes, num_classes), int)
    for colours, ids in read_pixels(folder, "val"):
        np.add.at(confusion, (ids, table[tuple((colours * levels // 256).T)]), 1)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float((confusion.diagonal()[union > 0] / union[union > 0]).mean())


def count_colours(folder: Path, levels: int) -> np.ndarray:
    """Counts the pixels of train by red, green and blue level and by class: `[levels, levels, levels, classes]`."""
    num_classes = len((folder / "class_names.txt").read_text().splitlines())
    counts = np.zeros((levels, levels, levels, num_classes), int)
    for colours, ids in read_pixels(folder, "train"):
        np.add.at(counts, (*(colours * levels // 256).T, ids), 1)
    return counts


def colour_lookup_miou(folder: Path, *, levels: int = 16, balanced: bool = False) -> float:
    """Returns the mean IoU on val of predicting the class most frequent for a colour in train.

    balanced: relative to the frequency of the class.
    """
    counts = count_colours(folder, levels)
    weights = 1 / counts.sum((0, 1, 2)) if balanced else 1
    return table_miou(folder, (counts * weights).argmax(-1), levels)


def constant_miou(folder: Path) -> float:
    """Returns the mean IoU on val of always predicting the most frequent class of train."""
    return table_miou(folder, np.full((1, 1, 1), count_colours(folder, 1).argmax()), 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A quarter of the default set: enough to measure frequencies and the score of a lookup. Do not change it."""
    return shapes.generate(tmp_path_factory.mktemp("shapes") / "quarter", num_images=125)


@pytest.fixture
def small(tmp_path) -> Path:
    return shapes.generate(tmp_path / "small", **SMALL)


# Drawing


def test_same_arguments_give_the_same_bytes_and_another_seed_other_images(small, tmp_path):
    again = shapes.generate(tmp_path / "again", **SMALL)
    other = contents(shapes.generate(tmp_path / "other", **{**SMALL, "seed": 6}))
    first = contents(small)
    assert len(first) == 2 * 14 + 3 + 2 and contents(again) == first
    assert not any(other[name] == first[name] for name in first if name.endswith((".jpg", ".png")))


def test_an_image_and_its_split_do_not_depend_on_the_number_of_images(small, tmp_path):
    more = shapes.generate(tmp_path / "more", **{**SMALL, "num_images": 22})
    few, many = contents(small), contents(more)
    assert all(many[name] == few[name] for name in few if name.endswith((".jpg", ".png")))
    assert set(read_list(small, "val")) == set(read_list(more, "val")) & set(read_list(small, "trainval"))


def test_layout_is_that_of_voc(folder):
    assert {path.name for path in folder.iterdir()} == FOLDERS | {"class_names.txt", "shapes.json"}
    train, val, both = (read_list(folder, split) for split in ("train", "val", "trainval"))
    assert (len(train), len(val)) == (100, 25)
    assert sorted(train + val) == both and len(set(both)) == 125
    names = (folder / "class_names.txt").read_text().splitlines()
    assert names == shapes.class_names(7) and names[0] == "background"
    for id in both:
        image = Image.open(folder / "JPEGImages" / f"{id}.jpg")
        mask = Image.open(folder / "SegmentationClass" / f"{id}.png")
        assert (image.format, image.mode, mask.format, mask.mode) == ("JPEG", "RGB", "PNG", "P")
        assert image.size == mask.size
        assert mask.getpalette() == voc_colormap().ravel().tolist()


def test_masks_hold_class_ids_separated_by_thin_void_borders(folder):
    masks = read_masks(folder, "trainval")
    assert set(np.concatenate([mask.ravel() for mask in masks])) == {*range(7), 255}
    for mask in masks:
        for one, next_one in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            differ = one != next_one
            assert ((one == 255) | (next_one == 255))[differ].all()
        blocks = np.lib.stride_tricks.sliding_window_view(mask == 255, (9, 9)).all((2, 3))
        assert not blocks.any()
    assert 0.02 < np.mean([(mask == 255).mean() for mask in masks]) < 0.2


def test_images_have_several_sizes_both_landscape_and_portrait(folder):
    sizes = [mask.shape for mask in read_masks(folder, "trainval")]
    assert set(sizes) == {(128, 128), (128, 160), (160, 128), (96, 128)}
    assert min(sizes.count(size) for size in set(sizes)) > 12


def test_classes_differ_in_frequency(folder):
    shown_in = np.sum([np.isin(range(7), mask) for mask in read_masks(folder, "trainval")], 0)
    assert shown_in[1] > 1.5 * shown_in[6]
    assert shown_in[0] == 125 and shown_in[6] > 12


def test_most_images_show_several_classes(folder):
    assert np.mean([len(np.unique(mask)) > 3 for mask in read_masks(folder, "trainval")]) > 0.6


def test_colour_alone_does_not_give_the_class_away(folder):
    assert 0 < constant_miou(folder) < 0.15
    for levels in (8, 16):
        assert colour_lookup_miou(folder, levels=levels) < 0.25
        assert colour_lookup_miou(folder, levels=levels, balanced=True) < 0.25


def test_colour_lookup_finds_classes_that_differ_in_colour(small):
    """Otherwise the bound above would hold for any data."""
    for id, mask in zip(read_list(small, "trainval"), read_masks(small, "trainval"), strict=True):
        Image.fromarray(voc_colormap()[mask]).save(small / "JPEGImages" / f"{id}.jpg", quality=100, subsampling=0)
    assert colour_lookup_miou(small) > 0.9 > constant_miou(small)


def test_texture_lies_where_the_mask_has_the_class():
    slopes = {0: [], 1: []}  # of brightness, downwards and across: level stripes change downwards
    for index in range(12):
        image, mask = shapes.draw(index, num_classes=2, size=128, seed=1)
        grey, ids = np.array(image.convert("L"), float), np.array(mask)
        for id, found in slopes.items():
            found.append([np.abs(slope)[ids == id].mean() for slope in np.gradient(grey)])
    for id, low, high in ((0, 0.8, 1.25), (1, 3, 9)):
        down, across = np.mean(slopes[id], 0)
        assert low < down / across < high


def test_151_classes_look_different_and_the_smallest_set_of_them_has_each_in_both_splits():
    names = shapes.class_names(151)
    assert len(set(names)) == 151
    assert shapes.class_names(7) == names[:7]  # ids keep their meaning
    shown = {True: set(), False: set()}
    for index in range(747):
        mask = shapes.draw(index, num_classes=151, size=shapes.MIN_SIZE, seed=1)[1]
        shown[index % 5 == 1].update(np.unique(mask).tolist())
    assert shown[True] == shown[False] == {*range(151), 255}


# Writing


def test_an_existing_set_is_not_rewritten(small, monkeypatch):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [small, *small.rglob("*")]}

    before = times()
    monkeypatch.setattr(shapes, "draw", None)
    assert shapes.generate(small, **SMALL) == small
    assert times() == before


@pytest.mark.parametrize("name, value", [("num_classes", 3), ("num_images", 20), ("size", 80), ("seed", 6)])
def test_set_with_other_arguments_is_refused_and_kept(small, name, value):
    before = contents(small)
    with pytest.raises(InputError, match=rf"small: .*{name} {SMALL[name]}, not {value};.*another folder or delete"):
        shapes.generate(small, **{**SMALL, name: value})
    assert contents(small) == before


def test_set_of_another_recipe_is_refused(small, monkeypatch):
    monkeypatch.setattr(shapes, "RECIPE", shapes.RECIPE + 1)
    with pytest.raises(InputError, match="recipe"):
        shapes.generate(small, **SMALL)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_generation_leaves_nothing_and_the_next_one_works(tmp_path, monkeypatch, stop):
    def draw(index, draw=shapes.draw, **drawing):
        if index == 7:
            raise stop
        return draw(index, **drawing)

    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(shapes, "draw", draw)
        shapes.generate(tmp_path / "set", **SMALL)
    assert not any(tmp_path.iterdir())
    assert len(read_list(shapes.generate(tmp_path / "set", **SMALL), "trainval")) == 14


def test_two_processes_started_together_give_one_valid_set(tmp_path):
    fork = multiprocessing.get_context("fork")  # spares the children the import of torch
    barrier = fork.Barrier(2)

    def generate() -> None:
        barrier.wait(timeout=60)
        shapes.generate(tmp_path / "set", **SMALL)

    both = [fork.Process(target=generate) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=60)
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert contents(tmp_path / "set") == contents(shapes.generate(tmp_path / "alone", **SMALL))


def test_loser_of_a_race_uses_the_winners_set(tmp_path, monkeypatch):
    folder = tmp_path / "set"

    def win(_: int) -> None:
        shapes.generate(folder, **SMALL)
        (folder / "winner").touch()

    before(monkeypatch, "datasets.shapes.draw", 14, win)
    assert shapes.generate(folder, **SMALL) == folder
    assert (folder / "winner").exists() and list(tmp_path.iterdir()) == [folder]


def test_loser_of_a_race_with_other_arguments_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    before(monkeypatch, "datasets.shapes.draw", 14, lambda _: shapes.generate(folder, **{**SMALL, "seed": 6}))
    with pytest.raises(InputError, match="seed 6, not 5"):
        shapes.generate(folder, **SMALL)
    assert json.loads((folder / "shapes.json").read_text())["seed"] == 6
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("content", [None, "not JSON", "[1, 2]", "3"])
def test_folder_of_something_else_is_refused_and_kept(tmp_path, content):
    (tmp_path / "mine.txt").write_text("kept")
    if content is not None:
        (tmp_path / "shapes.json").write_text(content)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"has no readable shapes\.json.*choose another"):
        shapes.generate(tmp_path, **SMALL)
    assert contents(tmp_path) == before


def test_file_in_the_folders_place_is_refused_and_kept(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"file: has no readable shapes\.json"):
        shapes.generate(tmp_path / "file", **SMALL)
    with pytest.raises(InputError, match=r"below: cannot be written .*choose another path"):
        shapes.generate(tmp_path / "file" / "below", **SMALL)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_empty_folder_and_missing_parents_are_used_with_the_usual_permissions(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    shapes.generate(".", **SMALL)
    assert len(read_list(tmp_path / "empty", "trainval")) == 14
    new = shapes.generate(tmp_path / "a" / "b", **SMALL)
    assert new.stat().st_mode == new.parent.stat().st_mode


# The command


def test_command_writes_the_set_and_says_what_and_where(tmp_path, capsys):
    folder = tmp_path / "set"
    shapes.main(["--out", str(folder), "--classes", "4", "--images", "14", "--size", "64", "--seed", "5"])
    assert capsys.readouterr().out == f"{folder}: 14 images (11 train, 3 val), 4 classes including background\n"
    assert contents(folder) == contents(shapes.generate(tmp_path / "same", **SMALL))
    assert (len(read_list(folder, "train")), len(read_list(folder, "val"))) == (11, 3)


def test_command_with_bad_input_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "datasets.shapes", "--out", str(tmp_path / "set"), "--images", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "--images 3: 7 classes" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag, value, bound",
    [
        ("--classes", "1", "2 to 151"),
        ("--classes", "152", "2 to 151"),
        ("--images", "26", "27 or more"),
        ("--images", "-4", "27 or more"),
        ("--size", "63", "64 pixels"),
        ("--seed", "-1", "0 or more"),
    ],
)
def test_argument_out_of_range_is_refused_with_its_bounds(tmp_path, capsys, flag, value, bound):
    with pytest.raises(SystemExit) as exit:
        shapes.main(["--out", str(tmp_path / "set"), flag, value])
    assert exit.value.code == 2
    assert f"{flag} {value}: " in (error := capsys.readouterr().err) and bound in error
    assert not any(tmp_path.iterdir())


def test_help_says_whether_classes_count_background(capsys):
    with pytest.raises(SystemExit) as exit:
        shapes.main(["--help"])
    assert exit.value.code == 0
    assert "2 to 151, including background" in capsys.readouterr().out
