"""One HTML file on one run or several: what was tried, what came out of it and what that looks like.

    python visualize.py report runs/A runs/B --out report.html

Pictures are inside the file, nothing is fetched and nothing is executed: it opens anywhere and prints.
"""

import json
import math
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from datasets.files import VOID
from datasets.stats import choose_samples, class_statistics, statistics_table
from datasets.voc import SegmentationDataset
from utils.checkpoint import knowledge, load_checkpoint
from utils.errors import InputError
from utils.pictures.html import PAGE, Html, escape, figure, join, markup, note, number, table, td
from utils.pictures.plotting import draw_curves, draw_grid, draw_samples, draw_statistics, error_map, hwc
from utils.pictures.report_data import (
    ENVIRONMENT,
    NUM_SAMPLES,
    SEED,
    Data,
    Evaluation,
    RunFiles,
    collect,
    read_runs,
)
from utils.run import SCORE_COLUMNS, write_text

TABLE_CLASSES = 30  # of a confusion matrix with more, those with the most errors
OWN_TO_EACH = {"run_name", "run_dir", "command", "continue_training", "ckpt"}  # differ in every run and mean nothing

# What one sees in each section, and how to read it.
INTRODUCTIONS = {
    "Summary": "A row is a run. mIoU is the mean over the classes of intersection over union: of the pixels that are "
    "of a class or were predicted as it, the share that are both; 1 is perfect. Best is the validation with the "
    "highest mIoU, when best.pth was saved. Overall Acc is the share of pixels that are right, Mean Acc the mean of "
    "that share over the classes, FreqW Acc the IoU weighted by how frequent a class is. Void is not counted.",
    "Options and environment": "What each run was asked to do; what differs between runs is marked. With these "
    "versions, on this device and at this commit, the commands repeat the runs; of a run that was continued the last "
    "start is shown (its log.txt has each).",
    "Checkpoints": "What the best.pth of each run says of itself: enough to use it without this report or its data.",
    "Training curves": "Left: mIoU at each validation, its best marked by a star. Middle: the training loss, a mean "
    "since the validation before. Right: the learning rate of the head. Where the loss goes on falling and mIoU "
    "falls too, the model overfits; where mIoU still rises at the end, more iterations may help.",
    "IoU of each class": "At the last validation of each run, which need not be its best. A full bar is 1; ★ marks "
    "the best run for a class. “-” is a class that is neither annotated nor predicted: it has no IoU and is left out "
    "of the mean.",
    "Confusion matrices": "Where the pixels of each class went at the last validation. A row is a class of the "
    "annotations and sums to 100%, a column is what was predicted, and the framed diagonal is what is right. A "
    "strong colour off the diagonal is a class that the model takes for another.",
    "Predictions": "What the best.pth of each run makes of images of the validation split. Those side by side were "
    "chosen to show many classes, whatever their scores. The worst are those with the lowest mIoU of their own: what "
    "goes wrong is often seen there first, in the model or in the annotation.",
    "Training data": "What the models learnt from. Classes that are rare in pixels or in images are learnt late and "
    "tend to score low; the imbalance is the pixels of the most frequent class to one of the rarest.",
    "Speed and memory": "Means over the whole run. An iteration includes the loading of its images. Memory is the "
    "peak: of tensors on a GPU, of the process on the CPU. Other work on the machine makes times longer.",
}


def side_by_side(dictionaries: list[dict]) -> dict[str, list[str]]:
    """Each name with its value in each dictionary, as text; a dash where it has none."""
    names = dict.fromkeys(name for dictionary in dictionaries for name in dictionary)
    values = {name: [dictionary.get(name, "-") for dictionary in dictionaries] for name in names}
    return {name: [v if isinstance(v, str) else json.dumps(v) for v in row] for name, row in values.items()}


def differing(values: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: row for name, row in values.items() if len(set(row)) > 1 and name not in OWN_TO_EACH}


def options_of(runs: list[RunFiles]) -> dict[str, list[str]]:
    return side_by_side([{n: v for n, v in run.options.items() if n not in (*ENVIRONMENT, "job")} for run in runs])


def lead(runs: list[RunFiles]) -> Html:
    """The result in a sentence or two, and what a reader must know before numbers are set side by side."""
    same_classes = len({tuple(run.class_iou) for run in runs}) == 1
    top = max(runs, key=lambda run: run.best["mean_iou"])
    of = f" is the best of {len(runs)} runs: it" if len(runs) > 1 and same_classes else ""
    sentences = [
        markup(
            "<strong>{}</strong>{} reaches a mean IoU of <strong>{}</strong> on the validation images, at epoch {}.",
            *(run.name, of, number(run.best["mean_iou"]), f"{run.best['epoch']:.0f}"),
        )
        for run in ([top] if same_classes else runs)
    ]
    if options := differing(options_of(runs)):
        few = [f"{name} ({', '.join(values)})" for name, values in options.items()]
        sentences.append(escape(f"The options that differ: {'; '.join(few if len(few) < 6 else options)}."))
    notes = [
        f"{run.name} is unfinished: here are {run.last['itr']:,.0f} of its {run.options['total_itrs']:,} iterations."
        for run in runs
        if run.last["itr"] < run.options["total_itrs"]
    ]
    if not same_classes:
        notes.append(
            "The runs do not have the same classes: their mIoU are means over different classes and cannot be "
            "compared; the IoU of a class that several of them have can."
        )
    if len({validation_images(run) for run in runs}) > 1:
        notes.append("The runs name different validation data: their scores compare only if the images are the same.")
    return join([markup("<p>{}</p>", join(sentences, " ")), *map(note, notes)])


def validation_images(run: RunFiles) -> tuple:
    """What tells the validation images of runs apart; those of a folder without lists are listed in the run."""
    made = run.folder / "splits" / f"{run.options['val_split']}.txt"
    names = tuple(run.options[name] for name in ("dataset", "data_root", "val_split"))
    return (*names, made.read_text(encoding="utf-8") if made.is_file() else "")


def summary_section(runs: list[RunFiles]) -> Html:
    comparable = len(runs) > 1 and len({tuple(run.class_iou) for run in runs}) == 1
    highest = max(run.best["mean_iou"] for run in runs)
    rows = []
    for run in runs:
        best, epoch = run.best, f"{run.best['epoch']:.0f}"
        is_top = comparable and best["mean_iou"] == highest
        cell = td(number(best["mean_iou"]) + " ★" * is_top, "best" * is_top)
        accuracies = [number(best[column]) for column in ("overall_acc", "mean_acc", "freqw_acc")]
        rows.append([run.name, cell, epoch, number(run.last["mean_iou"]), *accuracies])
    header = ["run", "best mIoU", "at epoch", "last mIoU", "Overall Acc", "Mean Acc", "FreqW Acc"]
    return table("Scores on the validation split; the accuracies are those of the best epoch", header, rows)


def options_section(runs: list[RunFiles]) -> Html:
    """Options and environment, a column per run; what differs is marked."""

    def rows(values: dict[str, list[str]]) -> list[list]:
        marked = differing(values)
        return [[n, *(td(v, "differs" * (n in marked)) for v in row)] for n, row in values.items()]

    options, names = options_of(runs), [run.name for run in runs]
    environment = [run.options["versions"] | {n: run.options[n] for n in ENVIRONMENT[1:]} for run in runs]
    same = "There is one run: nothing to compare." if len(runs) == 1 else "The runs have the same options."
    different = table("Options that differ", ["option", *names], rows(differing(options)), css="words")
    every = table("All options, as in options.json", ["option", *names], rows(options), css="words")
    details = markup("<details><summary>All {} options</summary>{}</details>", len(options), every)
    machine = table("Versions, device, commit, command", ["", *names], rows(side_by_side(environment)), css="words")
    return join([different if differing(options) else markup("<p>{}</p>", same), details, machine])


def checkpoints_section(runs: list[RunFiles]) -> Html:
    """What each run's best.pth knows of itself, a column per run."""
    known, notes = {}, []
    for run in runs:
        try:
            known[run.name] = knowledge(load_checkpoint(run.folder / "best.pth"))
        except InputError as error:
            notes.append(note(f"Not available for {run.name}: {str(error).removeprefix('--ckpt ')}"))
    rows = [[name, *row] for name, row in side_by_side(list(known.values())).items()]
    shown = [table("best.pth of each run", ["", *known], rows, css="words")] if known else []
    return join([*shown, *notes])


def curves_section(runs: list[RunFiles]) -> Html:
    histories = {run.name: run.history for run in runs}
    rows = []
    for run in runs:
        for which, row in (("best", run.best), ("last", run.last)):
            scores = [number(row[column]) for column in (*SCORE_COLUMNS, "loss")]
            rows.append([f"{run.name}, {which}", f"{row['epoch']:.0f}", f"{row['itr']:,.0f}", *scores])
    header = ["run", "epoch", "iteration", *SCORE_COLUMNS.values(), "training loss"]
    alt = f"Curves over the iterations: validation mIoU, training loss and learning rate of {', '.join(histories)}"
    caption = "mIoU, loss and learning rate over the iterations; a point is a validation."
    scores = table("The best and the last validation of each run", header, rows)
    return join([figure(caption, alt, draw_curves, histories), scores])


def classes_section(runs: list[RunFiles]) -> Html:
    """IoU of each class, a column per run; the highest of a row is marked."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.class_iou):
        row, present = [name], [run.class_iou[name] for run in runs if run.class_iou.get(name, math.nan) >= 0]
        for run in runs:
            iou = run.class_iou.get(name, math.nan)
            is_top = len(present) > 1 and iou == max(present) > 0
            if math.isnan(iou):
                row.append(td("-" if name in run.class_iou else "not a class", "soft"))
            else:
                row.append(td(number(iou) + " ★" * is_top, "bar best" if is_top else "bar", iou))
        rows.append(row)
    means = [float(np.nanmean(list(run.class_iou.values()))) for run in runs]
    rows.append(["mean (mIoU)", *(td(number(mean), "bar", mean) for mean in means)])
    header = ["class", *(f"{run.name} (epoch {run.last['epoch']:.0f})" for run in runs)]
    return table("IoU of each class at the last validation", header, rows, css="words")


def confusion_section(runs: list[RunFiles]) -> Html:
    """Confusion matrices of the classes with the most wrong pixels, as shares of the rows."""
    parts = []
    for run in runs:
        names, totals = list(run.class_iou), run.matrix.sum(axis=1, keepdims=True)
        shares = run.matrix / np.maximum(totals, 1)
        wrong = run.matrix.sum(axis=0) + totals[:, 0] - 2 * run.matrix.diagonal()
        shown = np.sort(np.argsort(-wrong, kind="stable")[:TABLE_CLASSES])
        rows = [[names[i]] for i in shown]
        for row, i in zip(rows, shown, strict=True):
            for j in shown:
                none = "-" if i == j and not totals[i] else ""
                text = f"{100 * shares[i, j]:.0f}" if shares[i, j] >= 0.005 else none
                css = f"{'right' if i == j else ''} {'strong' if shares[i, j] > 0.5 else ''}"
                row.append(td(text, css, shares[i, j]))
        of = f"; {len(shown)} of {len(names)} classes, those with the most errors" * (len(names) > len(shown))
        caption = f"{run.name}, epoch {run.last['epoch']:.0f}: per cent of the pixels of each row's class{of}"
        header = ["annotated \\ predicted", *(names[j] for j in shown)]
        drawn = table(f"{caption}; blank below 0.5, - if not annotated", header, rows, css="matrix")
        parts += [markup("<h3>{}</h3>", run.name), drawn, confusions_table(run, shares)]
    return join(parts)


def confusions_table(run: RunFiles, shares: np.ndarray) -> Html:
    """The ten pairs of classes with the most pixels off the diagonal."""
    names, wrong = list(run.class_iou), run.matrix - np.diag(run.matrix.diagonal())
    rows = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:10]:
        i, j = np.unravel_index(place, wrong.shape)
        if wrong[i, j]:
            of_all = wrong[i, j] / wrong.sum()
            cell = td(f"{of_all:.1%}", "bar", of_all)
            rows.append([names[i], names[j], f"{wrong[i, j]:,}", f"{shares[i, j]:.1%}", cell])
    header = ["annotated", "predicted as", "pixels", "share of the class", "share of all errors"]
    return table(f"The most frequent confusions of {run.name}", header, rows, css="pairs")


def predictions_section(groups: list[Data], notes: list[Html], num: int) -> Html:
    """Validation images with their annotation and the predictions of the runs that share them."""
    parts = []
    for data in groups:
        if data.evaluations:
            models = ", ".join(data.evaluations)
            caption = f"Photograph, ground truth, and the predictions of {models}, with the mIoU of that image."
            alt = f"{len(data.compared)} validation images, each with its annotation and the models' predictions"
            parts += [markup("<h3>Side by side: {}</h3>", models), figure(caption, alt, draw_comparison, data)]
        for name, evaluation in data.evaluations.items():
            seen, of = len(evaluation.ious), len(data.val)
            which = f"the {of:,}" if seen == of else f"{seen:,} of the {of:,}"
            template = "<h3>Worst images of {}</h3><p>Of {} validation images, whose mIoU together is {}.</p>"
            parts.append(markup(template, name, which, number(evaluation.mean_iou)))
            caption = "The lowest mIoU first. In the last row wrong pixels are red; void is never wrong."
            alt = f"The validation images that {name} segments worst, with annotation, prediction and errors"
            parts.append(figure(caption, alt, draw_worst, data.val, evaluation, num=num))
    return join([*parts, *notes])


def draw_comparison(data: Data, path: Path) -> None:
    """A row per image: photograph, ground truth, and a column per run."""
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
    headings, labels = ["photograph", "ground truth", *data.evaluations], [data.val.ids[i] for i in data.compared]
    draw_grid(rows, headings=headings, labels=labels, path=path, legend=(data.val, sorted(seen - {VOID})))


def draw_worst(dataset: SegmentationDataset, evaluation: Evaluation, num: int, path: Path) -> None:
    """A column per image: photograph, ground truth, prediction, errors."""
    columns, headings, seen = [], [], set()
    for index, iou in list(evaluation.ious.items())[:num]:
        (image, mask), prediction = dataset[index], evaluation.predictions[index]
        colours = [dataset.decode_target(ids) for ids in (mask, prediction)]
        columns.append([(picture, "") for picture in (hwc(image), *colours, error_map(image, mask, prediction))])
        headings.append(f"{dataset.ids[index]}: mIoU {iou:.4f}")
        seen |= set(mask.unique().tolist()) | set(prediction.unique().tolist())
    labels, legend = ["photograph", "ground truth", "prediction", "errors"], (dataset, sorted(seen - {VOID}))
    draw_grid(list(zip(*columns, strict=True)), headings=headings, labels=labels, path=path, legend=legend)


def data_section(groups: list[Data], notes: list[Html]) -> Html:
    """Balance and samples of each training split."""
    parts = []
    for data in groups:
        try:
            parts.append(markup("<h3>Training split of {}</h3>", ", ".join(data.runs)))
            statistics = class_statistics(data.train)
            indices = choose_samples(statistics, NUM_SAMPLES, SEED, must_cover=False)
            caption = (
                f"{len(indices)} of {len(data.train):,} training images, chosen to show all classes if they can."
            )
            alt = f"{len(indices)} training images above their annotations, with a legend of the classes"
            parts.append(figure(caption, alt, draw_samples, data.train, indices))
            caption = "Share of the labelled pixels, and number of images, of each class."
            parts.append(figure(caption, f"Bar charts. {caption}", draw_statistics, statistics, data.train.palette))
        except InputError as error:
            notes = [*notes, note(f"Not available for {', '.join(data.runs)}: {error}")]
            continue
        (_, *header), rows = statistics_table(statistics)
        lines = [
            [name, f"{pixels:,}", td(f"{share:.2%}", "bar", share), f"{images:,}", f"{image_share:.1%}"]
            + [number(weight if pixels else math.nan) for weight in weights]
            for name, pixels, share, images, image_share, *weights in rows
        ]
        header = ["class", *(name.replace("_", " ") for name in header)]
        parts.append(table("Pixels and images of each class, and the class weights that follow", header, lines))
    return join([*parts, *notes])


def speed_section(runs: list[RunFiles]) -> Html:
    rows = []
    for run in runs:
        train, val = (sum(row[name] for row in run.history) for name in ("train_seconds", "val_seconds"))
        per_itr, memory = train / run.last["itr"], max(row["peak_memory_mb"] for row in run.history)
        speed = run.options["batch_size"] / per_itr if per_itr else math.nan
        cells = [number(per_itr, ".3f"), number(speed, ".1f"), number(val / len(run.history), ".1f")]
        cells += [number((train + val) / 60, ".1f"), number(memory, ",.0f")]
        rows.append([run.name, run.options["device_name"], *cells])
    header = ["run", "device", "seconds per iteration", "images per second", "seconds per validation"]
    return table("Speed and memory", [*header, "minutes in all", "peak memory (MB)"], rows, css="pairs")


def write_report(
    runs: list[Path], out: Path, *, data_root: str | None = None, device: torch.device, num: int = 5
) -> None:
    """Writes the report on these run folders to `out`, whole or not at all.

    The data are where each run's options say, or in `data_root`; without them, or without best.pth, the sections
    that need them say so. `num` images are compared, and as many are shown as the worst of each run; on the CPU
    at most `report_data.EVALUATED_ON_CPU` images are evaluated.
    Raises InputError for a run whose files are missing or not whole, and for an `out` that cannot be written.
    """
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name the file to write")
    found = read_runs(runs)
    groups, without_data, without_model = collect(found, data_root=data_root, device=device, num=num)
    sections = [
        summary_section(found),
        options_section(found),
        checkpoints_section(found),
        curves_section(found),
        classes_section(found),
        confusion_section(found),
        predictions_section(groups, [*without_data, *without_model], num),
        data_section(groups, without_data),
        speed_section(found),
    ]
    contents, bodies = [], []
    for (title, introduction), section in zip(INTRODUCTIONS.items(), sections, strict=True):
        anchor = title.lower().replace(" ", "-")
        contents.append(markup('<li><a href="#{}">{}</a></li>', anchor, title))
        template = '<section id="{}"><h2>{}</h2>\n<p>{}</p>\n{}\n</section>'
        bodies.append(markup(template, anchor, title, introduction, section))
    page = PAGE.substitute(
        title=escape(f"Semantic segmentation: {', '.join(run.name for run in found)}"),
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        folders=join((markup("<code>{}</code>", run.folder) for run in found), ", "),
        lead=lead(found),
        contents=join(contents),
        sections=join(bodies),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
