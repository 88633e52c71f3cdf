"""Writes one HTML report on one or several runs: scores, predictions, curves, classes, confusions, data and options.

    python visualize.py report runs/A runs/B --out report.html

Images are embedded, nothing is fetched and no script runs, so the page opens anywhere and prints. Its text, tables
and layout are in `report.html` beside this file; the functions here prepare the data of one section each.
"""

import base64
import io
import json
import math
import tempfile
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image

from datasets.files import VOID
from datasets.stats import choose_samples, class_statistics, statistics_table
from datasets.voc import SegmentationDataset
from utils.against import read_counts
from utils.bootstrap import cautions, interval, mean_iou, paired_differences, points
from utils.errors import InputError
from utils.files import make_folder, write_text
from utils.metrics import SCORE_COLUMNS, classes_in_mean, scores
from utils.pictures.plotting import draw_curves, error_map, hwc
from utils.pictures.report_data import (
    ENVIRONMENT,
    MODEL_COST,
    NUM_SAMPLES,
    SEED,
    Data,
    RunFiles,
    collect,
    read_runs,
)
from utils.weights.load import describe, load_checkpoint

SIDE = 500  # pixels: images are shrunk to this, which is sharp at the size of the page
MATRIX_CLASSES = 30  # a larger confusion matrix is cut to the classes with the most errors
IN_WORDS, IN_TABLE = 5, 10  # confusions per run
OWN_TO_EACH = {"run_name", "run_dir", "command", "continue_training", "ckpt"}  # always differ and mean nothing


def write_report(
    runs: list[Path], out: Path, *, data_root: str | None = None, device: torch.device, num: int = 5
) -> None:
    """Writes the report on these run folders to `out`, completely or not at all.

    The data are looked up where each run's options say, or in `data_root`. Without the data or best.pth, the
    sections that need them say so. `num` images are compared, and the `num` worst of each run are shown; on a CPU
    at most `report_data.EVALUATED_ON_CPU` images are evaluated.
    Raises InputError for a run whose files are missing or incomplete, and if `out` cannot be written.
    """
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name the file to write")
    found = read_runs(runs)
    compared = comparisons(found)
    groups, without_data, without_model = collect(found, data_root=data_root, device=device, num=num)
    can_rank = len({tuple(run.class_iou) for run in found}) == 1
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "zip": zip}
    page = environment.get_template("report.html").render(
        runs=found,
        names=[run.name for run in found],
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        best=[max(found, key=lambda run: run.best["mean_iou"])] if can_rank else found,
        highest=max(run.best["mean_iou"] for run in found) if can_rank and len(found) > 1 else None,
        can_rank=can_rank,
        have_same_data=len({validation_data(run) for run in found}) == 1,
        predictions=[predictions(data, num) for data in groups if data.evaluations],
        missing=[*without_data, *without_model],
        curves=curves(found),
        score_columns=SCORE_COLUMNS,
        tests=[(f"{run.name}/{test['folder']}", test) for run in found for test in run.tests],
        validations=[
            (f"{run.name}, {text}", row) for run in found for text, row in (("best", run.best), ("last", run.last))
        ],
        comparisons=compared,
        last_epochs=[f"{run.name} (epoch {run.last['epoch']:.0f})" for run in found],
        classes=classes(found),
        confusions=[confusions(run) for run in found],
        data=training_data(groups, without_data),
        options=options_of(found),
        environment=environment_of(found),
        differing=differing,
        checkpoints=checkpoints(found),
    )
    make_folder(out.parent)
    write_text(out, page)


def number(value: float | None, form: str = ".4f") -> str:
    """Formats a number; None or NaN, such as the IoU of an absent class or memory not measured, is a dash."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def validation_data(run: RunFiles) -> tuple:
    """Identifies a run's validation images; for a folder without split lists, by the list that the run made."""
    made = run.folder / "splits" / f"{run.options['val_split']}.txt"
    names = tuple(run.options[name] for name in ("dataset", "data_root", "val_split"))
    return (*names, made.read_text(encoding="utf-8") if made.is_file() else "")


def embed(data: bytes, kind: str) -> dict:
    """Returns an image file as a data URI with its size."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"source": source, "width": width, "height": height}


def thumbnail(pixels: np.ndarray, caption: str, *, photo: bool = False) -> dict:
    """Embeds RGB uint8 `[H, W, 3]`, shrunk to `SIDE`: a photo as JPEG, flat colours as PNG to keep them exact."""
    image, file, kind = Image.fromarray(pixels), io.BytesIO(), "jpeg" if photo else "png"
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC if photo else Image.Resampling.NEAREST)
    image.save(file, kind, optimize=True)
    return {"caption": caption, **embed(file.getvalue(), kind)}


def curves(runs: list[RunFiles]) -> dict:
    """Draws and embeds the curves of all runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curves.png"
        draw_curves({run.name: run.history for run in runs}, path, stacked=True)
        return embed(path.read_bytes(), "png")


def sheet(
    dataset: SegmentationDataset, shown: list[tuple[int, dict[str, torch.Tensor]]], *, errors: bool = False
) -> dict:
    """Returns images, each with its annotation and more class ids `[H, W]` by caption, and a legend of their classes.

    With `errors`, the wrong pixels of the one prediction follow. An image that is missing leaves a gap.
    """
    shots, seen = [], set()
    for index, more in shown:
        masks = {"annotation": dataset.mask(index), **more}
        seen.update(*(mask.unique().tolist() for mask in masks.values()))
        name, cells = dataset.ids[index], []
        if dataset.images[index].is_file():
            cells.append(thumbnail(hwc(dataset.image(index)), name, photo=True))
        else:
            cells.append({"caption": f"{name}: image missing", "source": None})
        cells += [thumbnail(dataset.decode_target(mask), caption) for caption, mask in masks.items()]
        if errors:
            wrong = error_map(dataset.image(index), *masks.values())
            cells.append(thumbnail(wrong, "errors in red", photo=True))
        shots.append({"name": name, "cells": cells})
    names = [*dataset.class_names, *["void"] * (VOID + 1 - dataset.num_classes)]
    legend = [(names[value], "rgb({}, {}, {})".format(*dataset.palette[value])) for value in sorted(seen)]
    ratio = np.mean([shot["cells"][1]["width"] / shot["cells"][1]["height"] for shot in shots])
    return {"shots": shots, "legend": legend, "ratio": ratio}


def predictions(data: Data, num: int) -> dict:
    """Shows validation images with the predictions of all runs that share them, and the worst images of each run."""
    compared, worst = [], {}
    for index in data.compared:
        own = {f"{name}: mIoU {number(each.ious.get(index))}": each for name, each in data.evaluations.items()}
        compared.append((index, {caption: each.predictions[index] for caption, each in own.items()}))
    for name, each in data.evaluations.items():
        lowest = list(each.ious.items())[:num]
        shown = [(index, {f"prediction: mIoU {iou:.4f}": each.predictions[index]}) for index, iou in lowest]
        worst[name] = (each, sheet(data.val, shown, errors=True))
    return {"compared": sheet(data.val, compared), "worst": worst, "total": len(data.val)}


def comparisons(runs: list[RunFiles]) -> list[dict]:
    """Compares what `main.py --test_only` has left: of the tests of the same data, the best with each other one.

    Raises InputError if the counts of a test cannot be read.
    """
    groups: dict[tuple, dict] = {}
    for run in runs:
        for path in sorted(run.folder.glob("test_*/counts.npz")):
            test = read_counts(path)
            data = (*test.class_names, None, *test.ids, test.counts[:, 1].tobytes())
            groups.setdefault(data, {})[f"{run.name}/{path.parent.name}"] = test
    found = []
    for tests in groups.values():
        ranked = sorted(tests, key=lambda name: -mean_iou(tests[name].counts.sum(axis=0, dtype=float)))
        best = tests[ranked[0]]
        for name in ranked[1:]:
            differences = paired_differences(best.counts, tests[name].counts, best.class_names)
            rows = [(each, points(each.value, "+"), interval(each)) for each in differences]
            found.append({"best": ranked[0], "other": name, "rows": rows, "notes": cautions(differences)})
    return found


def classes(runs: list[RunFiles]) -> dict:
    """Returns the IoU of each class in each run, the highest mean first, and its precision, recall and F1.

    NaN: the class is absent. None: the run does not have it.
    """
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.class_iou):
        ious = [run.class_iou.get(name) for run in runs]
        present = [iou for iou in ious if iou is not None and not math.isnan(iou)]
        top = max(present) if len(present) > 1 else 0
        rows.append({"name": name, "ious": ious, "top": top or None, "mean": np.mean(present) if present else -1})
    rows.sort(key=lambda row: -row["mean"])
    kinds, precisions, means = [], {row["name"]: [] for row in rows}, []
    for run in runs:
        result = scores(torch.from_numpy(run.matrix))
        for kind in ("Precision", "Recall", "F1"):
            kinds.append(f"{run.name}, {kind.lower()}")
            means.append(result[f"Mean {kind}"])
            of_class = dict(zip(run.class_iou, result[f"Class {kind}"], strict=True))
            for name, values in precisions.items():
                values.append(of_class.get(name))
    all_ious = [list(run.class_iou.values()) for run in runs]
    rows.append({"name": "mean (mIoU)", "ious": [float(np.nanmean(ious)) for ious in all_ious], "top": None})
    if any(classes_in_mean(ious) < len(ious) for ious in all_ious):
        counts = [f"{classes_in_mean(ious)} of {len(ious)}" for ious in all_ious]
        rows.append({"name": "classes in the mean", "ious": counts, "top": None})
    return {"rows": rows, "kinds": kinds, "precisions": [*precisions.items(), ("mean", means)]}


def confusions(run: RunFiles) -> dict:
    """Returns the confusion matrix as shares of its rows, and two lists of its confusions.

    "words" has those with the largest share of their class, "pairs" those with the most pixels.
    """
    names, totals = list(run.class_iou), run.matrix.sum(axis=1, keepdims=True)
    shares = run.matrix / np.maximum(totals, 1)  # [C, C]
    wrong = run.matrix.sum(axis=0) + totals[:, 0] - 2 * run.matrix.diagonal()  # [C]
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES])
    errors = run.matrix - np.diag(run.matrix.diagonal())  # [C, C]
    pairs = [
        {
            "annotated": names[i],
            "predicted": names[j],
            "pixels": errors[i, j],
            "share": shares[i, j],
            "of_all": errors[i, j] / errors.sum(),
        }
        for i, j in np.argwhere(errors).tolist()
    ]
    # A class that is not annotated has no share of its pixels.
    shares[(totals == 0) & np.eye(len(names), dtype=bool)] = math.nan
    return {
        "run": run,
        "shown": [names[i] for i in shown],
        "matrix": [(names[i], shares[i, shown].tolist()) for i in shown],
        "words": sorted(pairs, key=lambda pair: -pair["share"])[:IN_WORDS],
        "pairs": sorted(pairs, key=lambda pair: -pair["pixels"])[:IN_TABLE],
    }


def training_data(groups: list[Data], notes: list[str]) -> dict[str, list]:
    """Returns class balance and samples of each training split; one that cannot be read costs only its own part."""
    parts, notes = [], list(notes)
    for data in groups:
        try:
            statistics = class_statistics(data.train)
            indices = choose_samples(statistics, NUM_SAMPLES, SEED, must_cover=False)
            samples = sheet(data.train, [(index, {}) for index in indices])
        except InputError as error:
            notes.append(f"Not available for {', '.join(data.runs)}: {error}")
            continue
        header, rows = statistics_table(statistics)
        rows.sort(key=lambda row: -row[1])
        parts.append({"data": data, "statistics": statistics, "samples": samples, "header": header, "rows": rows})
    return {"groups": parts, "notes": notes}


def side_by_side(dictionaries: list[dict]) -> dict[str, list[str]]:
    """Maps each name to its value in every dictionary, as text; a dash where it has none."""
    names = dict.fromkeys(name for dictionary in dictionaries for name in dictionary)
    values = {name: [dictionary.get(name, "-") for dictionary in dictionaries] for name in names}
    return {name: [v if isinstance(v, str) else json.dumps(v) for v in row] for name, row in values.items()}


def differing(values: dict[str, list[str]]) -> dict[str, list[str]]:
    """Returns the entries whose values differ between runs, except those that always do."""
    return {name: row for name, row in values.items() if len(set(row)) > 1 and name not in OWN_TO_EACH}


def options_of(runs: list[RunFiles]) -> dict[str, list[str]]:
    other = {*ENVIRONMENT, *MODEL_COST, "job"}
    return side_by_side([{name: value for name, value in run.options.items() if name not in other} for run in runs])


def environment_of(runs: list[RunFiles]) -> dict[str, list[str]]:
    known = []
    for run in runs:
        cost = {
            name: f"{run.options[name]:,.{digits}f}" for name, digits in MODEL_COST.items() if name in run.options
        }
        known.append(run.options["versions"] | {name: run.options[name] for name in ENVIRONMENT[1:]} | cost)
    return side_by_side(known)


def checkpoints(runs: list[RunFiles]) -> dict:
    """Returns what each run's best.pth records about itself, with a column per run."""
    known, notes = {}, []
    for run in runs:
        try:
            known[run.name] = describe(load_checkpoint(run.folder / "best.pth"))
        except InputError as error:
            notes.append(f"Not available for {run.name}: {str(error).removeprefix('--ckpt ')}")
    return {"names": list(known), "rows": side_by_side(list(known.values())), "notes": notes}
