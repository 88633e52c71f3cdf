"""Writes one HTML report on one or several runs: options, scores, curves, confusions, predictions and data.

    python visualize.py report runs/A runs/B --out report.html

Drawings are embedded, nothing is fetched and no script runs, so the page opens anywhere and prints. Its text and
layout are in `report.html` beside this file; the functions here prepare one section's data each.
"""

import base64
import io
import json
import math
import tempfile
from collections.abc import Callable
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
from utils.bootstrap import Difference, cautions, interval, mean_iou, paired_differences, points
from utils.errors import InputError
from utils.files import make_folder, write_text
from utils.metrics import SCORE_COLUMNS, classes_in_mean, scores
from utils.pictures.plotting import draw_curves, draw_grid, draw_samples, draw_statistics, error_map, hwc
from utils.pictures.report_data import (
    ENVIRONMENT,
    MODEL_COST,
    NUM_SAMPLES,
    SEED,
    Data,
    Evaluation,
    RunFiles,
    collect,
    read_runs,
)
from utils.weights.load import describe, load_checkpoint

DRAWING_WIDTH = 1800  # pixels: sharp at the page's full width, also on dense screens
MATRIX_CLASSES = 30  # a larger confusion matrix is cut to the classes with the most errors
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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        runs=found,
        names=[run.name for run in found],
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        lead=lead(found),
        summary=summary_rows(found),
        options=options_tables(found),
        checkpoints=checkpoints_table(found),
        curves=curves(found),
        classes=classes_table(found),
        precisions=precisions_table(found),
        comparisons=compared,
        confusions=[confusions(run) for run in found],
        predictions=[predictions(data, num) for data in groups if data.evaluations],
        missing=[*without_data, *without_model],
        data=training_data(groups, without_data),
        speed=speed_rows(found),
    )
    make_folder(out.parent)
    write_text(out, page)


def number(value: float, form: str = ".4f") -> str:
    """Formats a number; NaN, such as the IoU of an absent class or memory that was not measured, is a dash."""
    return "-" if math.isnan(value) else format(value, form)


def cell(text: str, css: str = "", share: float | None = None) -> dict:
    """Returns a table cell; `share` in 0..1 is the length of its bar or the strength of its colour."""
    return {"text": text, "css": css, "share": share}


def figure(draw: Callable[..., None], *arguments: object, **keywords: object) -> dict:
    """Returns the drawing that `draw(*arguments, path=path, **keywords)` writes, as a data URI with its size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(*arguments, path=path, **keywords)
        with Image.open(path) as file:
            drawing = file.convert("RGB")
    if drawing.width > DRAWING_WIDTH:
        drawing = drawing.resize((DRAWING_WIDTH, round(drawing.height * DRAWING_WIDTH / drawing.width)))
    png, jpeg = io.BytesIO(), io.BytesIO()
    drawing.save(png, "PNG", optimize=True)
    drawing.save(jpeg, "JPEG", quality=85, subsampling=0)
    # A grid of photographs is far smaller as JPEG; charts stay PNG, with exact colours.
    kind, data = ("jpeg", jpeg) if jpeg.tell() < 0.6 * png.tell() else ("png", png)
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"source": source, "width": drawing.width, "height": drawing.height}


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


def have_same_classes(runs: list[RunFiles]) -> bool:
    return len({tuple(run.class_iou) for run in runs}) == 1


def lead(runs: list[RunFiles]) -> dict:
    """Returns the best run, or all of them if they cannot be ranked, and whether their numbers can be compared."""
    same_classes = have_same_classes(runs)
    return {
        "best": [max(runs, key=lambda run: run.best["mean_iou"])] if same_classes else runs,
        "options": differing(options_of(runs)),
        "same_classes": same_classes,
        "same_data": len({validation_data(run) for run in runs}) == 1,
    }


def validation_data(run: RunFiles) -> tuple:
    """Identifies a run's validation images; for a folder without split lists, by the list that the run made."""
    made = run.folder / "splits" / f"{run.options['val_split']}.txt"
    names = tuple(run.options[name] for name in ("dataset", "data_root", "val_split"))
    return (*names, made.read_text(encoding="utf-8") if made.is_file() else "")


def summary_rows(runs: list[RunFiles]) -> list[list]:
    """Returns one row per run; the highest mIoU is marked if the runs can be ranked."""
    highest = max(run.best["mean_iou"] for run in runs)
    rows = []
    for run in runs:
        is_top = run.best["mean_iou"] == highest and len(runs) > 1 and have_same_classes(runs)
        miou = cell(number(run.best["mean_iou"]) + " ★" * is_top, "best" * is_top)
        accuracies = [number(run.best[column]) for column in ("overall_acc", "mean_acc", "freqw_acc")]
        rows.append([run.name, miou, f"{run.best['epoch']:.0f}", number(run.last["mean_iou"]), *accuracies])
    return rows


def options_tables(runs: list[RunFiles]) -> dict[str, list[list]]:
    """Returns options and environment with a column per run; values that differ are marked."""
    options = options_of(runs)
    environment = [
        run.options["versions"]
        | {name: run.options[name] for name in ENVIRONMENT[1:]}
        | {name: f"{run.options[name]:,.{digits}f}" for name, digits in MODEL_COST.items() if name in run.options}
        for run in runs
    ]
    return {
        "different": marked_rows(differing(options)),
        "all": marked_rows(options),
        "environment": marked_rows(side_by_side(environment)),
    }


def marked_rows(values: dict[str, list[str]]) -> list[list]:
    marked = differing(values)
    return [[name, *(cell(text, "differs" * (name in marked)) for text in row)] for name, row in values.items()]


def checkpoints_table(runs: list[RunFiles]) -> dict[str, list]:
    """Returns what each run's best.pth records about itself, with a column per run."""
    known, notes = {}, []
    for run in runs:
        try:
            known[run.name] = describe(load_checkpoint(run.folder / "best.pth"))
        except InputError as error:
            notes.append(f"Not available for {run.name}: {str(error).removeprefix('--ckpt ')}")
    rows = [[name, *row] for name, row in side_by_side(list(known.values())).items()]
    return {"names": list(known), "rows": rows, "notes": notes}


def curves(runs: list[RunFiles]) -> dict:
    """Draws the curves; returns them with the scores of each run's best and last validation."""
    rows = []
    for run in runs:
        for which, row in (("best", run.best), ("last", run.last)):
            scores = [number(row[column]) for column in (*SCORE_COLUMNS, "loss")]
            rows.append([f"{run.name}, {which}", f"{row['epoch']:.0f}", f"{row['itr']:,.0f}", *scores])
    return {
        "drawing": figure(draw_curves, {run.name: run.history for run in runs}),
        "header": ["run", "epoch", "iteration", *SCORE_COLUMNS.values(), "training loss"],
        "rows": rows,
    }


def classes_table(runs: list[RunFiles]) -> dict[str, list]:
    """Returns the IoU of each class with a column per run; the highest in a row is marked."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.class_iou):
        row, present = [name], [run.class_iou[name] for run in runs if run.class_iou.get(name, math.nan) >= 0]
        for run in runs:
            iou = run.class_iou.get(name, math.nan)
            is_top = len(present) > 1 and iou == max(present) > 0
            if math.isnan(iou):
                row.append(cell("-" if name in run.class_iou else "not a class", "soft"))
            else:
                row.append(cell(number(iou) + " ★" * is_top, "bar best" if is_top else "bar", iou))
        rows.append(row)
    means = [float(np.nanmean(list(run.class_iou.values()))) for run in runs]
    rows.append(["mean (mIoU)", *(cell(number(mean), "bar", mean) for mean in means)])
    counts = [(classes_in_mean(list(run.class_iou.values())), len(run.class_iou)) for run in runs]
    if any(in_mean < total for in_mean, total in counts):
        rows.append(["classes in the mean", *(f"{in_mean} of {total}" for in_mean, total in counts)])
    return {"header": ["class", *(f"{run.name} (epoch {run.last['epoch']:.0f})" for run in runs)], "rows": rows}


def precisions_table(runs: list[RunFiles]) -> dict[str, list]:
    """Returns precision, recall and F1 of each class from the confusion matrix, with three columns per run."""
    kinds, header, columns = ("Precision", "Recall", "F1"), ["class"], []
    for run in runs:
        result = scores(torch.from_numpy(run.matrix))
        for kind in kinds:
            header.append(f"{run.name}, {kind.lower()}")
            values = dict(zip(run.class_iou, result[f"Class {kind}"], strict=True))
            columns.append((values, result[f"Mean {kind}"]))
    names = dict.fromkeys(name for run in runs for name in run.class_iou)
    rows = [[name, *(number(values.get(name, math.nan)) for values, _ in columns)] for name in names]
    return {"header": header, "rows": [*rows, ["mean", *(number(mean) for _, mean in columns)]]}


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
            rows = [difference_row(difference) for difference in differences]
            found.append({"best": ranked[0], "other": name, "rows": rows, "notes": cautions(differences)})
    return found


def difference_row(difference: Difference) -> list[str]:
    """Returns the cells of a comparison's row; dashes for a class in no annotation."""
    if math.isnan(difference.value):
        return [difference.name, "-", "-", "-", "0", "-"]
    cells = [points(difference.value, "+"), interval(difference), f"{difference.better:.1%}"]
    return [difference.name, *cells, f"{difference.images:,}", f"{difference.without:,}"]


def confusions(run: RunFiles) -> dict:
    """Returns the confusion matrix as shares of its rows, and the ten most frequent confusions."""
    names, totals = list(run.class_iou), run.matrix.sum(axis=1, keepdims=True)
    shares = run.matrix / np.maximum(totals, 1)  # [C, C]
    wrong = run.matrix.sum(axis=0) + totals[:, 0] - 2 * run.matrix.diagonal()  # [C]
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES])
    matrix = [[names[i]] for i in shown]
    for row, i in zip(matrix, shown, strict=True):
        for j in shown:
            none = "-" if i == j and not totals[i] else ""
            text = f"{100 * shares[i, j]:.0f}" if shares[i, j] >= 0.005 else none
            css = f"{'right' if i == j else ''} {'strong' if shares[i, j] > 0.5 else ''}".strip()
            row.append(cell(text, css, shares[i, j]))
    errors, pairs = run.matrix - np.diag(run.matrix.diagonal()), []
    for place in np.argsort(-errors, axis=None, kind="stable")[:10]:
        i, j = np.unravel_index(place, errors.shape)
        if errors[i, j]:
            of_all = errors[i, j] / errors.sum()
            bar = cell(f"{of_all:.1%}", "bar", of_all)
            pairs.append([names[i], names[j], f"{errors[i, j]:,}", f"{shares[i, j]:.1%}", bar])
    return {"run": run, "shown": [names[i] for i in shown], "matrix": matrix, "pairs": pairs}


def predictions(data: Data, num: int) -> dict:
    """Draws validation images with the predictions of all runs that share them, and the worst images of each run."""
    return {
        "evaluations": data.evaluations,
        "compared": len(data.compared),
        "total": len(data.val),
        "drawing": figure(draw_comparison, data),
        "worst": {name: figure(draw_worst, data.val, own, num=num) for name, own in data.evaluations.items()},
    }


def draw_comparison(data: Data, path: Path) -> None:
    """Draws a row per image: the image, its ground truth, and a column per run."""
    rows, seen = [], set()
    for index in data.compared:
        image, mask = data.val[index]
        row = [(hwc(image), ""), (data.val.decode_target(mask), "")]
        for evaluation in data.evaluations.values():
            prediction, iou = evaluation.predictions[index], evaluation.ious.get(index, math.nan)
            row.append((data.val.decode_target(prediction), f"mIoU {number(iou)}"))
            seen |= set(prediction.unique().tolist())
        seen |= set(mask.unique().tolist())
        rows.append(row)
    headings, labels = ["image", "ground truth", *data.evaluations], [data.val.ids[i] for i in data.compared]
    draw_grid(rows, headings=headings, labels=labels, path=path, legend=(data.val, sorted(seen - {VOID})))


def draw_worst(dataset: SegmentationDataset, evaluation: Evaluation, *, num: int, path: Path) -> None:
    """Draws a column per image: the image, its ground truth, the prediction and its errors."""
    columns, headings, seen = [], [], set()
    for index, iou in list(evaluation.ious.items())[:num]:
        (image, mask), prediction = dataset[index], evaluation.predictions[index]
        colours = [dataset.decode_target(ids) for ids in (mask, prediction)]
        columns.append([(pixels, "") for pixels in (hwc(image), *colours, error_map(image, mask, prediction))])
        headings.append(f"{dataset.ids[index]}: mIoU {iou:.4f}")
        seen |= set(mask.unique().tolist()) | set(prediction.unique().tolist())
    labels, legend = ["image", "ground truth", "prediction", "errors"], (dataset, sorted(seen - {VOID}))
    draw_grid(list(zip(*columns, strict=True)), headings=headings, labels=labels, path=path, legend=legend)


def training_data(groups: list[Data], notes: list[str]) -> dict[str, list]:
    """Draws class balance and samples of each training split; one that cannot be read costs only its own part."""
    parts, notes = [], list(notes)
    for data in groups:
        try:
            statistics = class_statistics(data.train)
            indices = choose_samples(statistics, NUM_SAMPLES, SEED, must_cover=False)
            samples = figure(draw_samples, data.train, indices)
            drawing = figure(draw_statistics, statistics, data.train.palette)
        except InputError as error:
            notes.append(f"Not available for {', '.join(data.runs)}: {error}")
            continue
        header, rows = statistics_table(statistics)
        lines = [
            [name, f"{pixels:,}", cell(f"{share:.2%}", "bar", share), f"{images:,}", f"{image_share:.1%}"]
            + [number(weight if pixels else math.nan) for weight in weights]
            for name, pixels, share, images, image_share, *weights in rows
        ]
        part = {"runs": data.runs, "shown": len(indices), "total": len(data.train), "header": header, "rows": lines}
        parts.append(part | {"samples": samples, "drawing": drawing})
    return {"groups": parts, "notes": notes}


def speed_rows(runs: list[RunFiles]) -> list[list[str]]:
    """Returns times and peak memory, one row per run."""
    rows = []
    for run in runs:
        train, val = (sum(row[name] for row in run.history) for name in ("train_seconds", "val_seconds"))
        per_itr, memory = train / run.last["itr"], max(row["peak_memory_mb"] for row in run.history)
        speed = run.options["batch_size"] / per_itr if per_itr else math.nan
        cells = [number(per_itr, ".3f"), number(speed, ".1f"), number(val / len(run.history), ".1f")]
        cells += [number((train + val) / 60, ".1f"), number(memory, ",.0f")]
        rows.append([run.name, run.options["device_name"], *cells])
    return rows
