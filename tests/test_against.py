import re

import numpy as np
import pytest

from utils.against import ImageCounts, read_against, read_counts
from utils.errors import InputError

NAMES = ["sky", "road"]
COUNTS = np.arange(3 * 3 * 2, dtype=np.int32).reshape(3, 3, 2)


@pytest.fixture
def path(tmp_path):
    """The counts of a test of the images b, a and c."""
    ImageCounts(["b", "a", "c"], NAMES, COUNTS).save(tmp_path / "counts.npz")
    return tmp_path / "counts.npz"


def test_counts_are_read_in_the_order_of_their_ids_from_a_file_or_its_folder(path):
    for place in (path, path.parent):
        stored = read_counts(place)
        assert stored.ids == ["a", "b", "c"] and stored.class_names == NAMES
        assert stored.counts.dtype == np.int32 and np.array_equal(stored.counts, COUNTS[[1, 0, 2]])


def test_the_same_counts_make_the_same_file(path, tmp_path):
    ImageCounts(["b", "a", "c"], NAMES, COUNTS).save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_the_order_of_the_images_makes_no_difference_and_without_the_flag_there_is_nothing_to_read(path):
    assert read_against(str(path), ["c", "b", "a"], NAMES).ids == ["a", "b", "c"]
    assert read_against(None, ["a"], NAMES) is None


@pytest.mark.parametrize(
    ("ids", "names", "words"),
    [
        (
            ["a", "b"],
            NAMES,
            "has 3 images, this test 2 (c is in one of them only); test both on the same",
        ),
        (["a", "b", "d"], NAMES, "has 3 images, this test 3 (c is in one of them only)"),
        (["a", "b", "c"], ["road", "sky"], "its classes (sky, road) are not those of this data set (road, sky)"),
    ],
)
def test_a_test_of_other_images_or_classes_is_refused(path, ids, names, words):
    with pytest.raises(InputError, match=re.escape(f"--against {path}: {words}")):
        read_against(str(path), ids, names)


def not_a_zip(path):
    path.write_text("class,iou\n")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-30])


def damaged(path):
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)


def plain_array(path):
    with path.open("wb") as file:
        np.save(file, COUNTS)


def pickled(path):
    np.savez(path, ids=np.array([{}, "a", 1], object), class_names=NAMES, counts=COUNTS)


def without_counts(path):
    np.savez(path, ids=["a", "b", "c"], class_names=NAMES)


def of_other_shape(path):
    np.savez(path, ids=["a", "b"], class_names=NAMES, counts=COUNTS)


def of_other_type(path):
    np.savez(path, ids=["a", "b", "c"], class_names=NAMES, counts=COUNTS.astype(float))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil",
    [not_a_zip, cut_off, damaged, plain_array, pickled, without_counts, of_other_shape, of_other_type, empty],
)
def test_a_file_that_is_not_the_counts_of_a_test_is_refused_in_one_line(path, spoil):
    spoil(path)
    with pytest.raises(InputError, match=re.escape(f"--against {path}: not the counts that --test_only")) as error:
        read_against(str(path), ["a", "b", "c"], NAMES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "empty", "a" * 300])
def test_a_folder_without_counts_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no counts.npz; test that model with --test_only"):
        read_against(str(tmp_path / name), ["a"], NAMES)
