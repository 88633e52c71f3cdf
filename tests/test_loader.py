import pytest
import torch
from torch.utils.data import DataLoader

from datasets import build_dataset
from datasets.loader import SameSizeBatches, TrainBatches
from datasets.transforms import train_transform
from utils.errors import InputError


def batches(**changes):
    arguments = {"batch_size": 3, "seed": 1, "total_itrs": 12} | changes
    return list(TrainBatches(10, **arguments))


def test_an_epoch_takes_each_image_at_most_once_and_drops_the_incomplete_batch():
    first, second = batches()[:3], batches()[3:6]
    for epoch, group in enumerate((first, second)):
        indices = [index for batch in group for e, index in batch if e == epoch]
        assert len(indices) == len(set(indices)) == 9 and set(indices) <= set(range(10))
    assert first != second


def test_order_depends_on_seed_and_epoch_alone():
    assert batches() == batches()
    assert batches(total_itrs=5) == batches()[:5]
    assert batches(seed=2) != batches()


def test_a_stream_that_starts_late_is_the_rest_of_the_whole():
    for start in range(13):
        assert batches(start_itr=start) == batches()[start:]
        assert len(TrainBatches(10, batch_size=3, seed=1, total_itrs=12, start_itr=start)) == 12 - start


def test_a_set_smaller_than_a_batch_is_an_error_with_both_numbers():
    with pytest.raises(InputError, match=r"--batch_size 11: the training set has only 10"):
        TrainBatches(10, batch_size=11, seed=1, total_itrs=5)


def test_same_size_batches_hold_each_image_once_and_one_size_each():
    sizes = [(4, 5), (5, 4), (4, 5), (4, 5), (5, 4), (9, 9)]
    sampler = SameSizeBatches(sizes, 2)
    assert sorted(index for batch in sampler for index in batch) == list(range(6))
    assert all(len({sizes[index] for index in batch}) == 1 and len(batch) <= 2 for batch in sampler)
    assert list(sampler) == list(sampler) == [[0, 2], [3], [1, 4], [5]]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_samples_come_whatever_the_number_of_workers(folder, workers):
    dataset = build_dataset("folder", folder, "train", train_transform(32, seed=5))

    def stream(num_workers):
        sampler = TrainBatches(len(dataset), batch_size=2, seed=5, total_itrs=5)
        torch.manual_seed(num_workers)  # the global generator must not matter
        return list(DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers))

    for (image, mask), (other_image, other_mask) in zip(stream(0), stream(workers), strict=True):
        assert image.dtype == mask.dtype == torch.uint8
        assert image.shape == (2, 3, 32, 32) and mask.shape == (2, 32, 32)
        assert torch.equal(image, other_image) and torch.equal(mask, other_mask)
