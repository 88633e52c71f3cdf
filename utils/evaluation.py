"""Scores of a model on a split: printed, and written where they belong."""

import argparse
import contextlib

import torch
from torch.utils.data import DataLoader

from datasets.loader import SameSizeBatches, end_workers, make_loader
from datasets.voc import SegmentationDataset
from network._deeplab import DeepLab
from utils.card import Card, format_card, write_card
from utils.cli import Interrupted, Interruption
from utils.distributed import World
from utils.engine import evaluate, parse_tta
from utils.metrics import format_class_table, format_scores, scores
from utils.options import ABOUT_THE_TEST
from utils.run import ResultWriter, Run


def validate(
    opts: argparse.Namespace,
    run: Run,
    *,
    model: DeepLab,
    loader: DataLoader,
    amp: torch.dtype | None,
    world: World,
    interruption: Interruption | None = None,
    when: str = "",
) -> dict:
    """Scores a model on the whole of a loader's split, prints the scores and writes them to the run's folder.

    Raises Interrupted between two batches, in all processes.
    """
    dataset = loader.dataset
    writer = ResultWriter(run.folder / "results", dataset) if opts.save_val_results else None
    card = Card(dataset.ids, dataset.num_classes, model.device, also=writer) if opts.test_only else None
    run.log(f"validation{when}...")

    def on_batch(*batch: object) -> None:
        if interruption is not None and interruption.signal:
            raise Interrupted
        if (look := card or writer) is not None:
            look(*batch)

    tta = parse_tta(opts.tta) if opts.tta else None
    how = {"amp": amp, "tta": tta, "on_batch": on_batch, "quiet": not world.is_first}
    with contextlib.suppress(Interrupted):
        matrix = evaluate(model, loader, num_classes=dataset.num_classes, **how).matrix()
    if interruption is not None:
        interruption.check(world)
    matrix = world.sum(matrix)
    if card:
        card.share(world)
    if not matrix.any():
        flag = f"--crop_size {opts.crop_size}" if opts.crop_val else f"--val_split {opts.val_split}"
        raise world.refusal(f"{flag}: not one of the pixels to score is labelled; give another")
    result, figures = scores(matrix), card.compute() if card else {}
    run.log("\n".join(format_scores(result)))
    run.log("\n".join(format_class_table(result, dataset.class_names, figures.get("class_boundary_iou"))))
    run.write_scores(result, matrix, dataset.class_names)
    if card and world.is_first:
        run.log("\n".join(format_card(figures)))
        about = {name: getattr(opts, name) for name in ("ckpt", "dataset", "val_split", *ABOUT_THE_TEST)}
        about |= {"comparable": not opts.crop_val}
        write_card(run.folder, figures, result=result, class_names=dataset.class_names, about=about)
    return result


def test(
    opts: argparse.Namespace,
    run: Run,
    *,
    model: DeepLab,
    test_set: SegmentationDataset,
    amp: torch.dtype | None,
    world: World,
) -> dict:
    """`--test_only`: scores the model and leaves the scores in the run's `test_<split>` folder."""
    run.log(f"Dataset: {opts.dataset}, Test set: {len(test_set)} ({opts.val_split})")
    sizes = world.together(test_set.sizes)
    if opts.crop_val:
        run.log(f"Centre crops of {opts.crop_size}: these scores do not compare with those of whole pictures")
        sizes = [(opts.crop_size, opts.crop_size)] * len(test_set)
    batches = SameSizeBatches(sizes, opts.val_batch_size, rank=world.rank, processes=world.size)
    loader = make_loader(test_set, batches, num_workers=opts.num_workers, device=model.device)
    world.together(lambda: run.start(vars(opts), model.device))
    with run.writing():
        run.keep_splits({opts.val_split: test_set})
        try:
            result = validate(opts, run, model=model, loader=loader, amp=amp, world=world)
        finally:
            end_workers(loader)
        run.log(f"Scores saved in {run.folder}")
    return result
