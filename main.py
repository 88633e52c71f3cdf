"""Train, evaluate and resume DeepLabV3 and DeepLabV3+.

    python main.py --download                                # PASCAL VOC 2012 with the defaults
    python main.py --dataset folder --data_root my_data      # one's own masks, in VOC layout
    python main.py --dataset shapes --backbone_weights none  # generated data, nothing to download
    python main.py --continue_training                       # go on where the run stopped
    python main.py --test_only --ckpt runs/NAME/best.pth     # score a checkpoint

The flags are in `utils/options.py` and under --help. Everything that a run leaves is in runs/NAME.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.files import VOID
from datasets.loader import make_loader, open_split
from datasets.sampler import SameSizeBatches, TrainBatches
from datasets.stats import class_statistics
from datasets.transforms import crop_val_transform, eval_transform, train_transform
from datasets.voc import SegmentationDataset
from network import build_model
from network._deeplab import DeepLab
from utils.card import Card, format_card, write_card
from utils.checkpoint import TrainingState, load_model_state, require_classes
from utils.cli import exit_codes
from utils.engine import RunningMean, autocast, choose_amp, choose_device, compiled, evaluate, normalize, parse_tta
from utils.errors import InputError
from utils.loss import build_loss, class_weights
from utils.metrics import format_class_table, format_scores, scores
from utils.optimizer import build_optimizer
from utils.options import ABOUT_THE_TEST, differences, find_run, get_parser
from utils.plotting import prediction_strip
from utils.run import SCORE_COLUMNS, ResultWriter, Run, device_name, peak_memory_mb
from utils.visualizer import SilentVisualizer, Visualizer, build_visualizer


@exit_codes
def main(argv: list[str] | None = None) -> dict:
    """Runs a command line; returns the last scores, named as in `utils.metrics.scores`."""
    opts = get_parser().parse_args(argv)
    device = choose_device(opts.device)
    amp = choose_amp(opts.amp, device)
    run, checkpoint = find_run(opts)
    run.log(f"Device: {device_name(device)}, {str(amp or torch.float32).removeprefix('torch.')}")

    lists = (run.folder.parent if opts.test_only else run.folder) / "splits"
    transform = crop_val_transform(opts.crop_size) if opts.crop_val else eval_transform()
    val_set = open_split(opts, opts.val_split, transform, lists)
    if checkpoint:
        require_classes(checkpoint["class_names"], val_set.class_names, opts.ckpt)
    torch.manual_seed(opts.random_seed)
    model = build_model(
        opts.model,
        num_classes=val_set.num_classes,
        output_stride=opts.eval_output_stride or opts.output_stride,  # the weights are the same
        backbone_weights="none" if checkpoint else opts.backbone_weights,
    )
    if checkpoint:
        load_model_state(model, checkpoint, opts.ckpt)
        run.log(f"Model restored from {opts.ckpt}")
        for line in differences(opts, checkpoint):
            run.log(f"  {line}")
    model = model.to(device, memory_format=torch.channels_last)
    if opts.test_only:
        return test(opts, run, model=model, test_set=val_set, amp=amp)
    return train(opts, run, model=model, val_set=val_set, checkpoint=checkpoint, amp=amp)


def validate(
    opts: argparse.Namespace, run: Run, *, model: DeepLab, loader: DataLoader, amp: torch.dtype | None
) -> dict:
    """Scores a model on the whole of a loader's split, prints the scores and writes them to the run's folder."""
    dataset = loader.dataset
    writer = ResultWriter(run.folder / "results", dataset) if opts.save_val_results else None
    card = Card(dataset.ids, dataset.num_classes, model.device, also=writer) if opts.test_only else None
    run.log("validation...")
    tta = parse_tta(opts.tta) if opts.tta else None
    confusion = evaluate(model, loader, num_classes=dataset.num_classes, amp=amp, tta=tta, on_batch=card or writer)
    matrix = confusion.matrix()
    if not matrix.any():
        raise InputError(f"--val_split {opts.val_split}: not one of its pixels is labelled; use another list")
    result, figures = scores(matrix), card.compute() if card else {}
    run.log("\n".join(format_scores(result)))
    run.log("\n".join(format_class_table(result, dataset.class_names, figures.get("class_boundary_iou"))))
    run.write_scores(result, matrix, dataset.class_names)
    if card:
        run.log("\n".join(format_card(figures)))
        about = {name: getattr(opts, name) for name in ("ckpt", "dataset", "val_split", *ABOUT_THE_TEST)}
        about |= {"comparable": not opts.crop_val}
        write_card(run.folder, figures, result=result, class_names=dataset.class_names, about=about)
    return result


def test(
    opts: argparse.Namespace, run: Run, *, model: DeepLab, test_set: SegmentationDataset, amp: torch.dtype | None
) -> dict:
    """`--test_only`: scores the model and leaves the scores in the run's `test_<split>` folder."""
    run.log(f"Dataset: {opts.dataset}, Test set: {len(test_set)} ({opts.val_split})")
    sizes = test_set.sizes()
    if opts.crop_val:
        run.log(f"Centre crops of {opts.crop_size}: these scores do not compare with those of whole pictures")
        sizes = [(opts.crop_size, opts.crop_size)] * len(test_set)
    batches = SameSizeBatches(sizes, opts.val_batch_size)
    loader = make_loader(test_set, batches, num_workers=opts.num_workers, device=model.device)
    run.start(vars(opts), model.device)
    run.keep_splits({opts.val_split: test_set})
    result = validate(opts, run, model=model, loader=loader, amp=amp)
    run.log(f"Scores saved in {run.folder}")
    return result


def train(
    opts: argparse.Namespace,
    run: Run,
    *,
    model: DeepLab,
    val_set: SegmentationDataset,
    checkpoint: dict | None,
    amp: torch.dtype | None,
) -> dict:
    """Sets training up, or takes it up again; returns the scores of its last validation."""
    part = opts.batch_size // opts.grad_accum
    if part * opts.grad_accum != opts.batch_size:
        raise InputError(
            f"--grad_accum {opts.grad_accum}: does not divide --batch_size {opts.batch_size}; change one"
        )
    if part == 1:
        raise InputError(
            f"--batch_size {opts.batch_size} --grad_accum {opts.grad_accum}: after the ASPP's global pooling, batch "
            "normalisation would have one value a channel to take mean and deviation of; give 2 images or more a part"
        )
    if opts.grad_accum > 1:
        run.log(f"Batch normalisation sees {part} images at a time, not {opts.batch_size} (--grad_accum)")
    transform = train_transform(opts.crop_size, seed=opts.random_seed)
    train_set = open_split(opts, opts.train_split, transform, run.folder / "splits")
    run.log(f"Dataset: {opts.dataset}, Train set: {len(train_set)}, Val set: {len(val_set)}")
    criterion = choose_criterion(opts, run, train_set=train_set, device=model.device)
    optimizer, scheduler = build_optimizer(opts, model)
    scaler = torch.amp.GradScaler(model.device.type, enabled=amp is torch.float16)
    state = TrainingState(model, optimizer, scheduler, scaler)
    if checkpoint and opts.continue_training:
        state.restore(checkpoint)
        run.log(f"Training state restored from {opts.ckpt}")
        if state.cur_itrs >= opts.total_itrs:
            run.log(f"finished: {state.cur_itrs} iterations are done, --total_itrs is {opts.total_itrs}")
            run.log("\n".join([*format_scores(state.scores), *format_class_table(state.scores, val_set.class_names)]))
            return report(run, state)

    batches = TrainBatches(
        len(train_set),
        batch_size=opts.batch_size,
        seed=opts.random_seed,
        total_itrs=opts.total_itrs,
        start_itr=state.cur_itrs,
    )
    val_batches = SameSizeBatches(val_set.sizes(), opts.val_batch_size)
    loader = make_loader(train_set, batches, num_workers=opts.num_workers, device=model.device)
    val_loader = make_loader(val_set, val_batches, num_workers=opts.num_workers, device=model.device)
    run.start(vars(opts), model.device)
    run.go_on_from(state.cur_itrs)
    run.keep_splits({opts.train_split: train_set, opts.val_split: val_set})
    vis = build_visualizer(opts.enable_vis, port=opts.vis_port, env=opts.vis_env, warn=run.log)
    vis.table("options", [(name, str(value)) for name, value in vars(opts).items()], header=("option", "value"))
    show_history(vis, run.history())
    try:
        run_training(
            opts, run, state=state, criterion=criterion, loader=loader, val_loader=val_loader, amp=amp, vis=vis
        )
    except InputError:
        run.discard_unless_validated()
        raise
    finally:
        vis.close()
    return report(run, state)


def choose_criterion(
    opts: argparse.Namespace, run: Run, *, train_set: SegmentationDataset, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`--loss_type` with `--class_weights`, which are counted from the training set's masks and logged."""
    weights = None
    if opts.class_weights != "none":
        counted = class_statistics(train_set)
        weights = class_weights(opts.class_weights, counted.pixels, counted.image_pixels, images=counted.images)
        pairs = zip(train_set.class_names, weights.tolist(), strict=True)
        run.log(
            f"Class weights ({opts.class_weights}): {', '.join(f'{name} {weight:.4g}' for name, weight in pairs)}"
        )
        weights = weights.to(device)
    return build_loss(
        opts.loss_type,
        focal_gamma=opts.focal_gamma,
        ohem_threshold=opts.ohem_threshold,
        ohem_keep=opts.ohem_keep,
        class_weights=weights,
    )


def run_training(
    opts: argparse.Namespace,
    run: Run,
    *,
    state: TrainingState,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loader: DataLoader,
    val_loader: DataLoader,
    amp: torch.dtype | None,
    vis: Visualizer | SilentVisualizer,
) -> None:
    """The training loop, from `state.cur_itrs` to `--total_itrs`."""
    model, optimizer, device = state.model, state.optimizer, state.model.device
    itrs_per_epoch = loader.batch_sampler.itrs_per_epoch
    val_interval = opts.val_interval or itrs_per_epoch
    forward = compiled(model, run.log) if opts.compile else model
    since_print, since_row, clock = RunningMean(), RunningMean(), time.perf_counter()
    bar = tqdm(
        loader,
        desc="training",
        initial=state.cur_itrs,
        total=opts.total_itrs,
        unit="it",
        dynamic_ncols=True,
        disable=None,
    )
    model.train()
    for images, targets in bar:
        torch.manual_seed(opts.random_seed * 1_000_003 + state.cur_itrs)  # dropout goes by (seed, iteration)
        lr = optimizer.param_groups[-1]["lr"]
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        loss = accumulate(
            opts, state.scaler, forward=forward, criterion=criterion, images=images, targets=targets, amp=amp
        )
        state.scaler.step(optimizer)
        state.scaler.update()
        state.scheduler.step()
        state.cur_itrs += 1
        since_print.add(loss)
        since_row.add(loss)

        epoch = (state.cur_itrs - 1) // itrs_per_epoch + 1
        if state.cur_itrs % opts.print_interval == 0 or state.cur_itrs == opts.total_itrs:
            mean, speed = finite(since_print.pop(), state.cur_itrs), (bar.format_dict["rate"] or 0) * opts.batch_size
            bar.set_postfix_str(f"loss={mean:.4f}, lr={lr:.2e}, {speed:.1f} images/s")
            run.log(f"Epoch {epoch}, Itrs {state.cur_itrs}/{opts.total_itrs}, Loss={mean:.6f}")
            vis.curve("loss", state.cur_itrs, mean, name="training")
            vis.curve("learning rate", state.cur_itrs, lr, name="head")
        if state.cur_itrs % val_interval == 0 or state.cur_itrs == opts.total_itrs:
            loss = finite(since_row.pop(), state.cur_itrs)  # waits for the device: the clock is read after it
            trained = time.perf_counter()
            state.scores = validate(opts, run, model=model, loader=val_loader, amp=amp)
            run.add_history(
                state.scores,
                epoch=epoch,
                itr=state.cur_itrs,
                loss=loss,
                lr=lr,
                train_seconds=trained - clock,
                val_seconds=time.perf_counter() - trained,
                peak_memory_mb=peak_memory_mb(device),
            )
            keep(opts, run, state, val_loader.dataset)
            show_history(vis, run.history()[-1:])
            if opts.enable_vis:
                show_samples(vis, state, val_loader.dataset, num_samples=opts.vis_num_samples, amp=amp)
            clock = time.perf_counter()


def accumulate(
    opts: argparse.Namespace,
    scaler: torch.amp.GradScaler,
    *,
    forward: Callable[[torch.Tensor], torch.Tensor],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    targets: torch.Tensor,
    amp: torch.dtype | None,
) -> torch.Tensor:
    """Adds the gradients of one step's batch in `--grad_accum` parts and returns its loss, on the device.

    Each part counts by its valid pixels, so that the mean is over those of the whole step, however unevenly void is
    shared out.
    """
    total, valid = torch.zeros((), device=images.device), (targets != VOID).sum().clamp_min(1)
    for some, their in zip(images.chunk(opts.grad_accum), targets.chunk(opts.grad_accum), strict=True):
        with autocast(images.device, amp):
            loss = criterion(forward(normalize(some)), their)
        if opts.grad_accum > 1:
            loss = loss * ((their != VOID).sum() / valid)
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def keep(opts: argparse.Namespace, run: Run, state: TrainingState, dataset: SegmentationDataset) -> None:
    """Saves `best.pth` where the mIoU is the best so far, and `latest.pth` after each validation.

    In that order: a kill between the two would otherwise lose the best model.
    """
    names = ["latest.pth"]
    if state.scores["Mean IoU"] > state.best_score:
        state.best_score, state.best_itr = state.scores["Mean IoU"], state.cur_itrs
        run.log(f"new best mIoU: {state.best_score:.6f}")
        names = ["best.pth", "latest.pth"]
    for name in names:
        state.save(run.folder / name, opts=opts, dataset=dataset)
        run.log(f"Model saved as {run.folder / name}")


def show_history(vis: Visualizer | SilentVisualizer, rows: list[dict[str, float]]) -> None:
    """Sends rows of the history to the dashboard: all that there are when a run goes on, then each new one."""
    itrs = [row["itr"] for row in rows]
    for column, name in SCORE_COLUMNS.items():
        vis.curve("validation", itrs, [row[column] for row in rows], name=name)
    vis.curve("loss", itrs, [row["loss"] for row in rows], name="mean since the last validation")


def show_samples(
    vis: Visualizer | SilentVisualizer,
    state: TrainingState,
    dataset: SegmentationDataset,
    *,
    num_samples: int,
    amp: torch.dtype | None,
) -> None:
    """Sends IoU per class, and strips of image | truth | prediction, to the dashboard."""
    vis.table("class IoU", zip(dataset.class_names, state.scores["Class IoU"], strict=True), header=("class", "IoU"))
    ids = dataset.ids[:num_samples]
    vis.images("sample", [prediction_strip(state.model, dataset, index, amp) for index in range(len(ids))], ids)


def report(run: Run, state: TrainingState) -> dict:
    """Prints the last score and the best; returns the last scores."""
    run.log(f"last score and itr: {state.scores['Mean IoU']:.6f} {state.cur_itrs}")
    run.log(f"best score and itr: {state.best_score:.6f} {state.best_itr}")
    return state.scores


def finite(loss: float, itr: int) -> float:
    """Raises InputError for a loss that training cannot come back from, before such weights are saved."""
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at iteration {itr}: lower --lr, warm up (--warmup_itrs), or give --amp off"
        )
    return loss


if __name__ == "__main__":
    main()
