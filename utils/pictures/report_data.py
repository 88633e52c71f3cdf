"""Collects the data of a report: the files of each run, checked, and its best model's predictions."""

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets import build_dataset
from datasets.stats import choose_samples, class_statistics
from datasets.voc import SegmentationDataset
from utils.engine import choose_amp, predict
from utils.errors import InputError
from utils.metrics import ConfusionMatrix, image_iou
from utils.run import HISTORY, LATER
from utils.weights.load import load_model

NUM_SAMPLES, SEED = 20, 1  # the same images as `visualize.py samples`
EVALUATED_ON_CPU = 200  # images per run, a few minutes; other devices evaluate the whole split
ENVIRONMENT = ("versions", "device_name", "git_commit", "command")  # in options.json beside the options
MODEL_COST = {"parameters": 0, "gflops": 1}  # with the digits to show; there too, but not in older runs
CARD = ("val_split", "mean_iou", "bootstrap", "labelled_images", "mean_boundary_iou")  # in card.json
REQUIRED = {"dataset", "data_root", "year", "train_split", "val_split"}  # the options that a report reads
REQUIRED |= {"random_seed", "batch_size", "total_itrs", "amp", *ENVIRONMENT}


@dataclass
class RunFiles:
    """The files of a run, checked. `matrix`, int64 `[C, C]`, rows = target, is from the last validation."""

    folder: Path
    name: str
    options: dict
    history: list[dict[str, float]]
    class_iou: dict[str, float]
    matrix: np.ndarray
    tests: list[dict]  # the card of each test, with the name of its folder

    @property
    def test(self) -> dict | None:
        """The card to quote: the plain test of the validation split, or else the first; None without tests."""
        plain = f"test_{self.options['val_split']}"
        return min(self.tests, key=lambda card: card["folder"] != plain, default=None)

    @property
    def best(self) -> dict[str, float]:
        """The first row with the highest mIoU; `best.pth` was saved then."""
        return max(self.history, key=lambda row: row["mean_iou"])

    @property
    def last(self) -> dict[str, float]:
        return self.history[-1]


def read_csv(path: Path, first_number: int = 1) -> tuple[list[str], list[list]]:
    """Returns the header and the rows; columns from `first_number` on are floats.

    Raises InputError if the file is missing, empty or cut off.
    """
    try:
        text = path.read_text(encoding="utf-8")
        header, *rows = csv.reader(io.StringIO(text), strict=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; choose a run with at least one validation") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it or leave this run out") from None
    if not rows:
        raise InputError(f"{path}: has no rows yet; choose a run with at least one validation")
    for line, row in enumerate(rows, 2):
        try:
            row[first_number:] = map(float, row[first_number:])
            complete = len(row) == len(header) and (line <= len(rows) or text.endswith("\n"))
        except ValueError:
            complete = False
        if not complete:
            raise InputError(f"{path}: line {line} is incomplete; remove it, or let the run continue")
    return header, rows


def read_run(folder: Path, name: str) -> RunFiles:
    """Reads the files of a run. Raises InputError, naming the file, if one is missing or incomplete."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give run folders that main.py wrote")
    try:
        options = dict(json.loads((folder / "options.json").read_text(encoding="utf-8")))
        if missing := sorted(REQUIRED - options.keys()):
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / 'options.json'}: cannot be read ({error}); give run folders") from None
    header, rows = read_csv(folder / "history.csv", first_number=0)
    history = [dict(zip(header, row, strict=True)) for row in rows]
    if not set(HISTORY).difference(LATER) <= set(header) or any(math.isnan(row["mean_iou"]) for row in history):
        raise InputError(f"{folder / 'history.csv'}: lacks a column or an mIoU; restore the file that main.py wrote")
    class_iou = {name: iou for name, iou, *_ in read_csv(folder / "class_iou.csv")[1]}
    (_, *predicted), counts = read_csv(folder / "confusion_matrix.csv")
    if not list(class_iou) == predicted == [target for target, *_ in counts]:
        raise InputError(f"{folder / 'confusion_matrix.csv'}: its classes differ from class_iou.csv; restore both")
    matrix = np.array([row for _, *row in counts], np.int64)
    tests = [read_card(path) for path in sorted(folder.glob("test_*/card.json"))]
    return RunFiles(folder, name, options, history, class_iou, matrix, tests)


def read_card(path: Path) -> dict:
    """Reads the card of a test. Raises InputError if it cannot be read or lacks what the report shows."""
    try:
        card = dict(json.loads(path.read_text(encoding="utf-8")))
        low, high = card["bootstrap"]
        if any(not isinstance(value, float) for value in (low, high, card["mean_iou"])):
            raise ValueError
        return {name: card[name] for name in CARD} | {"folder": path.parent.name}
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path}: not the card that --test_only writes; test that model again") from None


def read_runs(folders: list[Path]) -> list[RunFiles]:
    """Reads the runs. Each is named after its folder, or by its whole path if two folders have the same name."""
    names = [folder.resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: is given twice; name each run once")
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


@dataclass
class Evaluation:
    """Scores and predictions of a run's best.pth on its validation split."""

    mean_iou: float  # of all evaluated images together
    ious: dict[int, float]  # image index to its own mIoU, worst first; only images with a labelled pixel
    predictions: dict[int, torch.Tensor]  # image index to uint8 [H, W]; only the images that are shown


@dataclass
class Data:
    """A training and a validation split, and the runs that used them."""

    train: SegmentationDataset
    val: SegmentationDataset
    compared: list[int]  # indices of validation images
    runs: list[str] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # by run; only those that could be evaluated


def open_splits(run: RunFiles, data_root: str | None) -> list[SegmentationDataset]:
    """Opens [train, val]. Raises InputError if the data are missing or have other classes than the run."""
    name, root = run.options["dataset"], Path(data_root or run.options["data_root"])
    if name == "shapes" and not (root / "shapes").is_dir():  # opening it would generate the data
        raise InputError(f"{root / 'shapes'}: there is no such folder; give --data_root")
    year, seed, lists = run.options["year"], run.options["random_seed"], run.folder / "splits"
    named = run.options["train_split"], run.options["val_split"]
    train, val = (build_dataset(name, root, split, year=year, named=named, seed=seed, lists=lists) for split in named)
    for dataset in (train, val):
        dataset.require_masks()
    if val.class_names != list(run.class_iou):
        given = ", ".join(val.class_names)
        raise InputError(f"{root}: its classes ({given}) are not those of the run; give another --data_root")
    return [train, val]


def collect(
    runs: list[RunFiles], *, data_root: str | None, device: torch.device, num: int
) -> tuple[list[Data], list[str], list[str]]:
    """Opens the data, one `Data` for all runs that share them, and evaluates each run's best.pth.

    Also returns a note for each run whose data cannot be opened, and one for each that cannot be evaluated.
    """
    groups, without_data, without_model = {}, [], []
    for run in runs:
        try:
            train, val = open_splits(run, data_root)
            key = (val.folder.resolve(), *val.ids, None, *train.ids)
            if key not in groups:
                seen = choose_samples(class_statistics(val), max(num, NUM_SAMPLES), SEED, must_cover=False)
                groups[key] = Data(train, val, seen[:num])
        except InputError as error:
            without_data.append(f"Not available for {run.name} because its data cannot be opened: {error}")
            continue
        groups[key].runs.append(run.name)
        try:
            groups[key].evaluations[run.name] = evaluate_best(run, groups[key], device=device, num=num)
        except InputError as error:
            without_model.append(f"Not available for {run.name}: {str(error).removeprefix('--ckpt ')}")
    return list(groups.values()), without_data, without_model


def evaluate_best(run: RunFiles, data: Data, *, device: torch.device, num: int) -> Evaluation:
    """Evaluates best.pth image by image, for a score of each. Raises InputError if a file cannot be read."""
    trained = load_model(run.folder / "best.pth", device)
    if trained.class_names != data.val.class_names:
        raise InputError(f"{run.folder / 'best.pth'}: its classes differ from class_iou.csv; restore both")
    # The run's own precision, so that the scores repeat; but a CPU has no fp16.
    is_fp16_on_cpu = run.options["amp"] == "fp16" and device.type == "cpu"
    amp = choose_amp("auto" if is_fp16_on_cpu else run.options["amp"], device)
    total = ConfusionMatrix(data.val.num_classes, device)
    count = min(len(data.val), EVALUATED_ON_CPU) if device.type == "cpu" else len(data.val)
    spread = np.linspace(0, len(data.val) - 1, count).round().astype(int).tolist()
    ious, predictions, worst = {}, {}, []
    for index in tqdm(sorted({*spread, *data.compared}), desc=run.name, unit="image", leave=False, disable=None):
        image, mask = data.val[index]
        prediction, mask = predict(trained.model, image[None].to(device), amp)[0], mask.to(device)
        total.update(mask, prediction)
        iou, prediction = image_iou(mask, prediction, data.val.num_classes), prediction.cpu()
        if index in data.compared:
            predictions[index] = prediction
        if not math.isnan(iou):
            ious[index] = iou
            worst = sorted([*worst, (iou, index, prediction)], key=lambda entry: entry[:2])[:num]
    predictions |= {index: prediction for _, index, prediction in worst}
    if not ious:
        raise InputError(f"{data.val.folder}: none of the evaluated images has a labelled pixel; check the masks")
    ranked = dict(sorted(ious.items(), key=lambda item: item[1]))
    return Evaluation(total.compute()["Mean IoU"], ranked, predictions)
