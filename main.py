"""Train, evaluate and resume DeepLabV3 and DeepLabV3+.

    python main.py --download                                # PASCAL VOC 2012 with the defaults
    python main.py --dataset folder --data_root my_data      # one's own masks, in VOC layout
    python main.py --dataset shapes --backbone_weights none  # generated data, nothing to download
    python main.py --continue_training                       # go on where the run stopped
    python main.py --test_only --ckpt runs/NAME/best.pth     # score a checkpoint
    torchrun --nproc_per_node 4 main.py --batch_size 16      # four GPUs, 16 images a step in all

The flags are in `utils/options.py` and under --help. Everything that a run leaves is in runs/NAME.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.loader import end_workers, make_loader, open_split
from datasets.sampler import SameSizeBatches, TrainBatches
from datasets.stats import class_statistics
from datasets.transforms import crop_val_transform, eval_transform, train_transform
from datasets.voc import SegmentationDataset
from network import build_model
from network._deeplab import DeepLab
from utils.card import Card, format_card, write_card
from utils.checkpoint import TrainingState, init_from, load_model_state, require_classes
from utils.cli import Interrupted, Interruption, exit_codes
from utils.distributed import World, join, restarted
from utils.engine import accumulate, choose_amp, choose_device, compiled, evaluate, is_out_of_memory, parse_tta
from utils.errors import InputError, SampleError
from utils.export import check_target, export_onnx
from utils.loss import ADDITIVE_LOSSES, build_loss, class_weights
from utils.metrics import RunningMean, format_class_table, format_scores, scores
from utils.optimizer import build_optimizer
from utils.options import ABOUT_THE_TEST, differences, find_run, get_parser, require_fitting
from utils.plotting import prediction_strip
from utils.prediction import load_model
from utils.run import SCORE_COLUMNS, ResultWriter, Run, SilentRun, device_name, peak_memory_mb
from utils.visualizer import SilentVisualizer, Visualizer, build_visualizer


@exit_codes
def main(argv: list[str] | None = None) -> dict:
    """Runs a command line; returns the last scores, named as in `utils.metrics.scores`."""
    opts = get_parser().parse_args(argv)
    if opts.export:
        require_fitting(opts)
        return export(opts)
    opts.continue_training |= restarted() and not opts.test_only
    with join() as world:
        return start(opts, world)


def export(opts: argparse.Namespace) -> dict:
    """`--export`: the checkpoint as an ONNX file. There are no scores."""
    check_target(Path(opts.export), opts.export_opset)
    trained = load_model(opts.ckpt, torch.device("cpu"))
    about = {"model": trained.options["model"], "output_stride": str(trained.options["output_stride"])}
    names = {"class_names": trained.class_names, "palette": trained.palette, "about": about}
    export_onnx(trained.model, Path(opts.export), opset=opts.export_opset, **names)
    return {}


def start(opts: argparse.Namespace, world: World) -> dict:
    """Finds the run, opens what it needs, and trains or tests."""
    device = world.together(lambda: choose_device(opts.device, world))
    amp = world.together(lambda: choose_amp(opts.amp, device))
    opts, run, checkpoint = world.from_first(lambda: (opts, *find_run(opts, processes=world.size)))
    run = run if world.is_first else SilentRun(run.folder)
    processes = f", {world.size} processes" if world.size > 1 else ""
    run.log(f"Device: {device_name(device)}, {str(amp or torch.float32).removeprefix('torch.')}{processes}")

    lists = (run.folder.parent if opts.test_only else run.folder) / "splits"
    transform = crop_val_transform(opts.crop_size) if opts.crop_val else eval_transform()
    val_set = open_data(opts, run, opts.val_split, transform=transform, lists=lists, world=world)
    if checkpoint:
        world.together(lambda: require_classes(checkpoint["class_names"], val_set.class_names, opts.ckpt))
    torch.manual_seed(opts.random_seed)
    model = world.together(lambda: prepare_model(opts, run, val_set.num_classes, checkpoint))
    if world.size > 1 and device.type == "cuda" and not opts.freeze_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)
    if opts.test_only:
        return test(opts, run, model=model, test_set=val_set, amp=amp, world=world)
    return train(opts, run, model=model, val_set=val_set, checkpoint=checkpoint, amp=amp, world=world)


def open_data(
    opts: argparse.Namespace, run: Run, split: str, *, transform: Callable, lists: Path, world: World
) -> SegmentationDataset:
    """A split, with `--skip_bad` without the samples that cannot be used, each of which is logged."""
    dataset = world.together(lambda: open_split(opts, split, transform, lists))
    if opts.skip_bad:
        bad = world.from_first(dataset.bad_samples)
        run.log("\n".join(f"left out: {problem}" for problem in bad.values()))
        run.log(f"{split}: {len(bad)} of {len(dataset)} samples left out (--skip_bad)")
        world.together(lambda: dataset.leave_out(bad))
    return dataset


def prepare_model(opts: argparse.Namespace, run: Run, num_classes: int, checkpoint: dict | None) -> DeepLab:
    """The model with the weights to begin with, on the CPU."""
    model = build_model(
        opts.model,
        num_classes=num_classes,
        output_stride=opts.eval_output_stride or opts.output_stride,  # the weights are the same
        backbone_weights="none" if checkpoint or opts.init_from else opts.backbone_weights,
    )
    model.freeze_bn = opts.freeze_bn
    if checkpoint:
        load_model_state(model, checkpoint, opts.ckpt)
        run.log(f"Model restored from {opts.ckpt}")
        for line in [*checkpoint.get("notes", []), *differences(opts, checkpoint)]:
            run.log(f"  {line}")
    elif opts.init_from:
        run.log("\n".join(init_from(model, opts.init_from)))
    elif opts.freeze_bn:
        run.log("warning: --freeze_bn keeps the head's batch norms at mean 0 and deviation 1: give --ckpt")
    return model


def validate(
    opts: argparse.Namespace,
    run: Run,
    *,
    model: DeepLab,
    loader: DataLoader,
    amp: torch.dtype | None,
    world: World,
    interruption: Interruption | None = None,
) -> dict:
    """Scores a model on the whole of a loader's split, prints the scores and writes them to the run's folder.

    Raises Interrupted between two batches, in all processes.
    """
    dataset = loader.dataset
    writer = ResultWriter(run.folder / "results", dataset) if opts.save_val_results else None
    card = Card(dataset.ids, dataset.num_classes, model.device, also=writer) if opts.test_only else None
    run.log("validation...")

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
    sizes = test_set.sizes()
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


def train(
    opts: argparse.Namespace,
    run: Run,
    *,
    model: DeepLab,
    val_set: SegmentationDataset,
    checkpoint: dict | None,
    amp: torch.dtype | None,
    world: World,
) -> dict:
    """Sets training up, or takes it up again; returns the scores of its last validation."""
    synchronised = any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    part = opts.batch_size // opts.grad_accum // world.size
    if part < opts.batch_size:
        seen = part * (world.size if synchronised else 1)
        if seen < opts.batch_size and not opts.freeze_bn:
            reason = "--grad_accum" if opts.grad_accum > 1 else "it is synchronised between GPUs only"
            run.log(f"Batch normalisation sees {seen} images at a time, not {opts.batch_size} ({reason})")
        if opts.loss_type not in ADDITIVE_LOSSES:
            run.log(f"{opts.loss_type} is of {part} images at a time too; the step has the mean of these losses")
    transform = train_transform(opts.crop_size, seed=opts.random_seed)
    lists = run.folder / "splits"
    train_set = open_data(opts, run, opts.train_split, transform=transform, lists=lists, world=world)
    run.log(f"Dataset: {opts.dataset}, Train set: {len(train_set)}, Val set: {len(val_set)}")
    scaler = torch.amp.GradScaler(model.device.type, enabled=amp is torch.float16)
    optimizer, scheduler = build_optimizer(opts, model, scaled=scaler.is_enabled())
    state = TrainingState(model, optimizer, scheduler, scaler)
    if checkpoint and opts.continue_training:
        state.restore(checkpoint)
        run.log(f"Training state restored from {opts.ckpt}")
        if state.cur_itrs >= opts.total_itrs and state.losses.count:  # trained on since its last validation
            state.validation_due = True
        elif state.cur_itrs >= opts.total_itrs:
            run.log(f"finished: {state.cur_itrs} iterations are done, --total_itrs is {opts.total_itrs}")
            run.log("\n".join([*format_scores(state.scores), *format_class_table(state.scores, val_set.class_names)]))
            return report(run, state)

    criterion = world.together(lambda: choose_criterion(opts, run, train_set=train_set, device=model.device))
    sampled = {"batch_size": opts.batch_size, "seed": opts.random_seed, "share": world.share(opts.batch_size)}
    itrs = {"total_itrs": opts.total_itrs, "start_itr": state.cur_itrs}
    batches = world.together(lambda: TrainBatches(len(train_set), **sampled, **itrs))
    val_batches = SameSizeBatches(val_set.sizes(), opts.val_batch_size, rank=world.rank, processes=world.size)
    loader = make_loader(train_set, batches, num_workers=opts.num_workers, device=model.device)
    val_loader = make_loader(val_set, val_batches, num_workers=opts.num_workers, device=model.device)
    world.together(lambda: run.start(vars(opts), model.device))
    with run.writing():
        run.go_on_from(state.cur_itrs)
        run.keep_splits({opts.train_split: train_set, opts.val_split: val_set})
    enabled = opts.enable_vis and world.is_first
    vis = build_visualizer(enabled, port=opts.vis_port, env=opts.vis_env, warn=run.log)
    vis.table("options", [(name, str(value)) for name, value in vars(opts).items()], header=("option", "value"))
    show_history(vis, run.history())
    with run.writing(), Interruption(run.log) as interruption:
        job = Job(opts, run, state, loader, val_loader, amp=amp, vis=vis, interruption=interruption, world=world)
        try:
            run_training(job, criterion)
        except Interrupted:
            save(job, "latest.pth")
            run.log(f"interrupted at iteration {state.cur_itrs}: the same command with --continue_training goes on")
            raise SystemExit(128 + interruption.signal) from None
        except (SampleError, RuntimeError) as error:
            if not isinstance(error, SampleError) and not is_out_of_memory(error):
                raise
            raise keep_what_there_is(job, error) from None
        except InputError:
            run.discard_unless_validated()
            raise
        finally:
            vis.close()
            end_workers(loader)
            end_workers(val_loader)
        return report(run, state)


@dataclass
class Job:
    """What the parts of a training share."""

    opts: argparse.Namespace
    run: Run
    state: TrainingState
    loader: DataLoader
    val_loader: DataLoader
    _: KW_ONLY
    amp: torch.dtype | None
    vis: Visualizer | SilentVisualizer
    interruption: Interruption
    world: World


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


def run_training(job: Job, criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """The training loop, from `state.cur_itrs` to `--total_itrs`. Raises Interrupted between two iterations."""
    opts, run, state, vis, world = job.opts, job.run, job.state, job.vis, job.world
    model, optimizer, device = state.model, state.optimizer, state.model.device
    itrs_per_epoch = job.loader.batch_sampler.itrs_per_epoch
    val_interval = opts.val_interval or itrs_per_epoch
    forward = world.replicated(model)
    forward = compiled(forward, run.log) if opts.compile else forward
    since_print, clock = RunningMean(), time.perf_counter()
    bar = tqdm(
        job.loader,
        desc="training",
        initial=state.cur_itrs,
        total=opts.total_itrs,
        unit="it",
        dynamic_ncols=True,
        disable=None if world.is_first else True,
    )
    model.train()
    if state.validation_due:  # it was interrupted
        validate_and_keep(job, clock)
    for images, targets in bar:
        job.interruption.check(world)
        model.seed_dropout(opts.random_seed, state.cur_itrs, place=world.share(opts.batch_size).start)
        state.lr = optimizer.param_groups[-1]["lr"]
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        how = {"scaler": state.scaler, "amp": job.amp, "parts": opts.grad_accum, "world": world}
        loss = accumulate(forward, criterion, images=images, targets=targets, **how)
        state.scaler.step(optimizer)
        state.scaler.update()
        state.scheduler.step()
        state.cur_itrs += 1
        since_print.add(loss)
        state.losses.add(loss)

        state.epoch = (state.cur_itrs - 1) // itrs_per_epoch + 1
        if state.cur_itrs % opts.print_interval == 0 or state.cur_itrs == opts.total_itrs:
            require_finite(job, since_print)
            mean, speed = since_print.pop(), (bar.format_dict["rate"] or 0) * opts.batch_size
            bar.set_postfix_str(f"loss={mean:.4f}, lr={state.lr:.2e}, {speed:.1f} images/s")
            run.log(f"Epoch {state.epoch}, Itrs {state.cur_itrs}/{opts.total_itrs}, Loss={mean:.6f}")
            vis.curve("loss", state.cur_itrs, mean, name="training")
            vis.curve("learning rate", state.cur_itrs, state.lr, name="head")
        if state.cur_itrs % val_interval == 0 or state.cur_itrs == opts.total_itrs:
            state.validation_due = True
            validate_and_keep(job, clock)
            clock = time.perf_counter()


def validate_and_keep(job: Job, clock: float) -> None:
    """Validates, adds a row to the history and saves. `clock`: when the training of the row began."""
    opts, run, state = job.opts, job.run, job.state
    require_finite(job, state.losses)  # waits for the device: the clock is read after it
    job.world.average_statistics(state.model)
    trained = time.perf_counter()
    how = {"amp": job.amp, "world": job.world, "interruption": job.interruption}
    state.scores = validate(opts, run, model=state.model, loader=job.val_loader, **how)
    run.add_history(
        state.scores,
        epoch=state.epoch,
        itr=state.cur_itrs,
        loss=state.losses.pop(),
        lr=state.lr,
        train_seconds=trained - clock,
        val_seconds=time.perf_counter() - trained,
        peak_memory_mb=peak_memory_mb(state.model.device),
    )
    state.validation_due = False
    keep(job)
    show_history(job.vis, run.history()[-1:])
    if opts.enable_vis:
        show_samples(job)


def keep(job: Job) -> None:
    """Saves `best.pth` where the mIoU is the best so far, and `latest.pth` after each validation.

    In that order: a kill between the two would otherwise lose the best model. The `latest.pth` that was there
    stays as `latest.prev.pth`.
    """
    state = job.state
    if state.scores["Mean IoU"] > state.best_score:
        state.best_score, state.best_itr = state.scores["Mean IoU"], state.cur_itrs
        job.run.log(f"new best mIoU: {state.best_score:.6f}")
        save(job, "best.pth")
    save(job, "latest.pth")


def save(job: Job, name: str) -> None:
    """Saves the state of training in the run's folder. Raises InputError for weights that are not finite."""
    require_finite(job, job.state.losses)
    job.world.average_statistics(job.state.model)
    if not job.world.is_first:
        return
    path = job.run.folder / name
    job.state.save(path, opts=job.opts, dataset=job.val_loader.dataset, keep_previous=name == "latest.pth")
    job.run.log(f"Model saved as {path}")


def keep_what_there_is(job: Job, error: SampleError | RuntimeError) -> InputError:
    """What to raise where a step cannot be made: the state before it is saved."""
    opts, done, advice = job.opts, job.state.cur_itrs, "mend it, or leave such samples out with --skip_bad"
    if isinstance(error, RuntimeError):
        part = opts.batch_size // opts.grad_accum // job.world.size
        problem = f"the device's memory does not suffice for {part} crops of {opts.crop_size} pixels at a time"
        advice = f"give --grad_accum {2 * opts.grad_accum}" if part % 2 == 0 and part > 2 else "lower --batch_size"
        advice += ", lower --crop_size" + ("" if job.amp else ", or give --amp auto")
    else:
        problem = str(error)
    if not done:
        job.run.discard_unless_validated()
        return InputError(f"{problem}: {advice}")
    if job.world.size > 1:  # the others cannot be asked to take part in a save
        return InputError(f"{problem}: {advice}; --continue_training goes on from latest.pth, if there is one")
    save(job, "latest.pth")
    return InputError(f"{problem}: {advice}; latest.pth is of iteration {done}, and --continue_training goes on")


def show_history(vis: Visualizer | SilentVisualizer, rows: list[dict[str, float]]) -> None:
    """Sends rows of the history to the dashboard: all that there are when a run goes on, then each new one."""
    itrs = [row["itr"] for row in rows]
    for column, name in SCORE_COLUMNS.items():
        vis.curve("validation", itrs, [row[column] for row in rows], name=name)
    vis.curve("loss", itrs, [row["loss"] for row in rows], name="mean since the last validation")


def show_samples(job: Job) -> None:
    """Sends IoU per class, and strips of image | truth | prediction, to the dashboard."""
    state, dataset = job.state, job.val_loader.dataset
    rows = zip(dataset.class_names, state.scores["Class IoU"], strict=True)
    job.vis.table("class IoU", rows, header=("class", "IoU"))
    ids = dataset.ids[: job.opts.vis_num_samples]
    strips = [prediction_strip(state.model, dataset, index, job.amp) for index in range(len(ids))]
    job.vis.images("sample", strips, ids)


def report(run: Run, state: TrainingState) -> dict:
    """Prints the last score and the best; returns the last scores."""
    run.log(f"last score and itr: {state.scores['Mean IoU']:.6f} {state.cur_itrs}")
    run.log(f"best score and itr: {state.best_score:.6f} {state.best_itr}")
    return state.scores


def require_finite(job: Job, losses: RunningMean) -> None:
    """Raises InputError, naming the images, for losses that training cannot come back from."""
    if losses.count and not math.isfinite(losses.mean()):
        last, dataset = job.state.cur_itrs, job.loader.dataset
        batches = job.loader.batch_sampler.between(last - losses.count, last)
        ids = dict.fromkeys(dataset.ids[index] for batch in batches for _, index in batch)
        some = ", ".join(list(ids)[:50]) + (f" and {len(ids) - 50} more" if len(ids) > 50 else "")
        raise job.world.refusal(
            f"the loss is not finite in iterations {last - losses.count + 1} to {last}: lower --lr, warm up "
            f"(--warmup_itrs), or give --amp off; or look at their images: {some}"
        )


if __name__ == "__main__":
    main()
