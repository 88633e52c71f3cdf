import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset
from datasets.prepare.check import Finding, check_dataset, format_findings
from tests.conftest import write_picture, write_voc_layout
from utils.errors import InputError


def without_absent(findings: list[Finding]) -> list[Finding]:
    """Drops what is said of the 17 classes of VOC that the masks here do not show."""
    return [finding for finding in findings if "such a class cannot be learned" not in finding.problem]


def check(root: Path, name: str = "folder", splits: list[str] | None = None, **options: str) -> list[Finding]:
    return check_dataset(name, root, splits, **options)[0]


def only(findings: list[Finding], path: Path, *words: str, fatal: bool) -> None:
    """There is one finding: about this file, with these words, fatal or not."""
    assert [(finding.path, finding.fatal) for finding in findings] == [(str(path), fatal)]
    for word in words:
        assert word in findings[0].problem
    assert "\n" not in findings[0].problem


def lists(folder: Path) -> Path:
    return folder / "ImageSets" / "Segmentation"


def test_a_clean_folder_has_no_finding_and_every_pair_is_counted(folder):
    findings, checked = check_dataset("folder", folder)
    assert findings == []
    assert checked == {"folder": str(folder), "classes": 4, "pairs": {"train": 4, "val": 3}}


def test_a_clean_voc_has_no_finding_and_trainval_may_hold_the_other_lists(voc_root):
    voc = voc_root / "VOCdevkit" / "VOC2012"
    (lists(voc) / "trainval.txt").write_text("a1\na2\na3\na4\nb1\nb2\nb3\n")
    (lists(voc) / "train_aug.txt").write_text("an id that only 2012_aug has\n")
    findings, checked = check_dataset("voc", voc_root)
    assert without_absent(findings) == []
    assert checked == {"folder": str(voc), "classes": 21, "pairs": {"train": 4, "val": 3, "trainval": 7}}


def test_the_generated_data_set_has_no_finding(tmp_path):
    findings, checked = check_dataset("shapes", tmp_path, ["val"])
    assert findings == [] and checked["pairs"] == {"val": 100}


def test_without_lists_both_sides_of_the_division_are_checked(folder):
    for path in lists(folder).iterdir():
        path.unlink()
    write_picture(folder / "SegmentationClass" / "a3.png", np.full((40, 52), 9, np.uint8))
    findings, checked = check_dataset("folder", folder)
    only(findings, folder / "SegmentationClass" / "a3.png", "value 9", fatal=True)
    assert checked["pairs"] == {"train": 6, "val": 1}


def test_images_without_a_mask_are_a_warning_if_there_are_no_lists(folder):
    (folder / "SegmentationClass/a2.png").unlink()
    shutil.rmtree(folder / "ImageSets")
    (finding,) = check_dataset("folder", folder)[0]
    assert finding.path == str(folder / "JPEGImages") and not finding.fatal
    assert finding.problem.startswith("a2 is without a mask of that name, so unused")
    assert check_dataset("folder", folder, ["train"])[0] == []  # the other ids may be val's


def test_checking_writes_nothing_into_the_data_set(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    check(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def colour(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("RGB").save(path)


def crop(path: Path) -> None:
    with Image.open(path) as image:
        image.crop((0, 0, 30, 20)).save(path)


def utf16(path: Path) -> None:  # as Windows PowerShell writes it
    path.write_text(path.read_text(), encoding="utf-16")


def stray(path: Path) -> None:
    write_picture(path, np.full((40, 52), 4, np.uint8))


DAMAGES = [
    ("JPEGImages/a1.jpg", Path.unlink, "the image is missing; add it"),
    ("JPEGImages/a1.jpg", truncate, "cannot be read as an image"),
    ("JPEGImages/a1.jpg", empty, "cannot be read as an image"),
    ("SegmentationClass/a1.png", Path.unlink, "the mask is missing; add it"),
    ("SegmentationClass/a1.png", truncate, "cannot be read as a mask"),
    ("SegmentationClass/a1.png", empty, "cannot be read as a mask"),
    ("SegmentationClass/a1.png", colour, "holds colours (mode RGB), but a mask holds ids"),
    ("SegmentationClass/a1.png", crop, "the mask is 30x20, its image 52x40"),
    ("SegmentationClass/a1.png", stray, "value 4 is neither a class (0..3) nor void"),
    ("ImageSets/Segmentation/train.txt", empty, "the split is empty"),
    ("ImageSets/Segmentation/train.txt", utf16, "save it as UTF-8"),
]


@pytest.mark.parametrize(("file", "damage", "problem"), DAMAGES, ids=lambda value: getattr(value, "__name__", None))
def test_damage_is_found_by_file_and_is_fatal_as_it_is_in_training(folder, file, damage, problem):
    damage(folder / file)
    only(check(folder), folder / file, problem, fatal=True)
    with pytest.raises(InputError, match=Path(file).name):
        dataset = build_dataset("folder", folder, "train")
        dataset.require_masks()
        dataset.require_images()
        dataset[0]


def test_all_problems_are_found_in_one_go_whatever_their_order(folder):
    (folder / "SegmentationClass" / "a1.png").unlink()
    truncate(folder / "JPEGImages" / "a2.jpg")
    colour(folder / "SegmentationClass" / "a2.png")
    (folder / "JPEGImages" / "a4.jpg").unlink()
    stray(folder / "SegmentationClass" / "b3.png")
    (lists(folder) / "extra.txt").write_text("\n")
    names = {Path(finding.path).name for finding in check(folder)}
    assert names == {"a1.png", "a2.jpg", "a2.png", "a4.jpg", "b3.png", "extra.txt"}


def test_a_pair_in_two_lists_is_reported_once(folder):
    (lists(folder) / "trainval.txt").write_text("a1\na2\na3\na4\nb1\nb2\nb3\n")
    truncate(folder / "SegmentationClass" / "a1.png")
    only(check(folder), folder / "SegmentationClass" / "a1.png", "cannot be read", fatal=True)


@pytest.mark.parametrize(
    ("folder_name", "named", "problem"),
    [("JPEGImages", "JPEGImages/a1.jpg", "7 of 7"), ("SegmentationClass", "SegmentationClass", "has no masks")],
)
def test_files_that_are_all_missing_are_one_finding(folder, folder_name, named, problem):
    for path in (folder / folder_name).iterdir():
        path.unlink()
    only(check(folder), folder / named, problem, fatal=True)


@pytest.mark.parametrize("text", [None, "sky\nroad\nsky\n", "sky\n", b"sky\nStra\xdfe\n"])
def test_unusable_class_names_are_one_finding(folder, text):
    path = folder / "class_names.txt"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    only(check(folder), path, fatal=True)


def test_a_missing_folder_is_one_finding(tmp_path):
    only(check(tmp_path, "voc"), tmp_path / "VOCdevkit" / "VOC2012", "--data_root", fatal=True)


def test_a_split_without_a_list_is_found_and_the_others_are_checked(folder):
    findings, checked = check_dataset("folder", folder, ["train", "tset"])
    only(findings, lists(folder) / "tset.txt", "there is no such split list", "choose from train, val", fatal=True)
    assert checked["pairs"] == {"train": 4}


def test_a_mask_that_is_all_void_is_a_warning(folder):
    path = folder / "SegmentationClass" / "a1.png"
    write_picture(path, np.full((40, 52), 255, np.uint8))
    only(check(folder), path, "the whole mask is void", fatal=False)


@pytest.mark.parametrize(("first", "warned"), [("background", True), ("_background_", True), ("sky", False)])
def test_a_mask_of_one_class_is_a_warning_only_if_that_is_the_background(tmp_path, first, warned):
    folder = write_voc_layout(tmp_path, {"train": ["a", "b"], "val": ["c"]}, class_names=[first, "road"])
    path = folder / "SegmentationClass" / "a.png"
    mask = np.zeros((40, 52), np.uint8)
    mask[0] = 255
    write_picture(path, mask)
    write_picture(folder / "SegmentationClass" / "b.png", np.ones((52, 40), np.uint8))
    findings = check(folder)
    assert [finding.path for finding in findings] == [str(path)] * warned
    assert not any(finding.fatal for finding in findings)


def test_ids_listed_twice_are_a_warning(folder):
    (lists(folder) / "train.txt").write_text("a1\na2\na1\na3\na4\na2\na1\n")
    only(check(folder), lists(folder) / "train.txt", "a1, a2 are listed more than once", fatal=False)


@pytest.mark.parametrize(
    ("one", "other"), [("train", "val"), ("train", "test"), ("val", "test"), ("f1_train", "f1_val")]
)
def test_ids_in_two_lists_that_must_be_apart_are_a_warning(folder, one, other):
    for path in lists(folder).iterdir():
        path.unlink()
    (lists(folder) / f"{one}.txt").write_text("a1\na2\na3\n")
    (lists(folder) / f"{other}.txt").write_text("b1\na3\n")
    only(check(folder), lists(folder) / f"{one}.txt", f"a3 is also in {other}", fatal=False)


def test_many_shared_ids_are_counted(folder):
    write_voc_layout(folder, {"train": (ids := [f"t{k}" for k in range(9)]), "val": ids}, class_names=["sky", "road"])
    only(check(folder), lists(folder) / "train.txt", "t0, t1, t2, t3, t4 and 4 more are also in val", fatal=False)


def test_the_same_image_under_two_ids_of_train_and_val_is_a_warning(folder):
    source, copy = folder / "JPEGImages" / "a3.jpg", folder / "JPEGImages" / "b1.jpg"
    copy.write_bytes(source.read_bytes())
    (folder / "SegmentationClass" / "b1.png").write_bytes((folder / "SegmentationClass" / "a3.png").read_bytes())
    only(check(folder), copy, "is the same image as a3, which is in train", fatal=False)


def test_images_of_one_length_need_not_be_the_same(folder):
    one, other = (folder / "JPEGImages" / name for name in ("a1.jpg", "b1.jpg"))
    length = max(one.stat().st_size, other.stat().st_size)
    for path in (one, other):  # readers stop before bytes past the end
        path.write_bytes(path.read_bytes().ljust(length, b"\0"))
    assert one.stat().st_size == other.stat().st_size
    assert check(folder) == []


def test_broken_images_are_not_reported_as_the_same(folder):
    for name in ("a1", "b1"):
        empty(folder / "JPEGImages" / f"{name}.jpg")
    assert [Path(finding.path).name for finding in check(folder) if finding.fatal] == ["a1.jpg", "b1.jpg"]
    assert len(check(folder)) == 2


@pytest.fixture
def augmented(voc_root):
    voc = voc_root / "VOCdevkit" / "VOC2012"
    for name in ("a1", "a2", "b2"):
        with Image.open(voc / "SegmentationClass" / f"{name}.png") as mask:
            write_picture(voc / "SegmentationClassAug" / f"{name}.png", np.array(mask))
    (lists(voc) / "train_aug.txt").write_text("a1\na2\n")
    return voc_root


def test_train_of_2012_aug_is_its_own_list_with_its_own_masks(augmented):
    (augmented / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()  # the list of 2012
    findings, checked = check_dataset("voc", augmented, year="2012_aug")
    assert without_absent(findings) == [] and checked["pairs"] == {"train": 2, "val": 3}
    path = augmented / "VOCdevkit/VOC2012/SegmentationClassAug/a2.png"
    path.unlink()
    only(without_absent(check(augmented, "voc", year="2012_aug")), path, "the mask is missing", fatal=True)


@pytest.mark.parametrize("splits", [None, ["train"]])
def test_2012_aug_that_shares_ids_with_val_is_fatal_and_its_pairs_are_still_checked(augmented, splits):
    voc = augmented / "VOCdevkit" / "VOC2012"
    (lists(voc) / "train_aug.txt").write_text("a1\na2\nb2\n")
    (voc / "SegmentationClassAug" / "a2.png").unlink()
    findings = without_absent(check(augmented, "voc", splits, year="2012_aug"))
    assert {(finding.path, finding.fatal) for finding in findings} == {
        (str(lists(voc) / "train_aug.txt"), True),
        (str(voc / "SegmentationClassAug" / "a2.png"), True),
    }


def test_2012_aug_is_kept_apart_from_every_other_list(augmented):
    voc = augmented / "VOCdevkit" / "VOC2012"
    (lists(voc) / "train_aug.txt").write_text("a1\na2\nb2\n")
    (lists(voc) / "test.txt").write_text("a2\nb3\n")
    (voc / "JPEGImages" / "b3.jpg").write_bytes((voc / "JPEGImages" / "a1.jpg").read_bytes())
    findings = without_absent(check(augmented, "voc", ["train_aug", "val", "test"], year="2012_aug"))
    problems = {finding.problem: (Path(finding.path).name, finding.fatal) for finding in findings}
    assert [(about, problem.split(",")[0]) for problem, about in problems.items()] == [
        (("train_aug.txt", True), "b2 is also in val (1 such ids); remove them from the list"),
        (("b3.jpg", False), "is the same image as a1"),
        (("train_aug.txt", False), "a2 is also in test"),
        (("val.txt", False), "b3 is also in test"),
    ]


def test_report_of_a_clean_set_says_what_was_checked(folder):
    assert format_findings(*check_dataset("folder", folder)) == [
        f"{folder}: 4 classes",
        "  train        4 pairs",
        "  val          3 pairs",
        "no problem found",
    ]


def test_report_marks_fatal_findings_first_and_groups_files_with_one_problem():
    findings = [
        Finding("x/a.png", "all void", fatal=False),
        Finding("x/b.png", "missing", fatal=True),
        Finding("x/c.png", "broken", fatal=True),
        *(Finding(f"x/{k}.png", "missing", fatal=True) for k in range(4)),
    ]
    checked = {"folder": "x", "classes": 2, "pairs": {"train": 1464, "val": 9}}
    assert format_findings(findings, checked, limit=3) == [
        "x: 2 classes",
        "  train    1,464 pairs",
        "  val          9 pairs",
        "FATAL    5 files: missing",
        "         x/b.png",
        "         x/0.png",
        "         x/1.png",
        "         and 2 more",
        "FATAL    x/c.png: broken",
        "warning  x/a.png: all void",
        "fatal: 6, warnings: 1",
    ]


def test_camvid_has_no_finding(real_data):
    findings, checked = check_dataset("folder", real_data("camvid"))
    assert findings == [] and checked["pairs"] == {"train": 367, "val": 101, "test": 233}


def test_real_masks_without_images_are_one_fatal_finding(real_data):
    findings, checked = check_dataset("voc", real_data("voc2012_masks"), ["val"])
    folder = real_data("voc2012_masks") / "VOCdevkit" / "VOC2012"
    only(findings, folder / "JPEGImages" / "2007_000033.jpg", "the image is missing (1,449 of 1,449", fatal=True)
    assert checked["pairs"] == {"val": 1449}
