"""Pictures of data sets and of trained models; each command writes the file that it names.

python visualize.py samples --dataset folder --data_root my_data        # images that show every class
python visualize.py stats   --dataset folder --data_root my_data        # is the training set balanced?
python visualize.py check   --dataset folder --data_root my_data        # the data set doctor
python visualize.py compare --ckpt runs/A/best.pth runs/B/best.pth      # RGB | ground truth | A | B
python visualize.py curves  runs/A runs/B                               # mIoU, loss and learning rate
python visualize.py predict --ckpt runs/A/best.pth --input photos       # masks and overlays of any pictures
python visualize.py sam     --ckpt runs/A/best.pth                      # Segment Anything's masks and A's classes
python visualize.py report  runs/A runs/B                               # all of it in one HTML file
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from datasets import DATASETS, build_dataset
from datasets.files import VOID
from datasets.prepare.check import check_dataset, format_findings
from datasets.stats import choose_samples, class_statistics, format_statistics, statistics_table
from datasets.voc import SegmentationDataset
from utils.checkpoint import require_classes
from utils.cli import Parser, any_path, exit_codes, number
from utils.engine import choose_amp, choose_device, predict
from utils.errors import InputError
from utils.metrics import image_iou
from utils.pictures import sam as sam_report
from utils.pictures.plotting import draw_curves, draw_grid, draw_samples, draw_statistics, error_map, hwc
from utils.pictures.predict import TILE, list_pictures, load_model, predict_files
from utils.pictures.report import write_report
from utils.run import Run, write_csv

NUM_SAMPLES = 20  # of `samples`; `compare` shows the first of them


def get_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = Parser(prog="visualize.py", description="Pictures of data sets and of trained models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(function: Callable, name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=function)
        return command

    command = add(samples, "samples", "images that together show every class, above their annotations")
    add_data(command, num=0, out="results/samples.png")

    command = add(stats, "stats", "pixels and images per class, and the class weights that follow")
    add_data(command, out="results/stats.png")

    command = add(check, "check", "opens every pair and names what is wrong; exit code 2 if training would fail")
    add_data(command, split=None)

    command = add(compare, "compare", "RGB | ground truth | a column per model, with each image's mIoU")
    add_data(command, num=5, out="results/compare.png")
    add_models(command, nargs="+")
    command.add_argument("--errors", action="store_true", help="a second column per model: wrong pixels in red")

    command = add(curves, "curves", "mIoU, loss and learning rate of runs, while they train too")
    add_runs(command, out="results/curves.png")

    command = add(predict_any, "predict", "id masks, overlays and class shares of any pictures")
    add_models(command)
    command.add_argument(
        "--input", type=any_path, required=True, metavar="PATH", help="a picture, or a folder of them"
    )
    command.add_argument(
        "--out", type=any_path, default="results/predict", metavar="DIR", help="where masks/ and overlays/ go"
    )
    command.add_argument(
        "--tile", type=int, default=TILE, metavar="N", help="larger pictures go in tiles of this side"
    )
    command.add_argument("--overlap", type=int, metavar="N", help="of two tiles (default: an eighth of --tile)")

    command = add(sam, "sam", "Segment Anything's masks, and a prediction that takes its outlines from them")
    add_data(command, num=5, out="results/sam.png")
    add_models(command, required=False)
    command.add_argument(
        "--input", type=any_path, metavar="PATH", help="a picture, or a folder of them, instead of a data set"
    )
    sam_report.add_flags(command)

    command = add(report, "report", "one HTML file of runs: options, scores, curves and pictures")
    add_runs(command, out="results/report.html")
    command.add_argument("--num", type=number(int, 1), default=5, metavar="N", help="images to compare")
    command.add_argument(
        "--data_root", type=any_path, metavar="DIR", help="where the data are, if no longer where they were"
    )
    command.add_argument(
        "--device", default="auto", metavar="NAME", help="auto: cuda where there is one, otherwise cpu"
    )
    return parser


def add_data(
    parser: argparse.ArgumentParser, *, split: str | None = "train", num: int | None = None, out: str = ""
) -> None:
    """The flags that say which data; with `num` those that choose images, with `out` the file to write."""
    parser.add_argument("--dataset", choices=DATASETS, default="voc", help="shapes is generated at its first use")
    parser.add_argument("--data_root", type=any_path, default="datasets/data", metavar="DIR", help="as for main.py")
    parser.add_argument("--year", choices=["2012", "2012_aug"], default="2012", help="of voc")
    every = {} if split else {"nargs": "+"}
    parser.add_argument("--split", default=split, metavar="LIST", help="in ImageSets/Segmentation", **every)
    if num is not None:
        parser.add_argument(
            "--random_seed", type=number(int, 0), default=1, metavar="N", help="of the choice of images"
        )
        text = "images" if num else f"images (default: {NUM_SAMPLES}, or all of a smaller split)"
        parser.add_argument("--num", type=number(int, 1), default=num or None, metavar="N", help=text)
        parser.add_argument("--ids", nargs="+", metavar="ID", help="these images instead")
    if out:
        parser.add_argument("--out", type=any_path, default=out, metavar="FILE", help="the picture to write")


def add_models(parser: argparse.ArgumentParser, *, nargs: str | None = None, required: bool = True) -> None:
    parser.add_argument(
        "--ckpt", type=any_path, required=required, nargs=nargs, metavar="FILE", help="written by main.py"
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto: cuda where there is one, otherwise cpu"
    )
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="mixed precision")


def add_runs(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, as main.py leaves them")
    parser.add_argument("--out", type=any_path, default=out, metavar="FILE", help="the file to write")


def open_data(opts: argparse.Namespace, lists: Path | None = None) -> SegmentationDataset:
    return build_dataset(opts.dataset, opts.data_root, opts.split, year=opts.year, lists=lists)


def choose(opts: argparse.Namespace, dataset: SegmentationDataset, *, must_cover: bool) -> list[int]:
    """The images that `--ids` names, or `--num` of those that together show every class."""
    if opts.ids:
        unknown = [name for name in opts.ids if name not in dataset.ids]
        if unknown:
            raise InputError(f"--ids {unknown[0]}: is not in the split {opts.split}")
        return [dataset.ids.index(name) for name in opts.ids]
    statistics = class_statistics(dataset)
    if must_cover:
        return choose_samples(statistics, opts.num or min(NUM_SAMPLES, len(set(dataset.ids))), opts.random_seed)
    return choose_samples(statistics, max(opts.num, NUM_SAMPLES), opts.random_seed, must_cover=False)[: opts.num]


def samples(opts: argparse.Namespace) -> None:
    """Images that together show every class, above their annotations."""
    dataset = open_data(opts)
    indices = choose(opts, dataset, must_cover=True)
    for index in indices:
        shown = [dataset.class_names[c] for c in dataset.mask(index).unique().tolist() if c < dataset.num_classes]
        print(f"{dataset.ids[index]}: {', '.join(shown)}")
    if dataset.missing_images:
        print(f"{len(dataset.missing_images)} of {len(dataset)} photographs are missing: annotations alone are drawn")
    draw_samples(dataset, indices, Path(opts.out))
    print(f"Written: {opts.out}")


def stats(opts: argparse.Namespace) -> None:
    """Pixels and images per class: printed, as CSV and as bars."""
    dataset = open_data(opts)
    statistics = class_statistics(dataset)
    print("\n".join(format_statistics(statistics)))
    draw_statistics(statistics, dataset.palette, Path(opts.out))
    table = Path(opts.out).with_suffix(".csv")
    write_csv(table, *statistics_table(statistics))
    print(f"Written: {opts.out}, {table}")


def check(opts: argparse.Namespace) -> None:
    """The data set doctor. Raises InputError where training would fail."""
    findings, pairs = check_dataset(opts.dataset, opts.data_root, opts.split, year=opts.year)
    print("\n".join(format_findings(findings, pairs)))
    fatal = [finding for finding in findings if finding.fatal]
    if fatal:
        raise InputError(
            f"training would fail: {len(fatal)} findings, the first is {fatal[0].path}: {fatal[0].problem}"
        )


def compare(opts: argparse.Namespace) -> None:
    """A grid of RGB, ground truth and each model, with the mIoU of each image."""
    device = choose_device(opts.device)
    amp = choose_amp(opts.amp, device)
    paths = [Path(path) for path in opts.ckpt]
    dataset = open_data(opts, lists=paths[0].parent / "splits")
    dataset.require_images()
    models = [load_model(path, device) for path in paths]
    for path, trained in zip(paths, models, strict=True):
        require_classes(trained.class_names, dataset.class_names, str(path))
    indices = choose(opts, dataset, must_cover=False)
    rows, present = [], set()
    for index in indices:
        image, mask = dataset[index]
        row = [(hwc(image), ""), (dataset.decode_target(mask), "")]
        present |= set(mask.unique().tolist())
        for trained in models:
            prediction = predict(trained.model, image[None].to(device), amp)[0].cpu()
            iou = image_iou(mask, prediction, dataset.num_classes)
            row.append((dataset.decode_target(prediction), f"mIoU {iou:.4f}"))
            present |= set(prediction.unique().tolist())
            if opts.errors:
                wrong = ((prediction != mask) & (mask != VOID)).sum() / (mask != VOID).sum().clamp_min(1)
                row.append((error_map(image, mask, prediction), f"{wrong:.1%} wrong"))
        rows.append(row)
        print(f"{dataset.ids[index]}: {', '.join(text for _, text in row[2:])}")
    names = [name_of(path) for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    columns = [heading for name in names for heading in ([name, f"{name}: errors"] if opts.errors else [name])]
    draw_grid(
        rows,
        headings=["RGB", "ground truth", *columns],
        labels=[dataset.ids[index] for index in indices],
        path=Path(opts.out),
        legend=(dataset, sorted(present - {VOID})),
    )
    print(f"Written: {opts.out}")


def name_of(ckpt: Path) -> str:
    """The run's name, with the file's where that is not the best model."""
    run = ckpt.resolve().parent.name
    return run if ckpt.name == "best.pth" else f"{run}/{ckpt.stem}"


def curves(opts: argparse.Namespace) -> None:
    """mIoU, loss and learning rate of runs."""
    histories = {}
    for folder in opts.runs:
        rows = Run(Path(folder)).history()
        if not rows:
            raise InputError(
                f"{folder}/history.csv: missing or without a row; name a run that has been validated once"
            )
        name = Path(folder).resolve().name
        histories[name if name not in histories else folder] = rows
    draw_curves(histories, Path(opts.out))
    print(f"Written: {opts.out}")


def predict_any(opts: argparse.Namespace) -> None:
    """Id masks, overlays and class shares of any pictures."""
    device = choose_device(opts.device)
    amp, paths = choose_amp(opts.amp, device), list_pictures(opts.input)
    trained = load_model(opts.ckpt, device)
    unreadable = predict_files(
        trained.model,
        paths,
        opts.out,
        class_names=trained.class_names,
        palette=trained.palette,
        amp=amp,
        tile=opts.tile,
        overlap=opts.overlap,
    )
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} could not be read:", *unreadable, sep="\n  ")
    print(
        f"Written: {opts.out}/masks, {opts.out}/overlays and {opts.out}/shares.csv of {len(paths) - len(unreadable)}"
    )


def sam(opts: argparse.Namespace) -> None:
    """Segment Anything's masks and the prediction refined by them, drawn or, with `--eval`, scored."""
    sam_report.require_fitting(opts)
    device = choose_device(opts.device)
    amp = choose_amp(opts.amp, device)
    if opts.input:
        dataset, items = None, sam_report.picture_items(list_pictures(opts.input)[: opts.num])
    else:
        dataset = open_data(opts, lists=Path(opts.ckpt).parent / "splits" if opts.ckpt else None)
        any_of = sam_report.choose_any(dataset, opts.eval, opts.random_seed) if opts.eval else None
        indices = any_of or choose(opts, dataset, must_cover=False)
        items = sam_report.dataset_items(dataset, indices, native=bool(opts.eval))
    trained = load_model(opts.ckpt, device) if opts.ckpt else None
    if trained and dataset:
        require_classes(trained.class_names, dataset.class_names, opts.ckpt)
    generate = sam_report.mask_generator(opts, device, amp)
    unreadable, out = [], Path(opts.out)
    rule = {"min_area": opts.min_area, "min_confidence": opts.min_confidence}
    results = sam_report.results(items, generate, trained, amp=amp, unreadable=unreadable, **rule)
    if opts.eval:
        out = out.with_suffix(".csv")
        counts = sam_report.score(results, len(items), dataset.class_names, out)
    else:
        masks_name = "true masks" if opts.true_masks else "SAM"
        counts = sam_report.draw(results, out, owner=dataset or trained, masks_name=masks_name)
    if counts:
        print(f"{sam_report.summary(counts, device)}\nWritten: {out}")
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(items)} pictures cannot be used: {'; '.join(unreadable)}")


def report(opts: argparse.Namespace) -> None:
    """One HTML file of runs."""
    runs, device = [Path(run) for run in opts.runs], choose_device(opts.device)
    write_report(runs, Path(opts.out), data_root=opts.data_root, device=device, num=opts.num)
    print(f"Written: {opts.out}")


@exit_codes
def main(argv: list[str] | None = None) -> None:
    opts = get_parser().parse_args(argv)
    opts.run(opts)


if __name__ == "__main__":
    main()
