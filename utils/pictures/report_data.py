"""What a report is made of: the files of runs, read and checked, and what their best models do on their data."""

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
from utils.pictures.html import Html, note
from utils.pictures.predict import load_model
from utils.run import HISTORY

NUM_SAMPLES, SEED = 20, 1  # the images of `visualize.py samples`
EVALUATED_ON_CPU = 200  # images a run, a few minutes; other devices take the whole split
ENVIRONMENT = ("versions", "device_name", "git_commit", "command")  # what options.json holds besides options
REQUIRED = {"dataset", "data_root", "year", "train_split", "val_split"}  # options that a report reads
REQUIRED |= {"random_seed", "batch_size", "total_itrs", "amp", *ENVIRONMENT}


@dataclass
class RunFiles:
    """What a run left, read and checked; `matrix` int64 `[C, C]`, rows = target, is of the last validation."""

    folder: Path
    name: str
    options: dict
    history: list[dict[str, float]]
    class_iou: dict[str, float]
    matrix: np.ndarray

    @property
    def best(self) -> dict[str, float]:
        """The first of the best rows, as `best.pth` is."""
        return max(self.history, key=lambda row: row["mean_iou"])

    @property
    def last(self) -> dict[str, float]:
        return self.history[-1]


def read_csv(path: Path, first_number: int = 1) -> tuple[list[str], list[list]]:
    """Header and rows; columns from `first_number` on are floats. Raises InputError if missing, empty or cut off."""
    try:
        text = path.read_text(encoding="utf-8")
        header, *rows = csv.reader(io.StringIO(text), strict=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; name a run that has been validated once") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); take the run off the list") from None
    if not rows:
        raise InputError(f"{path}: has no row yet; name a run that has been validated once")
    for line, row in enumerate(rows, 2):
        try:
            row[first_number:] = map(float, row[first_number:])
            whole = len(row) == len(header) and (line <= len(rows) or text.endswith("\n"))
        except ValueError:
            whole = False
        if not whole:
            raise InputError(f"{path}: line {line} is only half written; take it out, or let the run go on")
    return header, rows


def read_run(folder: Path, name: str) -> RunFiles:
    """Raises InputError, naming the file, for one that is missing or not whole."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give folders of runs, as main.py leaves them")
    try:
        options = dict(json.loads((folder / "options.json").read_text(encoding="utf-8")))
        if lacking := sorted(REQUIRED - options.keys()):
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / 'options.json'}: cannot be read ({error}); give folders of runs") from None
    header, rows = read_csv(folder / "history.csv", first_number=0)
    history = [dict(zip(header, row, strict=True)) for row in rows]
    if not set(HISTORY) <= set(header) or any(math.isnan(row["mean_iou"]) for row in history):
        raise InputError(f"{folder / 'history.csv'}: lacks a column or an mIoU; it is not as main.py wrote it")
    class_iou = dict(read_csv(folder / "class_iou.csv")[1])
    (_, *predicted), counts = read_csv(folder / "confusion_matrix.csv")
    if not list(class_iou) == predicted == [target for target, *_ in counts]:
        raise InputError(f"{folder / 'confusion_matrix.csv'}: its classes are not those of class_iou.csv beside it")
    return RunFiles(folder, name, options, history, class_iou, np.array([row for _, *row in counts], np.int64))


def read_runs(folders: list[Path]) -> list[RunFiles]:
    """The runs, each under its folder's name, or its whole path where another has that name."""
    names = [folder.resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: is given twice; name each run once")
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


@dataclass
class Evaluation:
    """What a run's best.pth does on images of its validation split."""

    mean_iou: float  # of all these images together
    ious: dict[int, float]  # index to its own mIoU, the worst first; images with a labelled pixel
    predictions: dict[int, torch.Tensor]  # index to uint8 [H, W], of the images that are shown


@dataclass
class Data:
    """A training and a validation split, and the runs that were made on them."""

    train: SegmentationDataset
    val: SegmentationDataset
    compared: list[int]  # indices of validation images
    runs: list[str] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # by run, of those that could be evaluated


def open_splits(run: RunFiles, data_root: str | None) -> list[SegmentationDataset]:
    """[train, val]. Raises InputError where the data are not there, or are not what the run was made on."""
    options = run.options
    root = Path(data_root or options["data_root"])
    if options["dataset"] == "shapes" and not (root / "shapes").is_dir():  # opening would draw them anew
        raise InputError(f"{root / 'shapes'}: there is no such folder")
    keywords = {"year": options["year"], "seed": options["random_seed"], "lists": run.folder / "splits"}
    names = options["train_split"], options["val_split"]
    splits = [build_dataset(options["dataset"], root, name, **keywords) for name in names]
    if splits[1].class_names != list(run.class_iou):
        raise InputError(f"{root}: its classes ({', '.join(splits[1].class_names)}) are not those of the run")
    return splits


def collect(
    runs: list[RunFiles], *, data_root: str | None, device: torch.device, num: int
) -> tuple[list[Data], list[Html], list[Html]]:
    """Opens the data, one `Data` for the runs that share them, and evaluates each run's best.pth; then a note for
    each run whose data cannot be opened, and for each that cannot be evaluated."""
    groups, without_data, without_model = {}, [], []
    for run in runs:
        try:
            train, val = open_splits(run, data_root)
            key = (val.folder.resolve(), *val.ids, None, *train.ids)
            if key not in groups:
                seen = choose_samples(class_statistics(val), max(num, NUM_SAMPLES), SEED, must_cover=False)
                groups[key] = Data(train, val, seen[:num])
        except InputError as error:
            without_data.append(note(f"Not available for {run.name}, for its data cannot be opened: {error}"))
            continue
        groups[key].runs.append(run.name)
        try:
            groups[key].evaluations[run.name] = evaluate_best(run, groups[key], device=device, num=num)
        except InputError as error:
            without_model.append(note(f"Not available for {run.name}: {str(error).removeprefix('--ckpt ')}"))
    return list(groups.values()), without_data, without_model


def evaluate_best(run: RunFiles, data: Data, *, device: torch.device, num: int) -> Evaluation:
    """Image by image, for the score of each. Raises InputError for what cannot be read."""
    trained = load_model(run.folder / "best.pth", device)
    if trained.class_names != data.val.class_names:
        raise InputError(f"{run.folder / 'best.pth'}: its classes are not those of class_iou.csv beside it")
    wanted = run.options["amp"]  # as in training, so that the scores repeat; fp16 is for GPUs
    amp = choose_amp("auto" if wanted == "fp16" and device.type == "cpu" else wanted, device)
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
        raise InputError(f"{data.val.folder}: not one pixel of the images that were evaluated is labelled")
    ranked = dict(sorted(ious.items(), key=lambda item: item[1]))
    return Evaluation(total.compute()["Mean IoU"], ranked, predictions)
