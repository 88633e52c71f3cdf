"""What a training keeps and shows: checkpoints, history, dashboard, and what is left when it has to end."""

import argparse
import math
import time
from dataclasses import KW_ONLY, dataclass
from datetime import datetime

import torch
from torch.utils.data import DataLoader

from utils.checkpoint import TrainingState
from utils.cli import Interruption
from utils.distributed import World
from utils.errors import InputError, SampleError
from utils.evaluation import validate
from utils.metrics import RunningMean
from utils.pictures.plotting import prediction_strip
from utils.run import SCORE_COLUMNS, Run, environment, peak_memory_mb
from utils.visualizer import SilentVisualizer, Visualizer


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


def validate_and_keep(job: Job, clock: float) -> None:
    """Validates, adds a row to the history and saves. `clock`: when the training of the row began."""
    opts, run, state = job.opts, job.run, job.state
    require_finite(job, state.losses)  # waits for the device: the clock is read after it
    job.world.average_statistics(state.model)
    trained = time.perf_counter()
    how = {"amp": job.amp, "world": job.world, "interruption": job.interruption}
    when = f" after iteration {state.cur_itrs}"
    state.scores = validate(opts, run, model=state.model, loader=job.val_loader, when=when, **how)
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
    if opts.enable_vis and job.world.is_first:
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
    if job.world.is_first:
        path, dataset = job.run.folder / name, job.val_loader.dataset
        saved = datetime.now().astimezone().isoformat(" ", "seconds")
        about = {"saved": saved, **environment(job.state.model.device)}
        job.state.save(path, opts=job.opts, dataset=dataset, about=about, keep_previous=name == "latest.pth")
        job.run.log(f"Model saved as {path}")
    job.world.highest(0)  # nobody leaves before it is written: torchrun would end the one that writes


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


def bad_sample(job: Job, error: SampleError) -> InputError:
    """What to raise where a sample cannot be used: the state before that step is saved."""
    done, advice = job.state.cur_itrs, "--skip_bad leaves such samples out"
    if not done:
        job.run.discard_unless_validated()
        return InputError(f"{error}; {advice}")
    if job.world.size > 1:  # the others cannot be asked to take part in a save
        return InputError(f"{error}; {advice}; --continue_training goes on from latest.pth, if there is one")
    save(job, "latest.pth")
    return InputError(f"{error}; {advice}; latest.pth is of iteration {done}, and --continue_training goes on")


def out_of_memory(job: Job) -> InputError:
    """What to raise where a step finds no memory. Nothing is saved: the pass that failed has moved the statistics of
    batch norms."""
    opts = job.opts
    part = opts.batch_size // opts.grad_accum // job.world.size
    job.run.discard_unless_validated()
    advice = f"give --grad_accum {2 * opts.grad_accum}" if part % 2 == 0 and part > 2 else "lower --batch_size"
    advice += ", lower --crop_size" + ("" if job.amp else ", or give --amp auto")
    kept = f"; {kept}" if (kept := job.run.kept()) else ""
    return InputError(
        f"iteration {job.state.cur_itrs + 1}: the device's memory does not suffice for {part} crops of "
        f"{opts.crop_size} pixels at a time: {advice}{kept}"
    )


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
