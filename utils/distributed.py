"""Several processes that train as one, started by torchrun, one a GPU.

    torchrun --nproc_per_node 4 main.py --batch_size 16 ...     # 16 images a step in all

Each takes its part of every batch, and after each step all hold the same weights. A batch is the same however many
share it, and so is a loss: it divides by the labelled pixels of the whole batch. On one process all of it is nothing.
"""

import contextlib
import inspect
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from network._deeplab import DeepLab
from utils.errors import InputError

Result = TypeVar("Result")
PATIENCE = timedelta(minutes=10)  # with processes that are still to come
LONGEST_TURN = timedelta(hours=2)  # that one process may take, to download or to look at all files, while others wait


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is: `rank` of `size` in all, `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def share(self, number: int) -> slice:
        """This process's part of `number` images, which `size` divides."""
        part = number // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place, on the value's own device."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def highest(self, value: int) -> int:
        """The highest value of any process. The host waits for the others, not for the devices."""
        if self.size == 1:
            return value
        shared = torch.tensor(value)  # on the CPU: through gloo, beside whatever a GPU computes
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[[], Result]) -> Result:
        """What the function gives in the first process, in all. Where it raises InputError, all end."""
        result = self._agreed(function if self.is_first else None)
        if self.size > 1:
            box = [result]
            dist.broadcast_object_list(box)
            (result,) = box
        return result

    def together(self, function: Callable[[], Result]) -> Result:
        """What the function gives in each process; the first of each machine goes ahead, so that the others find
        there what it downloads or generates. Where one raises InputError, all end."""
        ahead = self.local_rank == 0
        result = self._agreed(function if ahead else None)
        if self.size > 1:
            later = self._agreed(None if ahead else function)
            result = result if ahead else later
        return result

    def _agreed(self, function: Callable[[], Result] | None) -> Result | None:
        """Runs it, if it is for this process; then all go on, or none. See `refusal`."""
        if self.size == 1:
            return function()
        result, message = None, None
        try:
            result = function() if function else None
        except InputError as error:
            message = str(error)
        message = next((text for text in self.gather(message) if text is not None), None)
        if message is not None:
            raise self.refusal(message)
        return result

    def refusal(self, message: str) -> InputError | SystemExit:
        """What to raise for bad input that all processes found: one line is enough, the first one's."""
        return InputError(message) if self.is_first else SystemExit(2)

    def replicated(self, model: DeepLab) -> nn.Module:
        """The model's forward pass, whose backward pass averages the gradients over the processes. The weights become
        those of the first process."""
        if self.size == 1:
            return model
        devices = [model.device] if model.device.type == "cuda" else None
        # Statistics are the same everywhere under SyncBN, and averaged by `average_statistics` without.
        known = inspect.signature(DistributedDataParallel).parameters
        exchange = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # older torch
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **{exchange: False})

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Gives batch norms that are not synchronised the mean of the processes' running statistics, which is what
        each keeps a running mean of."""
        if self.size > 1:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d) and module.training:
                    self.sum(module.running_mean).div_(self.size)
                    self.sum(module.running_var).div_(self.size)


ALONE = World()


@contextlib.contextmanager
def join() -> Iterator[World]:
    """Joins the processes that torchrun started, if it did; leaves them at the end.

    Raises InputError for an environment that is not torchrun's; ends with exit code 1 where another process is gone.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        yield ALONE
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start with torchrun, "
            "or unset WORLD_SIZE"
        )
    try:
        world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE, LOCAL_RANK: not numbers ({error}); start with torchrun") from None
    try:
        store = attempt_of(world, next(rendezvous("env://", timeout=PATIENCE))[0])
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group = {"rank": world.rank, "world_size": world.size, "timeout": LONGEST_TURN}
        dist.init_process_group(backend, store=store, **group)
    except (dist.DistError, RuntimeError, ValueError, TimeoutError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise InputError(
            f"the other processes cannot be reached at {place} ({reason}); start all with torchrun"
        ) from None
    try:
        yield world
    except RuntimeError as error:
        if not is_loss_of_another(error):
            raise
        reason = " ".join(str(error).split())[:300]
        print(
            f"{sys.argv[0]}: process {world.rank} of {world.size} ends, for another one of this job is gone or "
            f"cannot be reached ({reason}); if one had an error of its own, it is above. The same command with "
            "--continue_training goes on from latest.pth, if there is one",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()


def attempt_of(world: World, store: dist.Store) -> dist.Store:
    """The part of torchrun's store that this attempt of the job has for itself.

    When torchrun starts all processes anew, the store still holds the addresses of those that are gone, and who reads
    one of them waits in vain (PyTorch #135712). So each process leaves a name that is new, the first one calls a
    roll of the names until all have answered, and the attempt goes by the first one's name.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + PATIENCE.total_seconds()
    store.set(f"name of {world.rank}", name)
    others = range(1, world.size)
    roll = []
    while time.monotonic() < deadline:
        if world.is_first:
            roll = [name, *(store.get(f"name of {rank}").decode() for rank in others)]
            store.set("roll", " ".join(roll))
            if store.check([f"{rank} answers {name}" for rank in others]):
                break
        elif name in (roll := store.get("roll").decode().split()):
            store.set(f"{world.rank} answers {roll[0]}", "")
            break
        time.sleep(0.02)
    else:
        raise TimeoutError(f"not all of {world.size} came")
    return dist.PrefixStore(roll[0], store)


def is_loss_of_another(error: RuntimeError) -> bool:
    """Whether an error says that a process which this one waited for does not answer."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


def restarted() -> bool:
    """Whether torchrun (`--max-restarts`) started this process anew after a fault."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def job_id() -> str:
    """What tells the job of a torchrun from others, the same for all its restarts; empty without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run} {socket.gethostname()} {os.getppid()}" if run else ""
