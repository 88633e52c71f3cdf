"""Checkpoints: written whole or not at all, read without executing anything."""

import argparse
import os
import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from datasets.files import is_file, is_folder
from datasets.voc import SegmentationDataset
from utils.errors import InputError
from utils.files import keep_as, replacing
from utils.metrics import RunningMean
from utils.weights.published import convert, download_torchvision, model_of, unnamed, weights_in

KEYS = {"model_state", "optimizer_state", "scheduler_state", "scaler_state", "cur_itrs", "best_score"}
OURS_ALONE = {"best_itr", "scores", "options", "class_names", "palette"}  # files of others have none of these
KEYS |= OURS_ALONE
KINDS = {"model_state": dict, "optimizer_state": dict, "scheduler_state": dict, "scaler_state": dict, "cur_itrs": int}
KINDS |= {"best_score": (int, float), "best_itr": int, "options": dict, "class_names": list, "palette": list}
COUNTERS = "num_batches_tracked"  # of batch norms: unused where the momentum is set, and older files have none


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
        self,
        path: Path,
        *,
        opts: argparse.Namespace,
        dataset: SegmentationDataset,
        about: dict | None = None,
        keep_previous: bool = False,
    ) -> None:
        """Call it after both the optimizer's and the scheduler's step, and after the best score is settled.

        `about`: when and on what it was made, as `utils.run.environment` and a time.
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
            "about": about or {},
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
    """What is in a file of `torch.save` or in a `.safetensors` file, on the CPU: tensors and builtins only, for other
    content could be code. A float of numpy's, as scores often are, comes as one of Python's.

    Raises InputError, naming the flag that gave the file.
    """
    if is_folder(path):
        raise InputError(f"{flag} {path}: is a folder; name the file in it, such as best.pth")
    if not is_file(path):
        raise InputError(f"{flag} {path}: there is no such file")
    try:
        content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except ImportError:
        raise InputError(f"{flag} {path}: takes the package safetensors; pip install safetensors") from None
    except pickle.UnpicklingError:
        raise InputError(f"{flag} {path}: holds more than tensors and builtins, or is no checkpoint") from None
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{flag} {path}: cannot be read, it may be cut short ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{flag} {path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _load_safetensors(path: Path) -> dict:
    from safetensors.torch import load_file as load  # Segment Anything needs it, the rest does not

    return load(path)


def _load_pickle(path: Path) -> Any:
    scalar = [(_float64, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")]  # numpy 2 and numpy 1
    allowed = torch.serialization.safe_globals([*scalar, np.dtype, type(np.dtype(np.float64))])
    with allowed, warnings.catch_warnings(action="ignore"):  # about pickle protocols: it loads, or it is refused
        return torch.load(path, map_location="cpu", weights_only=True)


def _float64(dtype: np.dtype, content: bytes) -> float:
    """In the place of numpy's own function, which makes scalars of any type."""
    if dtype != np.float64 or len(content) != dtype.itemsize:
        raise pickle.UnpicklingError("no float64")
    return np.frombuffer(content, dtype).item()


def load_checkpoint(path: str | Path, *, flag: str = "--ckpt", model: str | None = None) -> dict:
    """A checkpoint of this project, or a published one as `utils.weights.published` makes it (key `published`).

    path: a file, or the word "torchvision" for its weights of `model` (None: DeepLabV3 ResNet-50), downloaded.
    Raises InputError for a missing or damaged file and for weights that no model here has.
    """
    if str(path) == "torchvision":
        return download_torchvision(model, flag)
    content = load_file(Path(path), flag)
    missing = sorted(KEYS - content.keys())
    if missing and OURS_ALONE & content.keys():
        raise InputError(f"{flag} {path}: not a checkpoint of main.py, it lacks {', '.join(missing)}")
    if missing:
        return convert(content, f"{flag} {path}")
    if odd := [name for name, kind in KINDS.items() if not isinstance(content[name], kind)]:
        raise InputError(f"{flag} {path}: not a checkpoint of main.py, its {odd[0]} is of another kind")
    if lacking := {"model", "output_stride"} - content["options"].keys():
        raise InputError(f"{flag} {path}: not a checkpoint of main.py, its options lack {min(lacking)}")
    return content


def knowledge(checkpoint: dict) -> dict[str, str]:
    """What a checkpoint knows of itself, to be shown: a heading and a text each. Published ones know less."""
    options, scores, names = checkpoint["options"], checkpoint["scores"], checkpoint["class_names"]
    about = checkpoint.get("about", {})  # older ones have none
    facts = {
        "made by": checkpoint.get("published", "main.py"),
        "model": f"{options['model']}, output stride {options['output_stride']}",
        "classes": f"{len(names)}: {', '.join(names)}",
    }
    if scores:
        facts |= {
            "data": f"{options['dataset']} in {options['data_root']}, {options['train_split']}",
            "training": f"{checkpoint['cur_itrs']:,} iterations of {options['batch_size']} crops of "
            f"{options['crop_size']} pixels, {options['loss_type']}, learning rate {options['lr']:g}",
            "scores": f"mIoU {scores['Mean IoU']:.4f}, Overall Acc {scores['Overall Acc']:.4f} "
            f"on {options['val_split']}",
        }
    if about:
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        facts |= {"saved": about["saved"], "device": about["device_name"], "versions": versions}
        facts |= {"commit": about["git_commit"] or "unknown"}
    return facts


def require_training_state(checkpoint: dict, path: str) -> None:
    """Raises InputError for a published checkpoint: training can start from it, not go on."""
    if source := checkpoint.get("published"):
        raise InputError(
            f"--ckpt {path}: has weights alone ({source}), no state of training to go on from; leave "
            "--continue_training out, and training starts from these weights"
        )


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
    """Raises InputError, naming both lists, unless the classes of the checkpoint are those of the data set.

    Of a published checkpoint without names only the number of classes must be the data set's.
    """
    nameless = list(theirs) == unnamed(len(theirs))
    if nameless and len(theirs) == len(class_names):
        return
    if theirs != list(class_names):
        named = "unknown names" if nameless else ", ".join(theirs)
        raise InputError(
            f"--ckpt {path}: was trained on {len(theirs)} classes ({named}), but the data set has "
            f"{len(class_names)} ({', '.join(class_names)}); give the data set that it was trained on, or "
            "train on this one with --init_from"
        )


def load_model_state(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Loads the weights. Raises InputError if they are not this model's."""
    state = weights_in({"model_state": checkpoint["model_state"]}, f"--ckpt {path}")
    if wrong := misfits(model.state_dict(), state):
        name, why = next(iter(wrong.items()))
        raise InputError(
            f"--ckpt {path}: its weights do not fit the model ({name}: {why}; {len(wrong)} such tensors in all)"
        )
    model.load_state_dict(state, strict=False)  # older files lack the counters of batch norms


def misfits(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> dict[str, str]:
    """What is wrong with given weights, by name: of the model's own, absent or of another shape; or unknown to it."""
    wrong = {}
    for name, value in own.items():
        if name not in given:
            wrong |= {} if name.endswith(COUNTERS) else {name: "absent"}
        elif given[name].shape != value.shape:
            wrong[name] = f"shape {list(given[name].shape)} against {list(value.shape)}"
    return wrong | {name: "unknown" for name in given if name not in own}


def init_from(model: nn.Module, path: str | Path) -> list[str]:
    """`--init_from`: loads what fits by name and shape from any checkpoint that `load_checkpoint` reads, whatever its
    classes and its head. The rest stays as it is.

    Returns lines for the log: how much was taken, each tensor that was not and why, how many of the file are unused.
    Raises InputError if nothing of the backbone fits; the model is then as it was.
    """
    own = model.state_dict()
    name = model_of(own)
    of_torchvision = name.replace("deeplabv3plus", "deeplabv3") if name else None  # it has V3 alone
    checkpoint = load_checkpoint(path, flag="--init_from", model=of_torchvision)
    given = weights_in({"model_state": checkpoint["model_state"]}, f"--init_from {path}")
    wrong = misfits(own, given)
    fitting = {name: value for name, value in given.items() if name not in wrong}
    if not any(name.startswith("backbone.") and not name.endswith(COUNTERS) for name in fitting):
        name, why = next(iter(wrong.items()))
        raise InputError(
            f"--init_from {path}: is of {model_of(given) or 'another network'}, and not one tensor fits the backbone "
            f"({name}: {why}); give a checkpoint of the same backbone, or another --model"
        )
    model.load_state_dict(fitting, strict=False)
    at_random = {name: why for name, why in wrong.items() if name in own}
    unused = len(given) - len(fitting)
    return [
        f"{path}: {len(fitting)} of {len(own)} tensors of the model are taken, {unused} of the file's are not used",
        *(note for note in checkpoint.get("notes", []) if note.startswith("left out")),
        *(f"initialised at random: {name} ({why})" for name, why in at_random.items()),
    ]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
