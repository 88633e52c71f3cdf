"""Which samples make which batch.

Everything is a function of its arguments: not of the worker count, nor of an interruption.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from utils.errors import InputError


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
