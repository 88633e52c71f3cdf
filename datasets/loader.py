"""From the command line's data flags to an open split, and from a split to batches."""

import argparse
import signal
from collections.abc import Callable
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
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own: it must not move the one that dropout draws from
    )


def _leave_signals_to_the_parent(_: int) -> None:
    """A terminal and a scheduler signal all processes of a job; the parent ends its workers once it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Samples of one size as a batch whose pixels stay channels last: making planes costs as much as the rest."""
    images, masks = default_collate([(image.permute(1, 2, 0), mask) for image, mask in samples])
    return [images.permute(0, 3, 1, 2), masks]  # [B, 3, h, w] and [B, h, w]
