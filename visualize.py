"""Draws data sets and trained models; each command writes the file that it names.

python visualize.py samples --dataset folder --data_root my_data        # images that show every class
python visualize.py stats   --dataset folder --data_root my_data        # is the training set balanced?
python visualize.py check   --dataset folder --data_root my_data        # the data set doctor
python visualize.py compare --ckpt runs/A/best.pth runs/B/best.pth      # RGB | ground truth | A | B
python visualize.py curves  runs/A runs/B                               # mIoU, loss and learning rate
python visualize.py predict --input photos                              # masks and overlays of your own images
python visualize.py suspects --ckpt runs/A/best.pth                     # annotations that A contradicts: errors?
python visualize.py sam     --ckpt runs/A/best.pth                      # Segment Anything refines A's outlines
python visualize.py report  runs/A runs/B                               # everything in one HTML file
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from datasets import DATASETS, build_dataset
from datasets.files import VOID
from datasets.stats import choose_samples, class_statistics, format_statistics, statistics_table
from datasets.voc import SegmentationDataset
from utils.cli import Parser, any_path, friendly_errors, number
from utils.engine import choose_amp, choose_device, predict
from utils.errors import InputError
from utils.files import write_csv
from utils.metrics import image_iou
from utils.pictures.plotting import (
    draw_curves,
    draw_grid,
    draw_samples,
    draw_statistics,
    error_map,
    hwc,
    require_png,
)
from utils.pictures.predict import TILE, list_images, predict_files
from utils.pictures.suspects import draw_suspects, rank_suspects, suspects_table
from utils.run import Run
from utils.weights.load import load_model, require_classes

NUM_SAMPLES = 20  # images of `samples`; `compare` shows the first of them


def get_parser() -> ArgumentParser:
    """Defines the commands and their flags."""
    parser = Parser(prog="visualize.py", description="Draw data sets and trained models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(function: Callable, name: str, text: str) -> ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=function)
        return command

    command = add(samples, "samples", "images that together show every class, above their annotations")
    add_data(command, num=0, out="results/samples.png")
    command = add(stats, "stats", "pixels and images per class, and the resulting class weights")
    add_data(command, out="results/stats.png")
    command = add(check, "check", "all problems in images and masks; exit code 2 if training would fail")
    add_data(command, split=None)
    command.add_argument("--allow_absent", action="store_true", help="judge as main.py --allow_absent does")
    command = add(compare, "compare", "RGB | ground truth | a column per model, with the mIoU of each image")
    add_data(command, num=5, out="results/compare.png")
    add_models(command, nargs="+")
    command.add_argument("--errors", action="store_true", help="add a column per model with wrong pixels in red")
    command = add(curves, "curves", "mIoU, loss and learning rate of runs, also during training")
    add_runs(command, out="results/curves.png")

    command = add(predict_own, "predict", "class id masks, overlays and class shares of your own images")
    add_models(command, required=False, default="voc")
    add_flag = command.add_argument
    add_flag(
        "--input", type=any_path, required=True, metavar="PATH", help="an image, or a folder and its sub-folders"
    )
    add_flag("--out", type=any_path, default="results/predict", metavar="DIR", help="folder for masks/ and overlays/")
    add_flag("--tile", type=int, default=TILE, metavar="N", help="pixels; larger images are predicted in tiles")
    add_flag("--overlap", type=int, metavar="N", help="pixels that two tiles share (default: an eighth of --tile)")
    add_flag("--confidence", action="store_true", help="also write each pixel's probability as grey: 255 is 1")
    text = "pixels whose class has a lower probability become void (255)"
    add_flag("--min_confidence", type=number(float, 0, 1), default=0.0, metavar="P", help=text)

    command = add(suspects, "suspects", "images whose annotation a model contradicts most confidently")
    add_data(command, out="results/suspects.png")
    add_models(command)
    command.add_argument("--num", type=number(int, 1), default=20, metavar="N", help="images to draw")
    command = add(sam, "sam", "Segment Anything's masks, and the prediction with its outlines refined by them")
    add_data(command, num=5, out="results/sam.png")
    add_models(command, required=False)
    add_sam(command)
    command = add(report, "report", "one HTML file on runs: options, scores, curves and pictures")
    add_runs(command, out="results/report.html")
    add_flag = command.add_argument
    add_flag("--num", type=number(int, 1), default=5, metavar="N", help="images to compare")
    add_flag("--data_root", type=any_path, metavar="DIR", help="the data, if they have moved since training")
    add_flag("--device", default="auto", metavar="NAME", help="auto: cuda if available, otherwise cpu")
    return parser


def add_data(parser: ArgumentParser, *, split: str | None = "train", num: int | None = None, out: str = "") -> None:
    """Adds the flags that choose a data set; with `num` also images, with `out` also the file to write."""
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="voc", help="shapes is generated at its first use")
    add("--data_root", type=any_path, default="datasets/data", metavar="DIR", help="the same as for main.py")
    add("--year", choices=["2012", "2012_aug"], default="2012", help="VOC only")
    add("--split", default=split, nargs=None if split else "+", metavar="LIST", help="list in ImageSets/Segmentation")
    if num is not None:
        add("--random_seed", type=number(int, 0), default=1, metavar="N", help="seed for choosing images")
        text = "images" if num else f"images (default: {NUM_SAMPLES}, or all of a smaller split)"
        add("--num", type=number(int, 1), default=num or None, metavar="N", help=text)
        add("--ids", nargs="+", metavar="ID", help="these images instead")
    if out:
        add("--out", type=any_path, default=out, metavar="FILE", help="the PNG file to write")


def add_models(
    parser: ArgumentParser, *, nargs: str | None = None, required: bool = True, default: str | None = None
) -> None:
    add, text = parser.add_argument, "checkpoint written by main.py; voc: the bundled model"
    add("--ckpt", type=any_path, required=required, default=default, nargs=nargs, metavar="FILE", help=text)
    add("--device", default="auto", metavar="NAME", help="auto: cuda if available, otherwise cpu")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="mixed precision")


def add_runs(parser: ArgumentParser, out: str) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders written by main.py")
    parser.add_argument("--out", type=any_path, default=out, metavar="FILE", help="the file to write")


def add_sam(parser: ArgumentParser) -> None:
    add, share, count = parser.add_argument, number(float, 0, 1), number(int, 1)
    add("--input", type=any_path, metavar="PATH", help="an image, or a folder of images, instead of a data set")
    add("--sam", default="facebook/sam-vit-base", metavar="NAME", help="a name on the hub, or a local folder")
    add("--true_masks", action="store_true", help="use ground-truth regions as masks: the best possible outlines")
    add("--eval", type=count_or_all, metavar="N|all", help="score this many images as CSV instead of drawing them")
    add("--points_per_side", type=count, default=32, metavar="N", help="the grid of prompts has N x N points")
    add("--points_per_batch", type=count, default=64, metavar="N", help="fewer if a GPU runs out of memory")
    add("--max_masks", type=count, default=256, metavar="N", help="only the best masks of each image")
    add("--min_score", type=share, default=0.88, metavar="X", help="lowest IoU that SAM predicts for a mask; 0: any")
    add("--min_stability", type=share, default=0.95, metavar="X", help="lowest stability of an outline; 0: any")
    add("--min_area", type=number(int, 0), default=64, metavar="N", help="pixels; smaller masks refine nothing")
    add("--min_confidence", type=share, default=0.5, metavar="X", help="lowest mean class probability to refine")


def count_or_all(text: str) -> int | str:
    return text if text == "all" else number(int, 1)(text)


def open_data(opts: Namespace, lists: Path | None = None) -> SegmentationDataset:
    dataset = build_dataset(opts.dataset, opts.data_root, opts.split, year=opts.year, lists=lists)
    dataset.require_masks()
    return dataset


def choose(opts: Namespace, dataset: SegmentationDataset, *, must_cover: bool) -> list[int]:
    """Returns the images that `--ids` names, or `--num` images that together show every class."""
    if opts.ids:
        if unknown := [name for name in opts.ids if name not in dataset.ids]:
            raise InputError(f"--ids {unknown[0]}: is not in the split {opts.split}; give ids from its list")
        return [dataset.ids.index(name) for name in opts.ids]
    statistics = class_statistics(dataset)
    if must_cover:
        return choose_samples(statistics, opts.num or min(NUM_SAMPLES, len(set(dataset.ids))), opts.random_seed)
    return choose_samples(statistics, max(opts.num, NUM_SAMPLES), opts.random_seed, must_cover=False)[: opts.num]


def samples(opts: Namespace) -> None:
    """Draws images that together show every class, above their annotations."""
    dataset = open_data(opts)
    indices = choose(opts, dataset, must_cover=True)
    for index in indices:
        shown = [dataset.class_names[c] for c in dataset.mask(index).unique().tolist() if c < dataset.num_classes]
        print(f"{dataset.ids[index]}: {', '.join(shown)}")
    if dataset.missing_images:
        print(f"{len(dataset.missing_images)} of {len(dataset)} images are missing; only their annotations are drawn")
    draw_samples(dataset, indices, Path(opts.out))
    print(f"Written: {opts.out}")


def stats(opts: Namespace) -> None:
    """Counts pixels and images per class; prints them, writes a CSV file and draws bars."""
    dataset = open_data(opts)
    statistics = class_statistics(dataset)
    print("\n".join(format_statistics(statistics)))
    draw_statistics(statistics, dataset.palette, Path(opts.out))
    table = Path(opts.out).with_suffix(".csv")
    write_csv(table, *statistics_table(statistics))
    print(f"Written: {opts.out}, {table}")


def check(opts: Namespace) -> None:
    """Runs the data set doctor. Raises InputError if training would fail."""
    from datasets.prepare.check import check_dataset, format_findings

    findings, checked = check_dataset(
        opts.dataset, opts.data_root, opts.split, year=opts.year, allow_absent=opts.allow_absent
    )
    print("\n".join(format_findings(findings, checked)))
    if fatal := [finding for finding in findings if finding.fatal]:
        first = f"{fatal[0].path}: {fatal[0].problem}"
        problem = f"training would fail (fatal findings: {len(fatal):,})"
        raise InputError(f"{checked['folder']}: {problem}; fix them, starting with {first}")


def compare(opts: Namespace) -> None:
    """Draws RGB, ground truth and each model's prediction, with the mIoU of each image."""
    device, paths = choose_device(opts.device), [Path(path) for path in opts.ckpt]
    amp = choose_amp(opts.amp, device)
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
            prediction = predict(trained.model, image[None].to(device), amp)[0].cpu()  # [H, W]
            iou = image_iou(mask, prediction, dataset.num_classes)
            row.append((dataset.decode_target(prediction), f"mIoU {iou:.4f}"))
            present |= set(prediction.unique().tolist())
            if opts.errors:
                wrong = ((prediction != mask) & (mask != VOID)).sum() / (mask != VOID).sum().clamp_min(1)
                row.append((error_map(image, mask, prediction), f"{wrong:.1%} wrong"))
        rows.append(row)
        print(f"{dataset.ids[index]}: {', '.join(text for _, text in row[2:])}")
    columns = [text for name in names_of(paths) for text in ([name, f"{name}: errors"] if opts.errors else [name])]
    headings, labels = ["RGB", "ground truth", *columns], [dataset.ids[index] for index in indices]
    legend = dataset, sorted(present - {VOID})
    draw_grid(rows, headings=headings, labels=labels, path=Path(opts.out), legend=legend)
    print(f"Written: {opts.out}")


def names_of(ckpts: list[Path]) -> list[str]:
    """Names checkpoints after their run, with the file name unless it is best.pth; equal names become paths."""
    runs = [ckpt.resolve().parent.name for ckpt in ckpts]
    names = [run if c.name == "best.pth" else f"{run}/{c.stem}" for run, c in zip(runs, ckpts, strict=True)]
    return [name if names.count(name) == 1 else str(ckpt) for name, ckpt in zip(names, ckpts, strict=True)]


def curves(opts: Namespace) -> None:
    """Draws mIoU, loss and learning rate of runs."""
    histories = {}
    for folder in opts.runs:
        rows = Run(Path(folder)).history()
        if not rows:
            raise InputError(f"{folder}/history.csv: missing or empty; choose a run with at least one validation")
        name = Path(folder).resolve().name
        histories[name if name not in histories else folder] = rows
    draw_curves(histories, Path(opts.out))
    print(f"Written: {opts.out}")


def predict_own(opts: Namespace) -> None:
    """Writes class id masks, overlays and class shares of images outside any data set."""
    device = choose_device(opts.device)
    amp, root = choose_amp(opts.amp, device), Path(opts.input)
    paths, others = list_images(root, opts.out)
    model, names, palette, _ = load_model(opts.ckpt, device)
    unreadable = predict_files(
        model,
        paths,
        opts.out,
        class_names=names,
        palette=palette,
        root=root if root.is_dir() else root.parent,
        amp=amp,
        tile=opts.tile,
        overlap=opts.overlap,
        confidence=opts.confidence,
        min_confidence=opts.min_confidence,
    )
    print_unreadable(unreadable, len(paths))
    done = f"{len(paths) - len(unreadable)} of {len(paths)} images"
    ignored = f" ({others} other file{'s' * (others != 1)} ignored)" if others else ""
    folders = ", ".join(f"{opts.out}/{name}" for name in ["masks", "overlays", *["confidence"] * opts.confidence])
    print(f"Written: {folders} and {opts.out}/shares.csv for {done}{ignored}")


def print_unreadable(problems: list[str], total: int) -> None:
    if problems:
        print(f"{len(problems)} of {total} could not be read:", *problems, sep="\n  ")


def suspects(opts: Namespace) -> None:
    """Ranks the images of a split by how confidently a model contradicts their annotation, and draws the first."""
    device, out = choose_device(opts.device), Path(opts.out)
    amp = choose_amp(opts.amp, device)
    # Before the work, which may take minutes.
    require_png(out)
    dataset = open_data(opts, lists=Path(opts.ckpt).parent / "splits")
    dataset.require_images()
    trained = load_model(opts.ckpt, device)
    require_classes(trained.class_names, dataset.class_names, opts.ckpt)
    ranked, unreadable = rank_suspects(trained.model, dataset, amp)
    draw_suspects(trained.model, dataset, ranked[: opts.num], out, amp=amp)
    write_csv(out.with_suffix(".csv"), *suspects_table(dataset, ranked))
    print_unreadable(unreadable, len(dataset))
    print(f"Written: {out}, {out.with_suffix('.csv')}")


def sam(opts: Namespace) -> None:
    """Draws Segment Anything's masks and the prediction that they refine, or scores both with `--eval`."""
    from network.sam import load_sam
    from utils.pictures import sam as pictures

    pictures.check_flags(opts)
    device, out = choose_device(opts.device), Path(opts.out)
    amp = choose_amp(opts.amp, device)
    if opts.input:
        dataset, items = None, pictures.file_items(list_images(opts.input)[0][: opts.num])
    else:
        dataset = open_data(opts, lists=Path(opts.ckpt).parent / "splits" if opts.ckpt else None)
        indices = pictures.choose_any(opts, dataset) if opts.eval else choose(opts, dataset, must_cover=False)
        items = pictures.dataset_items(dataset, indices, native=bool(opts.eval))
    trained = load_model(opts.ckpt, device) if opts.ckpt else None
    if trained and dataset:
        require_classes(trained.class_names, dataset.class_names, opts.ckpt)
    model, unreadable = None if opts.true_masks else load_sam(opts.sam, device), []
    results = pictures.process(items, opts, sam=model, trained=trained, amp=amp, unreadable=unreadable)
    if opts.eval:
        out = out.with_suffix(".csv")
        counts = pictures.score(results, len(items), dataset.class_names, out)
    else:
        masks_name = "true masks" if opts.true_masks else "SAM"
        counts = pictures.draw(results, out, owner=dataset or trained, masks_name=masks_name)
    if counts:
        print(f"{pictures.summary(counts, device)}\nWritten: {out}")
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(items)} images cannot be used: {'; '.join(unreadable)}")


def report(opts: Namespace) -> None:
    """Writes one HTML file that describes runs."""
    from utils.pictures.report import write_report

    runs, device = [Path(run) for run in opts.runs], choose_device(opts.device)
    write_report(runs, Path(opts.out), data_root=opts.data_root, device=device, num=opts.num)
    print(f"Written: {opts.out}")


@friendly_errors
def main(argv: list[str] | None = None) -> None:
    opts = get_parser().parse_args(argv)
    opts.run(opts)


if __name__ == "__main__":
    main()
