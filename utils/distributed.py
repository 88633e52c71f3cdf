"""Trains in several processes as in one: one per GPU, started by torchrun.

    torchrun --nproc_per_node 4 main.py --batch_size 16 ...     # 16 images per step over all processes

Each process takes its share of every batch, and all have the same weights after each step. Neither a batch nor its
loss depends on how many processes share it. With a single process every function here is a no-op.
"""

import contextlib
import inspect
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from datasets.voc import SegmentationDataset
from network._deeplab import DeepLab
from utils.cli import error_line
from utils.errors import InputError

Value = TypeVar("Value")
START_TIMEOUT = timedelta(minutes=10)  # for processes that have not started yet
TURN_TIMEOUT = timedelta(hours=2)  # for one process that downloads or checks all files while the others wait
REPORT_SECONDS = 5.0  # for the first process that failed to print its error
log = logging.getLogger("deeplab")


def rank() -> int:
    """Returns this process's number among all, 0 for the main process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Returns this process's number on its machine, which is also the index of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes and logs."""
    return rank() == 0


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the processes, in place, on its own device."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_max(value: int) -> int:
    """Returns the highest value of any process. The host waits for the other hosts, not for the devices."""
    if not dist.is_initialized():
        return value
    # On the CPU: it goes through gloo, alongside whatever a GPU computes.
    shared = torch.tensor(value)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def barrier() -> None:
    """Waits until every process has reached this point."""
    all_max(0)


def all_gather(value: Value) -> list[Value]:
    """Returns the values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def from_main(value: Value) -> Value:
    """Returns the main process's value, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Lets the first process of each machine run the block before the others.

    The others then find what it has downloaded or generated.
    """
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def require_same_ids(*datasets: SegmentationDataset) -> None:
    """Raises InputError unless each data set has the main process's samples: all processes share one list."""
    for dataset in datasets:
        ids = from_main(dataset.ids)
        if dataset.ids != ids:
            raise InputError(
                f"{dataset.folder}: {len(dataset.ids)} samples here, {len(ids)} in the main process, or in another "
                "order; give all machines the same data and lists"
            )


def parallel(model: DeepLab) -> nn.Module:
    """Wraps a model so that its backward pass averages gradients over the processes.

    All processes start with the main process's weights. On GPUs batch norms are synchronised, in place, unless the
    model freezes them.
    """
    if not dist.is_initialized():
        return model
    on_gpu = next(model.parameters()).device.type == "cuda"
    if on_gpu and not model.freeze_bn:
        from timm.layers import convert_sync_batchnorm  # torch's would lose the activations inside timm's batch norms

        convert_sync_batchnorm(model)
    devices = [local_rank()] if on_gpu else None
    # `broadcast_buffers` copies the buffers when they matter. This flag has another name in older versions.
    known = inspect.signature(DistributedDataParallel).parameters
    exchange = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **{exchange: False})


def broadcast_buffers(model: nn.Module) -> None:
    """Copies the main process's batch-norm statistics to all processes, so that all evaluate the model it saves."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process no longer answers."""
    text = str(error)
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text)


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Joins the processes that torchrun started, and leaves them at the end.

    An error that reaches it ends this process: the first process that fails prints its error, the others, which lose
    a peer, leave silently. Raises InputError for an environment that torchrun did not make.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        yield
        return
    store, stop = _join(), None
    if not is_main():
        log.setLevel(logging.CRITICAL + 1)
    try:
        try:
            yield
        except SystemExit as error:
            # Above 128 it is a signal that all processes have agreed on.
            if not error.code or error.code <= 128:
                raise
            stop = error
        # torchrun ends the others as soon as one leaves, so all wait until the main process has written.
        barrier()
    except SystemExit:
        raise
    except BaseException as error:
        raise SystemExit(_report(error, store)) from None
    finally:
        dist.destroy_process_group()
    if stop is not None:
        raise stop


def _join() -> dist.Store:
    """Initialises the process group; returns the part of the store that belongs to this attempt."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE: is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with torchrun, "
            "or unset WORLD_SIZE"
        )
    try:
        own_rank, size, _ = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE, LOCAL_RANK: not numbers ({error}); start with torchrun") from None
    try:
        store = store_of_attempt(next(rendezvous("env://", timeout=START_TIMEOUT))[0], own_rank, size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=TURN_TIMEOUT)
    except (dist.DistError, RuntimeError, ValueError, TimeoutError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise InputError(
            f"{place}: the other processes cannot be reached there ({reason}); start all of them with torchrun"
        ) from None
    return store


def store_of_attempt(store: dist.Store, own_rank: int, size: int) -> dist.Store:
    """Returns a part of torchrun's store that this attempt of the job does not share with earlier ones.

    After a restart by torchrun the store still holds the addresses of the dead processes, and reading one of them
    blocks (PyTorch #135712). So each process writes a new name, and the main process publishes the list of names
    until all have answered it. The main process's name then becomes that of the attempt.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + START_TIMEOUT.total_seconds()
    store.set(f"name of {own_rank}", name)
    others = range(1, size)
    names = []
    while time.monotonic() < deadline:
        if own_rank == 0:
            names = [name, *(store.get(f"name of {other}").decode() for other in others)]
            store.set("names", " ".join(names))
            if store.check([f"{other} answers {name}" for other in others]):
                break
        elif name in (names := store.get("names").decode().split()):
            store.set(f"{own_rank} answers {names[0]}", "")
            break
        time.sleep(0.02)
    else:
        raise TimeoutError(f"not all of {size} processes have started")
    return dist.PrefixStore(names[0], store)


def _report(error: BaseException, store: dist.Store) -> int:
    """Prints an error if this process is the first that failed; returns the exit code of this process."""
    if threading.current_thread() is threading.main_thread():
        # torchrun ends the others as soon as one has left.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line, code = error_line(error) or ("".join(traceback.format_exception(error)).rstrip(), 1)
    lost = is_lost_process(error)
    try:
        if not lost and store.add("failed", 1) == 1:
            print(line, file=sys.stderr, flush=True)
            store.set("reported", "")
            return code
        deadline = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < deadline:
            if store.check(["reported"]):
                return 1 if lost else code
            time.sleep(0.05)
        if store.add("lost", 1) != 1:
            return 1
    except (dist.DistError, RuntimeError):
        pass  # the store is gone with the process that held it
    if lost:
        line = (
            f"{sys.argv[0]}: process {rank()} of {world_size()} ends because another process is gone or cannot be "
            f"reached ({' '.join(str(error).split())[:300]}); if that one had an error of its own, it is above. "
            "Add --continue_training to resume from latest.pth, if there is one"
        )
    print(line, file=sys.stderr, flush=True)
    return 1 if lost else code


def restarted() -> bool:
    """Whether torchrun (`--max-restarts`) has restarted this process after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def job_id() -> str:
    """Returns an identifier of this torchrun job, the same for all its restarts; empty without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run} {socket.gethostname()} {os.getppid()}" if run else ""
