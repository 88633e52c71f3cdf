"""Checkpoints: written whole or not at all, read without executing anything."""

import argparse
import os
import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from datasets.voc import SegmentationDataset
from utils.atomic import keep_as, replacing
from utils.errors import InputError
from utils.metrics import RunningMean

KEYS = {"model_state", "optimizer_state", "scheduler_state", "scaler_state", "cur_itrs", "best_score"}
KEYS |= {"best_itr", "scores", "options", "class_names", "palette"}


@dataclass
class TrainingState:
    """All that training changes: what a checkpoint must hold for training to go on as if nothing had been."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    cur_itrs: int = 0
    best_score: float = -1.0  # below any mIoU: the first one is the best so far
    best_itr: int = 0
    scores: dict | None = None  # of the last validation
    losses: RunningMean = field(default_factory=RunningMean)  # since the last validation
    epoch: int = 1
    lr: float = 0.0  # the head's, of the last iteration
    validation_due: bool = False  # the last iteration's validation was begun and not finished

    def save(
        self, path: Path, *, opts: argparse.Namespace, dataset: SegmentationDataset, keep_previous: bool = False
    ) -> None:
        """Call it after both the optimizer's and the scheduler's step, and after the best score is settled.

        Raises InputError for weights that are not finite, which a finite loss does not exclude: the running
        statistics of batch normalisation take no part in it.
        """
        model_state = self.model.state_dict()
        if not torch.stack([value.isfinite().all() for value in model_state.values()]).all():  # one wait
            raise InputError(
                f"{path}: not saved, for the weights are not finite after iteration {self.cur_itrs}; earlier "
                "checkpoints are kept: go on from one with a lower --lr, with --warmup_itrs or with --amp off"
            )
        checkpoint = {
            "model_state": model_state,
            "optimizer_state": self.optimizer.state_dict(),
            "scheduler_state": self.scheduler.state_dict(),
            "scaler_state": self.scaler.state_dict(),
            "cur_itrs": self.cur_itrs,
            "best_score": self.best_score,
            "best_itr": self.best_itr,
            "scores": self.scores,
            "progress": {
                "loss_sum": float(self.losses.total),
                "loss_count": self.losses.count,
                "epoch": self.epoch,
                "lr": self.lr,
                "validation_due": self.validation_due,
            },
            "options": vars(opts),
            "class_names": dataset.class_names,
            "palette": dataset.palette.tolist(),
        }
        save_checkpoint(path, checkpoint, keep_previous=keep_previous)

    def restore(self, checkpoint: dict) -> None:
        """Takes up optimizer, schedule, scaler and scores; the weights are loaded with the model.

        Rates and schedule are the command line's: the schedule is replayed up to the checkpoint's iteration,
        which gives the very rates of a run that was never interrupted, and the new ones if options changed.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the optimizer has not stepped yet
            for _ in range(checkpoint["cur_itrs"]):
                self.scheduler.step()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(checkpoint["optimizer_state"] | {"param_groups": groups})
        if self.scaler.is_enabled() and checkpoint["scaler_state"]:  # empty where training was not in fp16
            self.scaler.load_state_dict(checkpoint["scaler_state"])
        self.cur_itrs, self.scores = checkpoint["cur_itrs"], checkpoint["scores"]
        self.best_score, self.best_itr = checkpoint["best_score"], checkpoint["best_itr"]
        if progress := checkpoint.get("progress"):  # older ones were saved right after a validation
            self.losses.total = torch.tensor(progress["loss_sum"], device=self.model.device)
            self.losses.count, self.epoch = progress["loss_count"], progress["epoch"]
            self.lr, self.validation_due = progress["lr"], progress["validation_due"]


def save_checkpoint(path: Path, checkpoint: dict, *, keep_previous: bool = False) -> None:
    """Writes tensors and builtins to a temporary file beside `path`, then renames it into place.

    `keep_previous`: the checkpoint that it replaces stays, as `previous_of(path)`. Raises OSError, naming `path`.
    """
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # torch ends its zip file even after a write that failed, and fails in that
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        if keep_previous and path.is_file():
            keep_as(path, previous_of(path))


def previous_of(path: Path) -> Path:
    """`latest.prev.pth` of `latest.pth`."""
    return path.with_suffix(".prev.pth")


def load_file(path: Path, flag: str) -> dict:
    """A file that `torch.save` wrote, on the CPU: tensors and builtins only, for other content could be code.

    Raises InputError, naming the flag that gave the file.
    """
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a folder; name the file in it, such as best.pth")
    if not path.is_file():
        raise InputError(f"{flag} {path}: there is no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols: it loads, or it is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{flag} {path}: holds more than tensors and builtins, or is no checkpoint") from None
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{flag} {path}: cannot be read, it may be cut short ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{flag} {path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this project. Raises InputError for a missing, damaged or foreign file."""
    checkpoint = load_file(Path(path), "--ckpt")
    missing = sorted(KEYS - checkpoint.keys())
    if missing:
        raise InputError(f"--ckpt {path}: not a checkpoint of main.py, it lacks {', '.join(missing)}")
    return checkpoint


def load_newest(path: Path) -> tuple[Path, dict, InputError | None]:
    """A checkpoint, or else the one before it, with which of them it is and what is wrong with the first.

    Raises InputError, naming `path`, if neither loads.
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
            raise InputError(f"{error}; nor does {previous} load") from None


def require_classes(theirs: list[str], class_names: list[str], path: str) -> None:
    """Raises InputError, naming both lists, unless the classes of the checkpoint are those of the data set."""
    if theirs != list(class_names):
        raise InputError(
            f"--ckpt {path}: was trained on {len(theirs)} classes ({', '.join(theirs)}), but the data set has "
            f"{len(class_names)} ({', '.join(class_names)}); give the data set that it was trained on"
        )


def load_model_state(model: torch.nn.Module, checkpoint: dict, path: str) -> None:
    """Loads the weights. Raises InputError if they are not this model's."""
    try:
        model.load_state_dict(checkpoint["model_state"])
    except RuntimeError as error:
        raise InputError(f"--ckpt {path}: its weights do not fit the model ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
