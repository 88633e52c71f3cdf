"""From the command line's data flags to an open split, and from a split to batches."""

import argparse
import atexit
import multiprocessing
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from datasets import build_dataset
from datasets.voc import SegmentationDataset
from utils.errors import InputError


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


class TrainBatches(Sampler):
    """The batches of iterations `start_itr` + 1 to `total_itrs`, each a list of (epoch, index).

    One stream runs through all epochs, so that workers live as long as the training and prefetch across
    the border. The order of an epoch depends on (seed, epoch) alone; an incomplete last batch is dropped,
    as batch normalisation would weigh it like a whole one. Raises InputError where not even one fits.
    share: the part of each batch that this process takes; `between` gives whole batches.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        total_itrs: int,
        start_itr: int = 0,
        share: slice = slice(None),
    ) -> None:
        if num_samples < batch_size:
            raise InputError(f"--batch_size {batch_size}: the training set has only {num_samples} images; lower it")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_itr, self.total_itrs, self.share = start_itr, total_itrs, share
        self.itrs_per_epoch = num_samples // batch_size

    def __len__(self) -> int:
        return max(0, self.total_itrs - self.start_itr)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (batch[self.share] for batch in self.between(self.start_itr, self.total_itrs))

    def between(self, done: int, last: int) -> Iterator[list[tuple[int, int]]]:
        """The batches of iterations `done` + 1 to `last`."""
        order_epoch = -1
        for itr in range(done, last):
            epoch, step = divmod(itr, self.itrs_per_epoch)
            if epoch != order_epoch:
                rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
                order, order_epoch = rng.permutation(self.num_samples).tolist(), epoch
            first = step * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size]]


class SameSizeBatches(Sampler):
    """Each sample once, in batches of pictures of one size: native size needs no batch of one that way.

    Of `processes` that share the samples, the one of that `rank` takes every so-manieth batch.
    """

    def __init__(self, sizes: list[tuple[int, int]], batch_size: int, *, rank: int = 0, processes: int = 1) -> None:
        by_size = defaultdict(list)
        for index, size in enumerate(sizes):
            by_size[size].append(index)
        batches = [
            group[first : first + batch_size]
            for group in by_size.values()
            for first in range(0, len(group), batch_size)
        ]
        self.batches = batches[rank::processes]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


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
