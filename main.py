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
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from datasets.loader import SameSizeBatches, TrainBatches, end_workers, make_loader, open_split
from datasets.stats import class_statistics
from datasets.transforms import crop_val_transform, eval_transform, train_transform
from datasets.voc import SegmentationDataset
from network import build_model
from network._deeplab import DeepLab
from utils.checkpoint import TrainingState, init_from, load_checkpoint, load_model_state, require_classes
from utils.cli import Interrupted, Interruption, exit_codes
from utils.distributed import World, is_loss_of_another, join
from utils.engine import choose_amp, choose_device, compiled, forward_backward, is_out_of_memory
from utils.errors import InputError, SampleError
from utils.evaluation import test
from utils.job import (
    Job,
    bad_sample,
    out_of_memory,
    report,
    require_finite,
    save,
    show_history,
    validate_and_keep,
)
from utils.loss import ADDITIVE_LOSSES, build_loss, class_weights
from utils.metrics import RunningMean, format_class_table, format_scores
from utils.optimizer import build_optimizer
from utils.options import ABOUT_THE_DATA, differences, find_run, get_parser, require_fitting, settle_model
from utils.pictures.predict import build_trained
from utils.run import Run, SilentRun, device_name
from utils.visualizer import build_visualizer
from utils.weights.onnx import check_target, export_onnx


@exit_codes
def main(argv: list[str] | None = None) -> dict:
    """Runs a command line; returns the last scores, named as in `utils.metrics.scores`."""
    opts = get_parser().parse_args(argv)
    if opts.export:
        require_fitting(opts)
        return export(opts)
    with join() as world:
        return start(opts, world)


def export(opts: argparse.Namespace) -> dict:
    """`--export`: the checkpoint as an ONNX file. There are no scores."""
    check_target(Path(opts.export), opts.export_opset)
    checkpoint = load_checkpoint(opts.ckpt, model=opts.model)
    settle_model(opts, checkpoint)
    trained = build_trained(checkpoint, opts.ckpt, torch.device("cpu"), output_stride=opts.output_stride)
    about = {"model": opts.model, "output_stride": str(opts.output_stride)}
    names = {"class_names": trained.class_names, "palette": trained.palette, "about": about}
    export_onnx(trained.model, Path(opts.export), opset=opts.export_opset, **names)
    return {}


def start(opts: argparse.Namespace, world: World) -> dict:
    """Finds the run, opens what it needs, and trains or tests."""
    device = world.together(lambda: choose_device(opts.device, world))
    amp = world.together(lambda: choose_amp(opts.amp, device))
    opts, run, checkpoint = world.from_first(lambda: (opts, *find_run(opts, processes=world.size)))
    run = run if world.is_first else SilentRun(run.folder)
    run.log(f"Device: {device_name(device)}, {str(amp or torch.float32).removeprefix('torch.')}")

    lists = (run.folder.parent if opts.test_only else run.folder) / "splits"
    transform = crop_val_transform(opts.crop_size) if opts.crop_val else eval_transform()
    try:
        val_set = open_data(opts, run, opts.val_split, transform=transform, lists=lists, world=world)
    except InputError as error:
        raise InputError(f"{error}{hint_of_data(opts, checkpoint)}") from None
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
    ids = world.from_first(lambda: dataset.ids)
    world.together(lambda: require_ids(dataset, ids))
    if opts.skip_bad:
        bad = world.from_first(dataset.bad_samples)
        for problem in bad.values():
            run.log(f"left out: {problem}")
        run.log(f"{split}: {len(bad)} of {len(dataset)} samples left out (--skip_bad)")
        world.together(lambda: dataset.leave_out(bad))
    return dataset


def hint_of_data(opts: argparse.Namespace, checkpoint: dict | None) -> str:
    """With which data a checkpoint was trained, where these are others."""
    known = {name: checkpoint["options"].get(name) for name in ABOUT_THE_DATA} if checkpoint else {}
    if all(value in (None, getattr(opts, name)) for name, value in known.items()):
        return ""
    flags = " ".join(f"--{name} {value}" for name, value in known.items())
    return f" ({opts.ckpt} was trained with {flags})"


def require_ids(dataset: SegmentationDataset, ids: list[str]) -> None:
    """Raises InputError unless the samples are those of the job's first process, for all share out one list."""
    if dataset.ids != ids:
        raise InputError(
            f"{dataset.folder}: {len(dataset)} samples here, {len(ids)} in the first process, or in another order; "
            "give all machines the same data and lists"
        )


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
        run.log("warning: --freeze_bn keeps batch norms without weights at mean 0 and deviation 1: give --ckpt")
    return model


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
    tell_what_parts_see(opts, run, model, world)
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

    weights = world.from_first(lambda: choose_class_weights(opts, run, train_set))
    known = {"focal_gamma": opts.focal_gamma, "ohem_threshold": opts.ohem_threshold, "ohem_keep": opts.ohem_keep}
    known["class_weights"] = weights.to(model.device) if weights is not None else None
    criterion = world.together(lambda: build_loss(opts.loss_type, **known))
    sampled = {"batch_size": opts.batch_size, "seed": opts.random_seed, "share": world.share(opts.batch_size)}
    itrs = {"total_itrs": opts.total_itrs, "start_itr": state.cur_itrs}
    batches = world.together(lambda: TrainBatches(len(train_set), **sampled, **itrs))
    sizes = world.together(val_set.sizes)
    val_batches = SameSizeBatches(sizes, opts.val_batch_size, rank=world.rank, processes=world.size)
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
        run_to_an_end(job, criterion)
        return report(run, state)


def tell_what_parts_see(opts: argparse.Namespace, run: Run, model: DeepLab, world: World) -> None:
    """Logs what is not of the whole batch where processes, or parts of a step, share it."""
    synchronised = any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    part = opts.batch_size // opts.grad_accum // world.size
    if part < opts.batch_size:
        seen = part * (world.size if synchronised else 1)
        if seen < opts.batch_size and not opts.freeze_bn:
            reason = "--grad_accum" if opts.grad_accum > 1 else "it is synchronised between GPUs only"
            run.log(f"Batch normalisation sees {seen} images at a time, not {opts.batch_size} ({reason})")
        if opts.loss_type not in ADDITIVE_LOSSES:
            run.log(f"{opts.loss_type} is of {part} images at a time too; the step has the mean of these losses")


def run_to_an_end(job: Job, criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Trains; where that cannot go on, leaves what there is in order and says how to."""
    run, state = job.run, job.state
    try:
        run_training(job, criterion)
    except Interrupted:
        save(job, "latest.pth")
        run.log(f"interrupted at iteration {state.cur_itrs}: the same command with --continue_training goes on")
        raise SystemExit(128 + job.interruption.signal) from None
    except SampleError as error:
        raise bad_sample(job, error) from None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory(job) from None
        if is_loss_of_another(error):
            run.discard_unless_validated()
        raise
    except InputError:
        run.discard_unless_validated()
        raise
    finally:
        job.vis.close()
        end_workers(job.loader)
        end_workers(job.val_loader)


def choose_class_weights(opts: argparse.Namespace, run: Run, train_set: SegmentationDataset) -> torch.Tensor | None:
    """`--class_weights`, float32 `[C]`, counted from the training set's masks and logged; None for none."""
    if opts.class_weights == "none":
        return None
    counted = class_statistics(train_set)
    weights = class_weights(opts.class_weights, counted.pixels, counted.image_pixels, images=counted.images)
    pairs = zip(train_set.class_names, weights.tolist(), strict=True)
    run.log(f"Class weights ({opts.class_weights}): {', '.join(f'{name} {weight:.4g}' for name, weight in pairs)}")
    return weights


def run_training(job: Job, criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """The training loop, from `state.cur_itrs` to `--total_itrs`. Raises Interrupted between two iterations."""
    opts, run, state, vis, world = job.opts, job.run, job.state, job.vis, job.world
    model, optimizer, device = state.model, state.optimizer, state.model.device
    itrs_per_epoch = job.loader.batch_sampler.itrs_per_epoch
    val_interval = opts.val_interval or itrs_per_epoch
    if val_interval < 10 < opts.total_itrs:
        run.log(f"Validation is after every {val_interval} iterations: --val_interval makes it rarer")
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
        clock = time.perf_counter()
    for images, targets in bar:
        job.interruption.check(world)
        model.seed_dropout(opts.random_seed, state.cur_itrs, place=world.share(opts.batch_size).start)
        state.lr = optimizer.param_groups[-1]["lr"]
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        how = {"scaler": state.scaler, "amp": job.amp, "parts": opts.grad_accum, "world": world}
        loss = forward_backward(forward, criterion, images=images, targets=targets, **how)
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


if __name__ == "__main__":
    main()
