"""Opens the splits that the command line names, and turns them into batches."""

import argparse
import atexit
import logging
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
from datasets.transforms import crop_val_transform, eval_transform, parse_scales, train_transform
from datasets.voc import SegmentationDataset
from utils.errors import InputError

DATA_FLAGS = ("dataset", "data_root", "year")
log = logging.getLogger("deeplab")


def open_train_set(opts: argparse.Namespace, checkpoint: dict | None, lists: Path) -> SegmentationDataset:
    """Opens `--train_split` for training: random crops. For the arguments see `open_split`."""
    scale = parse_scales(opts.train_scale)
    transform = train_transform(opts.crop_size, scale=scale, color_jitter=opts.color_jitter, seed=opts.random_seed)
    return open_split(opts, opts.train_split, transform, checkpoint=checkpoint, lists=lists)


def open_eval_set(opts: argparse.Namespace, checkpoint: dict | None, lists: Path) -> SegmentationDataset:
    """Opens `--val_split` for evaluation: whole images, or centre crops with `--crop_val`."""
    transform = crop_val_transform(opts.crop_size) if opts.crop_val else eval_transform()
    dataset = open_split(opts, opts.val_split, transform, checkpoint=checkpoint, lists=lists)
    if opts.dataset == "folder":
        log.info(f"{dataset.layout}; splits: {dataset.splits.source}")
    return dataset


def open_split(
    opts: argparse.Namespace, split: str, transform: Callable, *, checkpoint: dict | None, lists: Path
) -> SegmentationDataset:
    """Opens a split with all its images, or with `--skip_bad` without the samples that cannot be used.

    checkpoint: the one that training resumes from or a test evaluates. lists: the folder with the split lists that
    its run has kept, for a data folder that has none. Raises InputError for data that cannot be used.
    """
    continued = checkpoint is not None and (opts.test_only or opts.continue_training)
    try:
        dataset = build_dataset(
            opts.dataset,
            opts.data_root,
            split,
            transform,
            year=opts.year,
            download=opts.download,
            named=(opts.train_split, opts.val_split),
            lists=lists if continued else None,
            seed=opts.random_seed,
        )
        dataset.require_masks()
        dataset.require_images()
    except InputError as error:
        raise InputError(f"{error}{_hint(opts, checkpoint)}") from None
    if opts.skip_bad:
        bad = dataset.bad_samples()
        for problem in bad.values():
            log.info(f"left out: {problem}")
        log.info(f"{split}: {len(bad)} of {len(dataset)} samples left out (--skip_bad)")
        dataset.leave_out(bad)
    return dataset


def _hint(opts: argparse.Namespace, checkpoint: dict | None) -> str:
    """Says which data a checkpoint was trained on, if the flags name others."""
    known = {name: checkpoint["options"].get(name) for name in DATA_FLAGS} if checkpoint else {}
    if all(value in (None, getattr(opts, name)) for name, value in known.items()):
        return ""
    flags = " ".join(f"--{name} {value}" for name, value in known.items())
    return f" ({opts.ckpt} was trained with {flags})"


def train_loader(
    opts: argparse.Namespace,
    dataset: SegmentationDataset,
    device: torch.device,
    *,
    start_itr: int,
    rank: int,
    processes: int,
) -> DataLoader:
    """Loads this process's share of the batches of iterations `start_itr` + 1 to `--total_itrs`."""
    batches = TrainBatches(
        len(dataset),
        batch_size=opts.batch_size,
        seed=opts.random_seed,
        total_itrs=opts.total_itrs,
        start_itr=start_itr,
        rank=rank,
        processes=processes,
    )
    val_interval = opts.val_interval or batches.itrs_per_epoch
    if val_interval < 10 < opts.total_itrs:
        log.info(f"Validating after every {val_interval} iterations; pass --val_interval to validate less often")
    return make_loader(dataset, batches, num_workers=opts.num_workers, device=device)


def eval_loader(
    opts: argparse.Namespace, dataset: SegmentationDataset, device: torch.device, *, rank: int, processes: int
) -> DataLoader:
    """Loads this process's share of a split, each image once, in batches of `--val_batch_size` images of one size."""
    sizes = dataset.sizes()
    if opts.crop_val:
        log.info(f"Centre crops of {opts.crop_size}: these scores are not comparable with those of whole images")
        sizes = [(opts.crop_size, opts.crop_size)] * len(dataset)
    batches = SameSizeBatches(sizes, opts.val_batch_size, rank=rank, processes=processes)
    return make_loader(dataset, batches, num_workers=opts.num_workers, device=device)


class TrainBatches(Sampler):
    """Yields the batches of iterations `start_itr` + 1 to `total_itrs`, each a list of (epoch, index).

    One stream runs through all epochs, so that workers live as long as the training and prefetch across epochs. The
    order of an epoch depends on (seed, epoch) alone. An incomplete last batch is dropped, because batch normalisation
    would give it the weight of a full one. Raises InputError if the set is smaller than a batch.
    Each of `processes` processes takes an equal part of every batch, chosen by its `rank`. `between` yields whole
    batches.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        total_itrs: int,
        start_itr: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if num_samples < batch_size:
            raise InputError(f"--batch_size {batch_size}: the training set has only {num_samples} images; lower it")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_itr, self.total_itrs = start_itr, total_itrs
        part = batch_size // processes
        self.share = slice(rank * part, (rank + 1) * part)
        self.itrs_per_epoch = num_samples // batch_size

    def __len__(self) -> int:
        return max(0, self.total_itrs - self.start_itr)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (batch[self.share] for batch in self.between(self.start_itr, self.total_itrs))

    def between(self, done: int, last: int) -> Iterator[list[tuple[int, int]]]:
        """Yields the whole batches of iterations `done` + 1 to `last`."""
        order_epoch = -1
        for itr in range(done, last):
            epoch, step = divmod(itr, self.itrs_per_epoch)
            if epoch != order_epoch:
                rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
                order, order_epoch = rng.permutation(self.num_samples).tolist(), epoch
            first = step * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size]]


class SameSizeBatches(Sampler):
    """Yields each sample once, in batches of images of one size, so that native size does not force batches of one.

    Each process takes every `processes`-th batch, starting at its `rank`.
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
    """Loads the batches that the sampler `batches` composes.

    A batch is images uint8 `[B, 3, h, w]`, channels last in memory, and masks uint8 `[B, h, w]`.
    """
    exiting = multiprocessing.Event()
    # Registered last, so it runs before multiprocessing's own handler, which terminates the remaining workers.
    atexit.register(exiting.set)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=partial(_leave_signals_to_the_parent, exiting),
        pin_memory=device.type == "cuda",
        # Its own generator, so that it does not advance the one that dropout draws from.
        generator=torch.Generator(),
    )


def end_workers(*loaders: DataLoader) -> None:
    """Ends the workers of loaders now. If the garbage collector ends them, each may take five seconds."""
    for loader in loaders:
        # torch has no public way.
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


def _leave_signals_to_the_parent(exiting: Event, _: int) -> None:
    """Makes a worker ignore the signals that a terminal or a scheduler sends to every process of a job.

    The parent ends its workers itself once it has saved. When it exits, it sends them SIGTERM and waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # Windows has none
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if exiting.is_set() else None)


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Stacks samples of one size. Pixels stay channels last: converting to planes would double the time."""
    images, masks = default_collate([(image.permute(1, 2, 0), mask) for image, mask in samples])
    return [images.permute(0, 3, 1, 2), masks]  # [B, 3, h, w] and [B, h, w]
