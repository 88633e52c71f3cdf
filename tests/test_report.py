import base64
import csv
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from tests.conftest import TINY, write_voc_layout
from utils.against import ImageCounts
from utils.engine import predict
from utils.errors import InputError
from utils.pictures import report, report_data
from utils.run import HISTORY
from utils.weights.load import load_model

CPU = torch.device("cpu")
CLASSES = ["sky", "road", "tree", "car"]
MATRIX = [[80, 20, 0, 0], [0, 100, 0, 0], [10, 0, 30, 0], [0, 0, 0, 0]]
DATA_SECTIONS = ("predictions", "data")


def write_run(folder, *, mious=(0.5,), class_names=CLASSES, matrix=MATRIX, ious=None, **options):
    """Writes a run without checkpoint or data: a validation per mIoU, 10 iterations apart."""
    folder.mkdir(parents=True)
    defaults = {"dataset": "folder", "data_root": "no data", "year": "2012", "model": "m", "lr": 0.01, "amp": "auto"}
    defaults |= {"train_split": "train", "val_split": "val", "random_seed": 1, "batch_size": 4}
    defaults |= {"total_itrs": 10 * len(mious), "run_name": folder.name, "versions": {"torch": "2.0"}}
    defaults |= {
        "device_name": "cpu (1 threads)",
        "git_commit": "abc",
        "command": f"main.py --run_name {folder.name}",
    }
    (folder / "options.json").write_text(json.dumps(defaults | options))
    rows = [
        [n, 10 * n, 1 / n, 0.01, *(miou + more for more in (0.3, 0.2, 0.1, 0)), 20, 5, 1000 + n, 1 / n]
        for n, miou in enumerate(mious, 1)
    ]
    counts = np.array(matrix)
    with np.errstate(invalid="ignore"):
        computed = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    write_csv(folder / "history.csv", [HISTORY, *rows])
    write_csv(folder / "class_iou.csv", [["class", "iou"], *zip(class_names, ious or computed, strict=True)])
    named = [[name, *row] for name, row in zip(class_names, counts.tolist(), strict=True)]
    write_csv(folder / "confusion_matrix.csv", [["target \\ prediction", *class_names], *named])
    return folder


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


class Page(HTMLParser):
    """A report as its readers see it: text and tables by section, pictures, and every tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.pictures, self.texts, self.tables = [], [], {}, {}
        self.section, self.cell, self.caption = "header", None, None
        self.feed(text)
        self.texts = {section: " ".join(text.split()) for section, text in self.texts.items()}

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
        elif tag == "img":
            self.pictures.append((self.section, attributes))
        elif tag == "table":
            self.tables.setdefault(self.section, []).append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("td", "th"):
            self.cell = {"text": "", "css": attributes.get("class", "").split(), "style": attributes.get("style", "")}
            self.tables[self.section][-1][-1].append(self.cell)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if self.cell is not None:
            self.cell["text"] += data

    def table(self, section, number=0):
        """Maps each row name to its cells by column name."""
        header, *rows = self.tables[section][number]
        names = [cell["text"] for cell in header[1:]]
        return {row[0]["text"]: dict(zip(names, row[1:], strict=True)) for row in rows}

    def column(self, section, name, number=0):
        return {row: cells[name]["text"] for row, cells in self.table(section, number).items()}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes a report on runs and returns the page, without curves, which take most of the time."""
    monkeypatch.setattr(report, "curves", lambda runs: {"source": "", "width": 1, "height": 1})

    def write(*runs, **keywords):
        out = tmp_path / "out" / "report.html"
        report.write_report(list(runs), out, device=CPU, **keywords)
        return Page(out.read_text(encoding="utf-8"))

    return write


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three validations on a small folder of data."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("report")
    splits = {"train": ["a1", "a2", "a3", "a4"], "val": ["b1", "b2", "b3"]}
    data = write_voc_layout(root / "own", splits, class_names=CLASSES)
    flags = ["--dataset", "folder", "--data_root", str(data), "--run_dir", str(root / "runs"), "--run_name", "a"]
    main.main([*flags, *TINY, "--total_itrs", "6", "--save_val_results"])
    return root / "runs" / "a"


def data_of(run):
    return Path(json.loads((run / "options.json").read_text())["data_root"])


def copy_run(run, target, **options):
    """Copies a run, with some options changed."""
    shutil.copytree(run, target)
    path = target / "options.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return target


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    """A report on the run and a copy of it, with all pictures."""
    folder = tmp_path_factory.mktemp("drawn")
    report.write_report([trained, copy_run(trained, folder / "b")], folder / "report.html", device=CPU)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# --- numbers ---


def test_summary_gives_the_first_best_epoch_its_accuracies_and_the_last(make, tmp_path):
    page = make(write_run(tmp_path / "a", mious=[0.2, 0.61, 0.61, 0.4]))
    row = {name: cell["text"] for name, cell in page.table("scores")["a"].items()}
    assert row == {
        "best mIoU": "0.6100",
        "at epoch": "2",
        "last mIoU": "0.4000",
        "Overall Acc": "0.9100",
        "Mean Acc": "0.8100",
        "FreqW Acc": "0.7100",
    }
    assert "a reaches a mean IoU of 0.6100 on the validation images, at epoch 2." in page.texts["header"]
    validations = page.table("scores", 1)
    assert [validations[name]["iteration"]["text"] for name in ("a, best", "a, last")] == ["20", "40"]


def test_only_the_best_run_is_marked(make, tmp_path):
    runs = [write_run(tmp_path / name, mious=[miou, 0.1]) for name, miou in (("a", 0.3), ("b", 0.5), ("c", 0.4))]
    page = make(*runs)
    assert page.column("scores", "best mIoU") == {"a": "0.3000", "b": "0.5000 ★", "c": "0.4000"}
    assert "b is the best of 3 runs" in page.texts["header"]


def test_only_options_that_differ_are_listed_first_and_marked(make, tmp_path):
    page = make(write_run(tmp_path / "a", lr=0.01), write_run(tmp_path / "b", lr=0.1, warmup_itrs=5, data_root="x"))
    differing, every = page.table("options"), page.table("options", 1)
    assert {name: [cell["text"] for cell in row.values()] for name, row in differing.items()} == {
        "lr": ["0.01", "0.1"],
        "warmup_itrs": ["-", "5"],
        "data_root": ["no data", "x"],
    }
    marked = {name for name, row in every.items() if any("differs" in cell["css"] for cell in row.values())}
    assert marked == set(differing) and {"model", "batch_size", "run_name"} <= set(every) - marked
    assert "lr (0.01, 0.1)" in page.texts["header"]


def test_environment_is_shown_and_marked_where_it_differs_but_not_the_command(make, tmp_path):
    page = make(write_run(tmp_path / "a"), write_run(tmp_path / "b", versions={"torch": "2.1"}))
    table = page.table("environment")
    assert "The runs have the same options." in page.texts["options"]
    assert {name for name, row in table.items() if "differs" in row["b"]["css"]} == {"torch"}
    assert table["command"]["b"]["text"] == "main.py --run_name b" and table["git_commit"]["a"]["text"] == "abc"


def test_size_of_the_model_is_beside_the_environment_and_a_dash_for_older_runs(make, tmp_path):
    runs = [write_run(tmp_path / "a", parameters=39_761_845, gflops=124.759), write_run(tmp_path / "b")]
    page = make(*runs)
    options, environment = page.table("options"), page.table("environment")
    assert [cell["text"] for cell in environment["parameters"].values()] == ["39,761,845", "-"]
    assert [cell["text"] for cell in environment["gflops"].values()] == ["124.8", "-"]
    assert "parameters" not in options


def test_class_table_has_a_bar_as_long_as_each_iou_and_a_dash_for_an_absent_class(make, tmp_path):
    page = make(write_run(tmp_path / "a"), write_run(tmp_path / "b", ious=[0.9, 0.1, 0.75, math.nan]))
    a, b = "a (epoch 1)", "b (epoch 1)"
    assert page.column("classes", a) == {
        "sky": "0.7273",
        "road": "0.8333 ★",
        "tree": "0.7500 ★",
        "car": "-",
        "mean (mIoU)": "0.7702",
        "classes in the mean": "3 of 4",
    }
    assert page.column("classes", b)["tree"] == "0.7500 ★"
    assert list(page.column("classes", a))[:4] == ["sky", "tree", "road", "car"]  # by the mean of both runs
    table = page.table("classes")
    assert [table[name][a]["style"] for name in CLASSES] == ["--share: 0.727", "--share: 0.833", "--share: 0.750", ""]
    assert "bar" in table["sky"][a]["css"] and "best" in table["sky"][b]["css"]


def test_precision_recall_and_f1_come_from_the_confusion_matrix(make, tmp_path):
    page = make(write_run(tmp_path / "a"), write_run(tmp_path / "b", class_names=["sky", "road", "lake", "car"]))
    rows = page.table("classes", 1)
    assert [page.column("classes", f"a, {name}", 1)["sky"] for name in ("precision", "recall", "f1")] == [
        "0.8889",  # 80 / 90
        "0.8000",  # 80 / 100
        "0.8421",  # 160 / 190
    ]
    assert page.column("classes", "a, recall", 1)["mean"] == "0.8500"  # of sky, road and tree
    assert rows["car"]["a, f1"]["text"] == rows["lake"]["a, f1"]["text"] == rows["tree"]["b, recall"]["text"] == "-"


def test_runs_with_different_classes_are_reported_but_not_ranked(make, tmp_path):
    other = write_run(tmp_path / "b", class_names=["road", "sky", "lake", "car"], mious=[0.9])
    page = make(write_run(tmp_path / "a"), other)
    assert "The runs do not have the same classes" in page.texts["header"] and "best of" not in page.texts["header"]
    assert "★" not in page.texts["scores"]
    rows = page.table("classes")
    assert rows["lake"]["a (epoch 1)"]["text"] == rows["tree"]["b (epoch 1)"]["text"] == "not a class"
    assert rows["sky"]["b (epoch 1)"]["text"] == "0.8333 ★"  # by name, not by position


def write_test(run, *, right, split="val", target=(100, 50, 0, 0), images=60):
    """Writes the counts of a test in which every image has the same counts."""
    counts = np.tile(np.array([[*right, 0, 0], target, target], np.int32), (images, 1, 1))
    (run / f"test_{split}").mkdir()
    ImageCounts([f"{n:03}" for n in range(images)], CLASSES, counts).save(run / f"test_{split}" / "counts.npz")


def write_card(run, test="test_val", **figures):
    card = {"val_split": "val", "mean_iou": 0.51, "bootstrap": [0.47, 0.5432]}
    card |= {"labelled_images": 1449, "mean_boundary_iou": None, "worst": []}
    (run / test).mkdir(exist_ok=True)
    (run / test / "card.json").write_text(json.dumps(card | figures))


def test_headline_is_the_tested_score_of_the_best_run_with_its_interval(make, tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", mious=[0.3])
    write_card(a, "test_val_tta_flip", mean_iou=0.52)
    assert "0.5200 mean IoU of a on val" in make(a, b).texts["header"]
    write_card(a)
    page = make(a, b)
    assert "0.5100 mean IoU of a on val, 95% interval 0.4700 to 0.5432 test_val, 1,449 images" in page.texts["header"]
    row = {name: cell["text"] for name, cell in page.table("scores", 1)["a/test_val"].items()}
    assert row == {"mIoU": "0.5100", "95% interval": "0.4700 to 0.5432", "boundary IoU": "-", "images": "1,449"}
    assert set(page.table("scores", 1)) == {"a/test_val", "a/test_val_tta_flip"}


def test_headline_without_a_test_is_the_best_validation(make, tmp_path):
    page = make(write_run(tmp_path / "a", mious=[0.4, 0.6, 0.5]))
    assert "0.6000 mean IoU of a on val best validation; not tested yet" in page.texts["header"]
    assert "Test each run first: main.py --test_only" in page.texts["scores"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"mean_iou": 0.5}', '{"mean_iou": null, "bootstrap": [0.1, 0.2]}']
)
def test_damaged_card_is_refused_by_its_file(make, tmp_path, text):
    run = write_run(tmp_path / "a")
    write_card(run)
    (run / "test_val" / "card.json").write_text(text)
    with pytest.raises(InputError, match=re.escape("a/test_val/card.json: not the card that --test_only writes")):
        make(run)
    assert not (tmp_path / "out").exists()


def test_best_test_is_compared_with_each_other_test_of_the_same_data(make, tmp_path):
    a, b, c = (write_run(tmp_path / name) for name in "abc")
    write_test(a, right=(50, 50))  # IoU 1/3 and 1
    write_test(b, right=(100, 25))  # IoU 1 and 1/3
    write_test(b, right=(100, 50), split="val_tta_flip")
    write_test(c, right=(100, 50), target=(100, 51, 0, 0))  # other masks
    page = make(a, b, c)
    text = page.texts["scores"]
    assert "b/test_val_tta_flip over a/test_val" in text and "b/test_val_tta_flip over b/test_val" in text
    assert "c/test_val" not in text and len(page.tables["scores"]) == 4
    rows = [[name, *(cell["text"] for cell in row.values())] for name, row in page.table("scores", 1).items()]
    assert rows == [
        ["mIoU", "+33.33", "33.33 to 33.33", "100.0%", "60", "0"],
        ["sky", "+66.67", "66.67 to 66.67", "100.0%", "60", "0"],
        ["road", "+0.00", "0.00 to 0.00", "0.0%", "60", "0"],
        ["tree", "-", "-", "-", "0", "-"],
        ["car", "-", "-", "-", "0", "-"],
    ]
    assert page.column("scores", "points of IoU", 2)["road"] == "+66.67"


def test_comparison_of_few_images_has_a_note_and_without_two_tests_it_says_what_to_do(make, tmp_path):
    a, b = (write_run(tmp_path / name) for name in "ab")
    write_test(a, right=(50, 50), images=20)
    assert "Test each run first: main.py --test_only" in make(a, b).texts["scores"]
    write_test(b, right=(60, 50), images=20)
    assert "20 images are few: below 50" in make(a, b).texts["scores"]


def test_damaged_counts_are_refused_by_their_file(make, tmp_path):
    run = write_run(tmp_path / "a")
    write_test(run, right=(50, 50))
    (run / "test_val" / "counts.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=re.escape("a/test_val/counts.npz: not the counts that --test_only writes")):
        make(run)
    assert not (tmp_path / "out").exists()


def test_confusion_matrix_is_a_percentage_of_each_row(make, tmp_path):
    page = make(write_run(tmp_path / "a"))
    table = page.table("confusions")
    texts = [[cell["text"] for cell in row.values()] for row in table.values()]
    assert texts == [["80", "20", "", ""], ["", "100", "", ""], ["25", "", "75", ""], ["", "", "", "-"]]
    assert table["sky"]["road"]["style"] == "--share: 0.200"
    assert [name for name, cell in table["tree"].items() if "right" in cell["css"]] == ["tree"]


def test_most_frequent_confusions_come_first_without_correct_pixels(make, tmp_path):
    page = make(write_run(tmp_path / "a"))
    rows = [[cell["text"] for cell in row] for row in page.tables["confusions"][1][1:]]
    assert rows == [["sky", "road", "20", "20.0%", "66.7%"], ["tree", "sky", "10", "25.0%", "33.3%"]]


def test_worst_confusions_are_in_words_by_their_share_of_the_class(make, tmp_path):
    text = make(write_run(tmp_path / "a")).texts["confusions"]
    worst = "25% of the pixels of tree are predicted as sky. 20% of the pixels of sky are predicted as road."
    assert worst in text and text.count("are predicted as") == 2
    right = make(write_run(tmp_path / "b", matrix=np.diag([1, 2, 3, 4]))).texts["confusions"]
    assert "No pixel is predicted as another class." in right
    rare = make(write_run(tmp_path / "c", matrix=[[999, 1], [0, 9]], class_names=["sky", "road"])).texts["confusions"]
    assert "Under 1% of the pixels of sky are predicted as road." in rare


def test_confusion_matrix_of_many_classes_shows_those_with_the_most_errors_and_says_so(make, tmp_path):
    matrix = np.diag(np.full(150, 50))
    matrix[140, 7] = 30
    page = make(write_run(tmp_path / "a", class_names=[f"class {n}" for n in range(150)], matrix=matrix))
    table = page.table("confusions")
    assert len(table) == 30 and "30 of 150 classes, those with the most errors" in page.texts["confusions"]
    assert table["class 140"]["class 7"]["text"] == "38"


def test_speed_is_per_iteration_and_per_validation_and_memory_is_the_peak(make, tmp_path):
    page = make(write_run(tmp_path / "a", mious=[0.1, 0.2, 0.3]))
    row = {name: cell["text"] for name, cell in page.table("environment", 1)["a"].items()}
    assert row == {
        "device": "cpu (1 threads)",
        "seconds per iteration": "2.000",
        "images per second": "2.0",
        "seconds per validation": "5.0",
        "minutes in total": "1.2",
        "peak memory (MB)": "1,003",
    }


def test_unfinished_run_and_different_validation_data_are_announced(make, tmp_path):
    page = make(write_run(tmp_path / "a", total_itrs=5000), write_run(tmp_path / "b", val_split="test"))
    assert "a is not finished: its results are from iteration 10 of 5,000." in page.texts["header"]
    assert "The runs name different validation data" in page.texts["header"]
    assert "different validation data" not in make(tmp_path / "a").texts["header"]


# --- the page ---


def test_user_text_is_escaped_everywhere(make, tmp_path):
    evil = "<script>alert('$title {0}')</script>"
    run = write_run(tmp_path / "a<i>&b", class_names=[evil, '"', "x", "y"], model='"><img src=x onerror=y>')
    page = make(run, write_run(tmp_path / "b", class_names=[evil, '"', "x", "y"]))
    assert not {"script", "i"} & {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert evil in page.table("classes") and evil in page.table("confusions")
    assert page.table("options")["model"]["a<i>&b"]["text"] == '"><img src=x onerror=y>'
    assert "Semantic segmentation: a<i>&b, b" in page.texts["header"]


def test_page_is_self_contained(drawn):
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in drawn.tags}
    sources = [attributes["src"] for _, attributes in drawn.tags if "src" in attributes]
    assert sources and all(source.startswith("data:image/") for source in sources)
    template = Path(report.__file__).with_suffix(".html")
    assert all(attributes["href"].startswith("#") for _, attributes in drawn.tags if "href" in attributes)
    assert not re.search(r"url\(|@import|https?:", template.read_text(encoding="utf-8"))


def test_contents_link_to_every_section_and_the_language_is_set(make, tmp_path):
    page = make(write_run(tmp_path / "a"))
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [f"#{section}" for section in sections] and len(set(sections)) == len(sections) == 9
    assert ("html", {"lang": "en"}) in page.tags
    assert sum(tag == "h1" for tag, _ in page.tags) == 1


def test_pictures_decode_and_have_descriptions_and_charts_are_png(drawn):
    kinds = {}
    for section, attributes in drawn.pictures:
        kind, data = re.fullmatch(r"data:image/(\w+);base64,(.+)", attributes["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert picture.format == kind.upper() and str(picture.width) == attributes["width"]
            assert picture.getextrema() != ((255, 255),) * 3
        assert attributes["alt"]
        kinds.setdefault(section, []).append(kind)
    assert kinds == {
        "predictions": ["jpeg", "png", "png", "png"] * 3,  # image, annotation and both runs
        "curves": ["png"],
        "worst-images": ["jpeg", "png", "png", "jpeg"] * 3 * 2,  # image, annotation, prediction and errors
        "data": ["jpeg", "png"] * 4,
    }


def test_masks_keep_their_exact_colours_and_large_images_are_shrunk(tmp_path):
    mask = np.zeros((800, 1000, 3), np.uint8)
    mask[300:, 401:] = (128, 0, 64)
    for photo, kind in ((False, "png"), (True, "jpeg")):
        drawing = report.thumbnail(mask, "caption", photo=photo)
        head, data = drawing["source"].split(",")
        assert head == f"data:image/{kind};base64" and (drawing["width"], drawing["height"]) == (500, 400)
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert photo or {colour for _, colour in picture.getcolors()} == {(0, 0, 0), (128, 0, 64)}


# --- pictures of the data and the models ---


def test_mean_iou_of_best_is_that_of_the_history_and_the_worst_image_comes_first(make, trained):
    page = make(trained, num=2)
    with (trained / "history.csv").open() as file:
        best = max(float(row["mean_iou"]) for row in csv.DictReader(file))
    assert f"Chosen from the 3 validation images; their overall mIoU is {best:.4f}." in page.texts["worst-images"]
    shown = {section: [each["alt"] for own, each in page.pictures if own == section] for section in page.texts}
    own = image_ious(trained)
    ranked = sorted(own, key=own.get)[:2]
    assert shown["worst-images"] == [
        text
        for name in ranked
        for text in (
            f"{name}, image",
            f"{name}, annotation",
            f"{name}, prediction: mIoU {own[name]:.4f}",
            f"{name}, errors in red",
        )
    ]
    compared = [text.removesuffix(", image") for text in shown["predictions"][::3]]
    assert (
        shown["predictions"][2::3] == [f"{name}, a: mIoU {own[name]:.4f}" for name in compared] and len(compared) == 2
    )


def image_ious(run):
    """mIoU of each validation image, computed independently from the predictions of best.pth."""
    data = data_of(run)
    model = load_model(run / "best.pth", CPU).model
    result = {}
    for name in ("b1", "b2", "b3"):
        image = torch.from_numpy(np.array(Image.open(data / f"JPEGImages/{name}.jpg"))).permute(2, 0, 1)
        target = np.array(Image.open(data / f"SegmentationClass/{name}.png"))
        prediction = predict(model, image[None])[0].numpy()
        prediction = np.where(target == 255, 255, prediction)
        pairs = [((target == c) & (prediction == c), (target == c) | (prediction == c)) for c in range(4)]
        result[name] = np.mean([both.sum() / either.sum() for both, either in pairs if either.any()])
    return result


def test_bounded_evaluation_says_how_many_images_it_saw(make, trained, monkeypatch):
    monkeypatch.setattr(report_data, "EVALUATED_ON_CPU", 1)
    page = make(trained, num=1)
    assert re.search(r"Chosen from [12] of the 3 validation images", page.texts["worst-images"])


def test_without_data_the_sections_say_so_and_the_rest_is_written(make, tmp_path):
    page = make(write_run(tmp_path / "a"))
    for section in DATA_SECTIONS:
        assert "Not available for a because its data cannot be opened" in page.texts[section]
        assert "no data: there is no such folder" in page.texts[section]
    assert page.table("scores") and page.table("classes") and page.table("environment", 1)


def test_checkpoints_describe_themselves(make, trained, tmp_path):
    known = make(trained).column("environment", trained.name, 2)
    assert known["made by"] == "main.py" and known["classes"] == "4: sky, road, tree, car"
    assert known["model"] == "deeplabv3plus_mobilenet_v3_large, output stride 16"
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    assert f"{checkpoint['cur_itrs']} iterations of 2 crops of 33 pixels, cross_entropy" in known["training"]
    assert f"mIoU {checkpoint['scores']['Mean IoU']:.4f}" in known["scores"] and "on val" in known["scores"]
    assert known["data"].startswith("folder in ") and known["data"].endswith(", train")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", known["saved"])
    assert f"torch {torch.__version__}" in known["versions"] and "cpu" in known["device"]
    older, foreign = shutil.copytree(trained, tmp_path / "older"), shutil.copytree(trained, tmp_path / "foreign")
    del checkpoint["about"]
    torch.save(checkpoint, older / "best.pth")
    torch.save(checkpoint["model_state"], foreign / "best.pth")
    page = make(older, foreign)
    assert "saved" not in page.column("environment", "older", 2)
    assert page.column("environment", "foreign", 2)["made by"] == "bare weights"
    assert page.column("environment", "foreign", 2)["scores"] == "-"


def test_without_best_pth_the_data_and_the_other_runs_predictions_are_shown(make, trained, tmp_path):
    other = copy_run(trained, tmp_path / "b")
    (other / "best.pth").unlink()
    page = make(trained, other)
    assert f"Not available for b: {other / 'best.pth'}: no such file" in page.texts["predictions"]
    assert "Worst images of a" in page.texts["worst-images"] and "Worst images of b" not in page.texts["worst-images"]
    assert "Not available" not in page.texts["data"]


def test_data_root_says_where_the_data_are(make, trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data_of(trained), moved)
    run = copy_run(trained, tmp_path / "c", data_root="nowhere")
    assert "Worst images of c" not in make(run).texts["worst-images"]
    assert "Worst images of c" in make(run, data_root=str(moved)).texts["worst-images"]


def test_data_whose_classes_differ_from_the_run_are_not_shown(make, trained, tmp_path):
    other = shutil.copytree(data_of(trained), tmp_path / "other")
    (other / "class_names.txt").write_text("sky\nroad\ntree\nhouse\n")
    text = make(trained, data_root=str(other)).texts["predictions"]
    assert "its classes (sky, road, tree, house) are not those of the run" in text


def test_split_lists_that_the_run_made_are_used(make, trained, tmp_path):
    data = shutil.copytree(data_of(trained), tmp_path / "bare")
    shutil.rmtree(data / "ImageSets")
    run = copy_run(trained, tmp_path / "c")
    (run / "splits").mkdir()
    (run / "splits" / "train.txt").write_text("a1\na2\na3\nb3\nb2\n")
    (run / "splits" / "val.txt").write_text("a4\nb1\n")
    page = make(run, data_root=str(data))
    assert "Chosen from the 2 validation images" in page.texts["worst-images"]
    assert "5 of 5 training images" in page.texts["data"]


def test_run_trained_in_fp16_on_a_gpu_can_be_evaluated_on_the_cpu(make, trained, tmp_path):
    page = make(copy_run(trained, tmp_path / "c", amp="fp16"))
    assert "Worst images of c" in page.texts["worst-images"]


def test_damaged_image_costs_only_its_section(make, trained, tmp_path):
    data = shutil.copytree(data_of(trained), tmp_path / "damaged")
    (data / "JPEGImages" / "a2.jpg").write_bytes(b"")
    page = make(trained, data_root=str(data))
    assert "a2.jpg: cannot be read" in page.texts["data"]
    assert "Worst images of a" in page.texts["worst-images"]


def test_generated_data_that_are_gone_are_not_generated_again(make, tmp_path):
    root = tmp_path / "gone"
    page = make(write_run(tmp_path / "a", dataset="shapes", data_root=str(root)))
    assert "gone/shapes: there is no such folder" in page.texts["data"] and not root.exists()


# --- unusable input ---


def cut(name, length):
    def damage(run):
        path = run / name
        path.write_bytes(path.read_bytes()[:-length])

    return damage


def write(name, text):
    return lambda run: (run / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["runs/b: there is no such folder"]),
        (lambda run: (run / "history.csv").unlink(), ["b/history.csv", "no such file", "at least one validation"]),
        (write("history.csv", ",".join(HISTORY) + "\n"), ["b/history.csv", "no rows yet"]),
        (write("history.csv", "epoch,itr\n1,2\n"), ["b/history.csv", "lacks a column"]),
        (write("history.csv", ",".join(HISTORY) + "\n" + "1," * 10 + "x\n"), ["b/history.csv", "line 2"]),
        (cut("history.csv", 12), ["b/history.csv", "line 3", "incomplete"]),
        (cut("history.csv", 2), ["b/history.csv", "line 3", "incomplete"]),
        (cut("confusion_matrix.csv", 3), ["b/confusion_matrix.csv", "incomplete"]),
        (write("class_iou.csv", "class,iou\nsky,0.5\n"), ["b/confusion_matrix.csv", "classes"]),
        (write("options.json", '{"lr": 0.'), ["b/options.json", "cannot be read"]),
        (write("options.json", "[1]"), ["b/options.json", "cannot be read"]),
        (write("options.json", '{"lr": 0.1}'), ["b/options.json", "lacks", "data_root"]),
    ],
)
def test_unusable_run_is_refused_by_its_file_and_nothing_is_written(make, tmp_path, damage, words):
    runs = [write_run(tmp_path / "runs" / name, mious=[0.1, 0.2]) for name in "ab"]
    damage(runs[1])
    with pytest.raises(InputError) as error:
        make(*runs)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


def test_a_history_from_before_the_validation_loss_is_read(make, tmp_path):
    run = write_run(tmp_path / "a", mious=[0.1, 0.2])
    lines = (run / "history.csv").read_text().splitlines()
    (run / "history.csv").write_text("".join(f"{line.rpartition(',')[0]}\n" for line in lines))
    assert set(make(run).table("scores")) == {"a"}


def test_run_given_twice_is_refused_but_two_runs_of_the_same_name_are_distinguished(make, tmp_path):
    one, other = write_run(tmp_path / "x" / "a"), write_run(tmp_path / "y" / "a")
    with pytest.raises(InputError, match="x/a: is given twice"):
        make(one, other, one)
    assert set(make(one, other).table("scores")) == {str(one), str(other)}


@pytest.mark.parametrize(("out", "named"), [("", ""), ("file/report.html", "file")])
def test_out_that_cannot_be_written_is_refused(tmp_path, out, named):
    (tmp_path / "file").write_text("")
    run = write_run(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / named}: ")):
        report.write_report([run], tmp_path / out, device=CPU)
    assert sorted(tmp_path.rglob("*")) == before


def test_report_that_fails_halfway_keeps_the_old_one(make, tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    make(run)
    path = tmp_path / "out" / "report.html"
    old = path.read_bytes()
    monkeypatch.setattr(report, "checkpoints", lambda runs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(run)
    assert path.read_bytes() == old and [file.name for file in path.parent.iterdir()] == ["report.html"]
