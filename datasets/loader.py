"""From the command line's data flags to an open split, and from a split to batches."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler

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
    """Batches of uint8 pictures `[B, 3, h, w]` and masks `[B, h, w]`, as the sampler `batches` composes them."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own: it must not move the one that dropout draws from
    )
