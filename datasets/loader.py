"""From the command line's data flags to an open split, and from a split to batches."""

import argparse
import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from datasets import build_dataset
from datasets.voc import SegmentationDataset


def open_split(opts: argparse.Namespace, split: str, transform: Callable, lists: Path) -> SegmentationDataset:
    """A split with all its pictures; `lists` holds the split lists of a run on a folder that has none."""
    dataset = build_dataset(
        opts.dataset,
        opts.data_root,
        split,
        transform,
        year=opts.year,
        download=opts.download,
        lists=lists,
        seed=opts.random_seed,
    )
    dataset.require_images()
    return dataset


def make_loader(
    dataset: SegmentationDataset, batches: Sampler, *, num_workers: int, device: torch.device
) -> DataLoader:
    """Batches of uint8 pictures `[B, 3, h, w]`, channels last in memory, and masks `[B, h, w]`, as the sampler
    `batches` composes them."""
    leaving = multiprocessing.Event()
    atexit.register(leaving.set)  # before multiprocessing's own, which ends the workers that are left
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=partial(_leave_signals_to_the_parent, leaving),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own: it must not move the one that dropout draws from
    )


def end_workers(loader: DataLoader) -> None:
    """Ends a loader's workers now. The garbage collector may take their queues first, and then waits five seconds for
    each of them."""
    if loader._iterator is not None:  # torch has no public way
        loader._iterator._shutdown_workers()


def _leave_signals_to_the_parent(leaving: Event, _: int) -> None:
    """A terminal and a scheduler signal all processes of a job; the parent ends its workers once it has saved, and
    at its exit, for which it then waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # Windows has none
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.is_set() else None)


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Samples of one size as a batch whose pixels stay channels last: making planes costs as much as the rest."""
    images, masks = default_collate([(image.permute(1, 2, 0), mask) for image, mask in samples])
    return [images.permute(0, 3, 1, 2), masks]  # [B, 3, h, w] and [B, h, w]
