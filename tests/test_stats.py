import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from datasets import build_dataset
from datasets.stats import (
    CLASS_WEIGHTS,
    ClassStatistics,
    choose_samples,
    class_statistics,
    class_weights,
    format_statistics,
    statistics_table,
)
from tests.conftest import write_picture
from utils.errors import InputError

MASKS = {  # of the folder's training images; classes sky, road, tree, car
    "a1": [[0, 0, 0, 255], [0, 0, 0, 255]],
    "a2": [[1, 1, 0, 0, 0], [255, 255, 255, 0, 0]],
    "a3": [[255, 255]],
    "a4": [[2, 0], [0, 0], [0, 0]],
}


@pytest.fixture
def counted(folder) -> ClassStatistics:
    """Statistics of MASKS; two of the images are missing."""
    for name, mask in MASKS.items():
        write_picture(folder / "SegmentationClass" / f"{name}.png", np.array(mask, np.uint8))
    for name in ("a1", "a4"):
        (folder / "JPEGImages" / f"{name}.jpg").unlink()
    return class_statistics(build_dataset("folder", folder, "train"))


def make(shows: list[list[int]], *, area: int = 100) -> ClassStatistics:
    """Statistics of images with that many pixels of each class, void up to `area` pixels in all."""
    counts = np.array(shows, np.int64)
    names, ids = [f"c{k}" for k in range(counts.shape[1])], [f"i{k}" for k in range(len(counts))]
    return ClassStatistics(names, ids, counts, area - counts.sum(axis=1))


def shown(statistics: ClassStatistics, indices: list[int]) -> list[int]:
    return (statistics.counts[indices] > 0).sum(axis=0).tolist()


def test_statistics_are_those_counted_by_hand(counted):
    assert counted.class_names == ["sky", "road", "tree", "car"] and counted.ids == ["a1", "a2", "a3", "a4"]
    assert counted.counts.tolist() == [[6, 0, 0, 0], [5, 2, 0, 0], [0, 0, 0, 0], [5, 0, 1, 0]]
    assert counted.void.tolist() == [2, 3, 2, 0]
    assert counted.counts.dtype == counted.void.dtype == np.int64
    assert counted.pixels.tolist() == [16, 2, 1, 0]
    assert counted.images.tolist() == [3, 1, 1, 0]
    assert counted.image_pixels.tolist() == [19, 7, 6, 0]
    assert counted.shares == pytest.approx([16 / 19, 2 / 19, 1 / 19, 0]) and counted.shares.sum() == pytest.approx(1)
    assert counted.void_share == pytest.approx(7 / 26)
    assert counted.imbalance == 16


def test_a_split_without_a_label_has_shares_of_zero_and_no_imbalance():
    empty = make([[0, 0], [0, 0]])
    assert empty.shares.tolist() == [0, 0] and empty.void_share == 1 and np.isnan(empty.imbalance)
    assert format_statistics(empty)[-2:] == ["void: 100.00% of all pixels", "in no image: c0, c1"]


def test_counting_writes_nothing_into_the_data_set(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    class_statistics(build_dataset("folder", folder, "train"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_mask_that_cannot_be_used_is_named(folder):
    write_picture(folder / "SegmentationClass" / "a3.png", np.full((4, 4), 9, np.uint8))
    with pytest.raises(InputError, match=r"a3\.png: value 9 is neither a class"):
        class_statistics(build_dataset("folder", folder, "train"))


def test_table_has_a_row_per_class_with_its_weights(counted):
    header, rows = statistics_table(counted)
    assert header == [
        "class",
        "pixels",
        "pixel_share",
        "images",
        "image_share",
        "weight_inverse",
        "weight_median_frequency",
        "weight_effective_number",
    ]
    assert rows[1][:5] == ["road", 2, pytest.approx(2 / 19, rel=1e-5), 1, 0.25]
    # By median frequency 19 / 16, 7 / 2 and 6; by effective number 1 / (1 - 0.999^3) and 1 / 0.001 twice.
    effective = 1000 * 19 / (16 / (1 - 0.999**3) + 3 * 1000)
    assert rows[1][5:] == pytest.approx([19 / 6, 3.5 * 19 / (19 + 7 + 6), effective], rel=1e-5)
    assert rows[3] == ["car", 0, 0.0, 0, 0.0, 0.0, 0.0, 0.0]
    assert [type(cell) for cell in rows[0]] == [str, int, float, int, float, float, float, float]


def test_text_is_aligned_and_ends_with_the_totals(counted):
    table, totals = format_statistics(counted)[:5], format_statistics(counted)[5:]
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["sky", "16", "84.21%", "3", "75.0%", "0.3958", "0.7051", "0.7603"]
    assert table[4].split() == ["car", "0", "0.00%", "0", "0.0%", "-", "-", "-"]
    assert totals == [
        "",
        "4 classes, 4 images, 19 labelled pixels",
        "void: 26.92% of all pixels",
        "imbalance: 16.0 pixels of sky to one of tree",
        "in no image: car",
    ]


def test_chosen_images_show_every_class_that_any_image_shows():
    statistics = make([[50, 0, 0, 0, 0], [50, 9, 0, 0, 0], [50, 0, 9, 0, 0], [50, 0, 0, 9, 0], [50, 0, 0, 0, 0]])
    assert sorted(choose_samples(statistics, 3, seed=1)) == [1, 2, 3]


def test_the_first_images_are_the_smallest_set_that_covers_the_classes():
    pairs = [[9, 9, 0, 0, 0, 0], [0, 0, 9, 9, 0, 0], [0, 0, 0, 0, 9, 9]]
    single = [[9 * (c == k) for c in range(6)] for k in range(6)] * 4
    statistics = make(single + pairs)
    for seed in range(5):
        assert sorted(choose_samples(statistics, 10, seed)[:3]) == [24, 25, 26]
        assert sorted(choose_samples(statistics, 3, seed)) == [24, 25, 26]


def test_the_rarest_class_comes_first():
    statistics = make([[9, 0, 0]] * 3 + [[0, 9, 0]] + [[0, 0, 9]] * 2)
    assert [choose_samples(statistics, 3, seed)[0] for seed in range(5)] == [3] * 5


def test_further_images_spread_over_the_classes():
    statistics = make([[9, 0, 0]] * 30 + [[0, 9, 0]] * 30 + [[0, 0, 9]] * 2)
    assert shown(statistics, choose_samples(statistics, 6, seed=1)) == [2, 2, 2]
    assert shown(statistics, choose_samples(statistics, 12, seed=1)) == [5, 5, 2]


def test_the_choice_depends_on_the_seed_alone():
    statistics = make([[9, 0]] * 20 + [[0, 9]] * 20)
    state = np.random.get_state()[1].tolist()
    choices = [choose_samples(statistics, 6, seed) for seed in (1, 2, 3, 1, 2, 3)]
    assert choices[:3] == choices[3:] and len({tuple(sorted(choice)) for choice in choices}) == 3
    assert np.random.get_state()[1].tolist() == state


def test_a_class_is_represented_where_it_fills_1_percent_of_an_image():
    statistics = make([[500, 9]] * 20 + [[500, 10], [500, 90]], area=1000)
    assert {choose_samples(statistics, 1, seed)[0] for seed in range(8)} == {20, 21}


def test_a_class_that_never_fills_1_percent_is_represented_where_it_fills_most():
    assert choose_samples(make([[500, 3], [500, 7], [500, 5]], area=1000), 1, seed=1) == [1]


def test_void_counts_in_the_size_of_an_image():
    statistics = ClassStatistics(["c0"], ["i0", "i1"], np.array([[9], [90]]), np.array([991, 910]))
    assert [choose_samples(statistics, 1, seed) for seed in range(8)] == [[1]] * 8


def test_a_speck_is_enough_if_there_are_too_few_images_for_anything_better():
    statistics = make([[900, 1, 1], [0, 900, 0], [0, 0, 900]], area=1000)
    assert sorted(choose_samples(statistics, 3, seed=1)) == [0, 1, 2]
    assert choose_samples(statistics, 1, seed=1) == [0]


def test_too_few_images_to_cover_the_classes_are_refused_with_the_number_needed():
    statistics = make([[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0], [9, 0, 0, 0]])
    with pytest.raises(InputError, match="--num 2: too few images to show all 3 classes; give 3 or more"):
        choose_samples(statistics, 2, seed=1)


def test_more_images_than_exist_are_refused_with_both_numbers():
    statistics = make([[9], [9]])
    with pytest.raises(InputError, match="--num 3: the split has only 2 images"):
        choose_samples(statistics, 3, seed=1)


def test_all_images_can_be_chosen_even_those_without_a_label():
    choice = choose_samples(make([[0, 0], [9, 0], [0, 0], [0, 9]]), 4, seed=1)
    assert sorted(choice) == [0, 1, 2, 3] and set(choice[:2]) == {1, 3}


def test_an_id_that_is_listed_twice_is_chosen_once():
    statistics = make([[9], [9], [9]])
    statistics.ids = ["same", "same", "other"]
    assert sorted(choose_samples(statistics, 2, seed=1)) == [0, 2]
    with pytest.raises(InputError, match="only 2 images"):
        choose_samples(statistics, 3, seed=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0, 0, 1, 20]), min_size=4, max_size=4), min_size=1, max_size=12),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_a_choice_has_no_duplicates_and_covers_or_names_a_number_that_does(shows, num, seed):
    statistics = make(shows, area=200)
    num = min(num, len(shows))
    try:
        choice = choose_samples(statistics, num, seed)
    except InputError as error:
        more = int(str(error).split("give ")[1].split()[0])
        assert more > num
        choice, num = choose_samples(statistics, more, seed), more
    assert len(set(choice)) == len(choice) == num
    assert [count > 0 for count in shown(statistics, choice)] == (statistics.pixels > 0).tolist()


def test_inverse_weights_are_the_balanced_ones_of_scikit_learn():
    labels = np.repeat([0, 1, 3], [70, 25, 5])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    weights = class_weights("inverse", np.bincount(labels))
    assert weights.dtype == torch.float32
    assert weights[[0, 1, 3]].tolist() == pytest.approx(expected.tolist()) and weights[2] == 0
    assert weights[torch.from_numpy(labels)].mean().item() == pytest.approx(1)


def test_median_frequency_weights_divide_by_the_images_that_show_the_class():
    # Eigen and Fergus 2015, section 6.3.2: frequencies 80/100, 10/100 and 10/20 have the median 1/2.
    weights = class_weights("median_frequency", np.array([80, 10, 10, 0]), np.array([100, 100, 20, 0]))
    assert weights.dtype == torch.float32
    scale = 100 / (80 * 0.625 + 10 * 5 + 10 * 1)
    assert weights.tolist() == pytest.approx([0.625 * scale, 5 * scale, scale, 0])


def test_effective_number_weights_divide_by_the_number_of_distinct_images():
    # Cui et al. 2019: 1, 2 and 1,000,000 images are worth 1, 1.999 and 1,000.
    pixels, images = np.array([10, 30, 60, 0]), np.array([1, 2, 1_000_000, 0])
    weights = class_weights("effective_number", pixels, images=images)
    assert weights.dtype == torch.float32
    scale = 100 / (10 + 30 / 1.999 + 60 / 1000)
    assert weights.tolist() == pytest.approx([scale, scale / 1.999, scale / 1000, 0])


@given(st.lists(st.lists(st.sampled_from([0, 0, 1, 20, 3000]), min_size=4, max_size=4), min_size=1, max_size=12))
def test_the_mean_weight_of_a_labelled_pixel_is_1_and_rarer_classes_never_weigh_less(shows):
    statistics = make(shows)
    pixels, image_pixels, images = statistics.pixels, statistics.image_pixels, statistics.images
    frequency = pixels / np.maximum(image_pixels, 1)
    for method, rarity in zip(CLASS_WEIGHTS, (pixels, frequency, images), strict=True):
        weights = class_weights(method, pixels, image_pixels, images=images).double().numpy()
        assert ((weights > 0) == (pixels > 0)).all()
        if pixels.any():
            assert (weights * pixels).sum() / pixels.sum() == pytest.approx(1, rel=1e-6)
            order = np.argsort(rarity[pixels > 0])
            assert (np.diff(weights[pixels > 0][order]) <= 1e-6 * weights.max()).all()


def test_effective_number_is_milder_than_inverse():
    pixels, images = np.array([900, 90, 9]), np.array([90, 30, 3])
    spread = [w.max() / w.min() for w in (class_weights(m, pixels, images=images) for m in CLASS_WEIGHTS[::2])]
    assert spread[0].item() == pytest.approx(100) and 25 < spread[1] < 30


@pytest.mark.parametrize("method", CLASS_WEIGHTS[1:])
def test_weights_without_the_counts_that_they_need_are_refused(method):
    with pytest.raises(ValueError, match=f"{method} needs image"):
        class_weights(method, np.array([1, 2]))


@pytest.mark.parametrize("method", CLASS_WEIGHTS)
def test_weights_are_zero_where_nothing_is_labelled(method):
    nothing = np.zeros(3, np.int64)
    assert class_weights(method, nothing, nothing, images=nothing).tolist() == [0, 0, 0]


def test_unknown_class_weights_are_refused():
    with pytest.raises(InputError, match="--class_weights log: .* choose one of inverse, median_frequency"):
        class_weights("log", np.array([1, 2]))


@pytest.fixture
def voc_train(real_data):
    return build_dataset("voc", real_data("voc2012_masks"), "train")


def test_the_real_voc_training_set_has_its_known_statistics(voc_train):
    statistics = class_statistics(voc_train)
    by_name = {row[0]: row for row in statistics_table(statistics)[1]}
    assert by_name["background"][2] == pytest.approx(0.7336, abs=5e-5)
    assert by_name["person"][2] == pytest.approx(0.0483, abs=5e-5)
    assert by_name["bicycle"][2] == pytest.approx(0.0031, abs=5e-5)
    assert by_name["person"][3] == 442 and by_name["sheep"][3] == 63
    assert statistics.imbalance == pytest.approx(240, abs=0.5)
    histogram = np.sum([Image.open(path).histogram()[:256] for path in voc_train.masks[::20]], axis=0)
    assert statistics.counts[::20].sum(axis=0).tolist() == histogram[:21].tolist()
    assert statistics.void[::20].sum() == histogram[255]

    choices = [choose_samples(statistics, 20, seed) for seed in (1, 1, 2)]
    assert choices[0] == choices[1] and set(choices[0]) != set(choices[2])
    for choice in choices:
        assert len(set(choice)) == 20 and min(shown(statistics, choice)) >= 2
        areas = statistics.counts[choice] / (statistics.counts[choice].sum(axis=1) + statistics.void[choice])[:, None]
        assert (areas.max(axis=0) >= 0.01).all()


def test_weights_on_camvid_order_its_classes_by_rarity(real_data):
    statistics = class_statistics(build_dataset("folder", real_data("camvid"), "train"))
    weights = class_weights("inverse", statistics.pixels)
    rarest_first = [statistics.class_names[k] for k in weights.argsort(descending=True)]
    assert rarest_first[:2] == ["bicyclist", "pedestrian"] and rarest_first[-2:] == ["building", "road"]
