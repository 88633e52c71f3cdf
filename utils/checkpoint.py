"""Saves the state of a training as a whole or not at all, and restores it exactly."""

import argparse
import logging
import math
import os
import time
import warnings
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from datasets.voc import SegmentationDataset
from network._deeplab import DeepLab
from utils.environment import environment
from utils.errors import InputError
from utils.files import copy_atomically, replacing
from utils.metrics import RunningMean
from utils.weights.load import load_checkpoint

log = logging.getLogger("deeplab")


@dataclass
class TrainingState:
    """Everything that training changes: with it a resumed run continues as if it had never stopped."""

    model: DeepLab
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    itrs_per_epoch: int = 1
    warmup_itrs: int = 0  # --patience does not count validations up to there
    itr: int = 0  # iterations done
    validated_itr: int = 0  # the iteration of the last complete validation
    best_score: float = -1.0  # below any mIoU, so the first one is the best so far
    best_itr: int = 0
    since_best: int = 0  # validations without a better mIoU, for --patience
    scores: dict | None = None  # of the last validation
    losses: RunningMean = field(default_factory=RunningMean)  # since the last validation
    loss: float = math.nan  # their mean at the last validation
    val_loss: float = math.nan  # the validation cross-entropy, whatever the training loss
    lr: float = 0.0  # the head's, as used in the last iteration
    clock: float = field(default_factory=time.perf_counter)  # when training since the last validation began

    @property
    def epoch(self) -> int:
        """The epoch of the last iteration, counted from 1."""
        return max(0, self.itr - 1) // self.itrs_per_epoch + 1

    def add_step(self, loss: torch.Tensor, *, lr: float) -> None:
        """Counts a finished iteration and records its loss and the head's learning rate."""
        self.itr, self.lr = self.itr + 1, lr
        self.losses.add(loss)

    def add_validation(self, scores: dict, *, val_loss: float) -> bool:
        """Records the scores of the current model; returns whether its mIoU is the best so far."""
        self.validated_itr, self.scores = self.itr, scores
        self.loss, self.val_loss = self.losses.pop(), val_loss
        is_best = scores["Mean IoU"] > self.best_score
        if is_best:
            self.best_score, self.best_itr = scores["Mean IoU"], self.itr
        self.since_best = 0 if is_best or self.itr <= self.warmup_itrs else self.since_best + 1
        return is_best

    def summary(self, patience: int) -> str:
        """Returns the last and the best score as two lines, and before them one if `--patience` ended the run."""
        lines = []
        if out_of_patience(patience, self.since_best):
            lines = [f"--patience {patience}: ended after {self.since_best} validations without a better mIoU"]
        lines += [f"last score and itr: {self.scores['Mean IoU']:.6f} {self.itr}"]
        return "\n".join([*lines, f"best score and itr: {self.best_score:.6f} {self.best_itr}"])

    def save(
        self, path: Path, *, opts: argparse.Namespace, dataset: SegmentationDataset, keep_previous: bool
    ) -> None:
        """Saves the state; call it after the optimizer's and the scheduler's step, once the best score is settled.

        Raises InputError for weights that are not finite. A finite loss does not rule them out, because it does not
        depend on the running statistics of batch normalisation.
        """
        model_state, device = self.model.state_dict(), self.model.device
        # Stacked, so that the host waits for the device once.
        if not torch.stack([value.isfinite().all() for value in model_state.values()]).all():
            raise InputError(
                f"{path}: not saved, because the weights are not finite after iteration {self.itr}; resume from an "
                "earlier checkpoint with a lower --lr, with --warmup_itrs or with --amp off"
            )
        checkpoint = {
            "model_state": model_state,
            "optimizer_state": self.optimizer.state_dict(),
            "scheduler_state": self.scheduler.state_dict(),
            "scaler_state": self.scaler.state_dict(),
            "cur_itrs": self.itr,
            "best_score": self.best_score,
            "best_itr": self.best_itr,
            "since_best": self.since_best,
            "scores": self.scores,
            "progress": {
                "validated_itr": self.validated_itr,
                "loss_sum": float(self.losses.total),
                "loss_count": self.losses.count,
                "lr": self.lr,
                "seconds": 0.0 if self.validated_itr == self.itr else time.perf_counter() - self.clock,
            },
            "options": vars(opts),
            "class_names": dataset.class_names,
            "palette": dataset.palette.tolist(),
            "normalization": {name: (getattr(self.model, name).flatten() / 255).tolist() for name in ("mean", "std")},
            "about": {"saved": datetime.now().astimezone().isoformat(" ", "seconds"), **environment(device)},
        }
        save_checkpoint(path, checkpoint, keep_previous=keep_previous)

    def restore(self, checkpoint: dict, path: str | Path) -> None:
        """Restores optimizer, schedule, scaler, scores and counters; the weights are loaded with the model.

        Rates and schedule come from the command line: the schedule is replayed up to the checkpoint's iteration. That
        gives exactly the rates of a run that never stopped, or the new ones if the options have changed.
        path: the checkpoint's, for the log.
        """
        with warnings.catch_warnings():
            # It would warn that the optimizer has not stepped yet.
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(checkpoint["cur_itrs"]):
                self.scheduler.step()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(checkpoint["optimizer_state"] | {"param_groups": groups})
        # The scaler's state is empty if training was not in fp16.
        if self.scaler.is_enabled() and checkpoint["scaler_state"]:
            self.scaler.load_state_dict(checkpoint["scaler_state"])
        self.itr, self.scores = checkpoint["cur_itrs"], checkpoint["scores"]
        self.best_score, self.best_itr = checkpoint["best_score"], checkpoint["best_itr"]
        self.since_best = checkpoint.get("since_best", 0)  # older checkpoints have not counted
        # The oldest checkpoints lack "progress".
        progress = checkpoint.get("progress", {"loss_sum": 0.0, "loss_count": 0, "lr": 0.0})
        self.losses.total = torch.tensor(progress["loss_sum"], device=next(self.model.parameters()).device)
        self.losses.count, self.lr = progress["loss_count"], progress["lr"]
        self.clock -= progress.get("seconds", 0.0)
        self.validated_itr = validated_itr(checkpoint)
        log.info(f"Training state restored from {path}")


def out_of_patience(patience: int, since_best: int) -> bool:
    """Whether `--patience` ends a run after this many validations without a better mIoU; 0 never does."""
    return 0 < patience <= since_best


def validated_itr(checkpoint: dict) -> int:
    """Returns the iteration of the last validation before a checkpoint was saved."""
    progress = checkpoint.get("progress", {})
    # Older checkpoints only count the losses since then; the oldest were saved right after a validation.
    return progress.get("validated_itr", checkpoint["cur_itrs"] - progress.get("loss_count", 0))


def require_finite(losses: RunningMean, itr: int, loader: DataLoader) -> None:
    """Raises InputError, naming the images, if the losses of the iterations up to `itr` are not finite.

    Training does not recover from such a loss. Waits for the device.
    """
    if losses.count and not math.isfinite(losses.mean()):
        first, dataset = itr - losses.count, loader.dataset
        batches = loader.batch_sampler.between(first, itr)
        ids = list(dict.fromkeys(dataset.ids[index] for batch in batches for _, index in batch))
        some = ", ".join(ids[:50]) + (f" and {len(ids) - 50} more" if len(ids) > 50 else "")
        raise InputError(
            f"iterations {first + 1} to {itr}: the loss is not finite; lower --lr, warm up (--warmup_itrs) or try "
            f"--amp off, or look at the images: {some}"
        )


def save_checkpoint(path: Path, checkpoint: dict, *, keep_previous: bool = False) -> None:
    """Writes tensors and builtins to a temporary file beside `path`, then renames it.

    keep_previous: the checkpoint that it replaces stays as `previous_of(path)`. Raises InputError, naming `path`, if
    it cannot be written.
    """
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # torch closes its zip file even after a failed write, and fails at that too
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        if keep_previous and path.is_file():
            copy_atomically(path, previous_of(path))


def previous_of(path: Path) -> Path:
    """Returns the path of the checkpoint before: `latest.prev.pth` for `latest.pth`."""
    return path.with_suffix(".prev.pth")


def load_newest(path: Path) -> tuple[Path, dict, InputError | None]:
    """Loads a checkpoint, or else the one before it.

    Returns the path used, the checkpoint, and the error of the first one if it does not load. Raises InputError,
    naming `path`, if neither loads.
    """
    try:
        return path, load_checkpoint(path), None
    except InputError as error:
        previous = previous_of(path)
        if not previous.exists():
            raise
        try:
            return previous, load_checkpoint(previous), error
        except InputError:
            raise InputError(f"{error}; {previous} does not load either") from None
