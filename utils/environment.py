"""Describes what a run was made with: versions, commit, device, command, memory, and how large the model is."""

import functools
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from network import build_model
from utils.distributed import job_id, world_size


# Cached: the commit at the start counts, whatever is committed during the training.
@functools.cache
def environment(device: torch.device) -> dict:
    """Returns what a result depends on beside the options: versions, git commit, device and command."""
    here = Path(__file__).parent
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    versions |= {"torchvision": torchvision.__version__, "pillow": PIL.__version__}
    return {
        "versions": versions,
        "git_commit": commit,
        "device_name": device_name(device),
        "command": command(),
        "job": job_id(),
    }


# Cached: log and card ask for the same model, and building it takes a fraction of a second.
@functools.cache
def model_cost(
    name: str,
    *,
    num_classes: int,
    output_stride: int,
    separable_conv: bool = False,
    height: int = 513,
    width: int = 513,
) -> dict[str, int | float]:
    """Returns the "parameters" of a model of `build_model`, and its "gflops": 10^9 operations for one image.

    A multiplication and an addition are two operations; those of convolutions count. The model is in evaluation mode,
    without speed-ups. Nothing is computed, because the tensors have no memory.
    """
    with torch.device("meta"):
        model = build_model(
            name, num_classes=num_classes, output_stride=output_stride, separable_conv=separable_conv
        ).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, height, width))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "gflops": counter.get_total_flops() / 1e9}


def command() -> str:
    """Returns the command line of this process."""
    return shlex.join([Path(sys.executable).name, *sys.argv])


def device_name(device: torch.device) -> str:
    """Returns the device in words, with the number of processes if there are several."""
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"{torch.get_num_threads()} threads"
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    return f"{device} ({name}){processes}"


def peak_memory_mb(device: torch.device) -> float:
    """Returns the peak memory of tensors on a CUDA device, or of the process on the CPU, in MB; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
