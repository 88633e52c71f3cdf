import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from datasets.loader import collate
from datasets.transforms import MEAN_COLOUR, crop_val_transform, eval_transform, parse_scales, train_transform
from utils.errors import InputError


def sample(height=60, width=80):
    """An image whose red and green are its row and column, and a mask of quadrants."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows * 2, columns * 2, torch.full_like(rows, 200)]).byte()
    mask = (rows >= height // 2) * 2 + (columns >= width // 2)
    return tv_tensors.Image(image), tv_tensors.Mask(mask.byte())


@pytest.mark.parametrize("size", [(60, 80), (31, 17), (200, 33), (1, 1)])
@pytest.mark.parametrize("crop_size", [33, 64])
def test_training_sample_is_a_uint8_crop_of_the_requested_size(size, crop_size):
    transform = train_transform(crop_size)
    for index in range(20):
        image, mask = transform(*sample(*size), index=index)
        assert image.shape == (3, crop_size, crop_size) and image.dtype == torch.uint8
        assert mask.shape == (crop_size, crop_size) and mask.dtype == torch.uint8


@pytest.mark.parametrize("size", [(60, 80), (200, 33)])
def test_pixels_stay_channels_last_in_memory(size):
    transform = train_transform(64)
    samples = [transform(*sample(*size), index=index) for index in range(20)]
    assert all(image.permute(1, 2, 0).is_contiguous() and mask.is_contiguous() for image, mask in samples)
    images, masks = collate(samples)
    assert images.is_contiguous(memory_format=torch.channels_last) and masks.is_contiguous()
    assert torch.equal(images, torch.stack([image for image, _ in samples]))
    assert torch.equal(masks, torch.stack([mask for _, mask in samples]))


def test_padding_is_void_in_the_mask_and_mean_colour_in_the_image():
    transform = train_transform(128, scale=(0.5, 0.5), flip=0.0)
    image, mask = transform(*sample(60, 80))
    invented = mask == 255
    assert invented.sum() == 128 * 128 - 30 * 40
    assert (image[:, invented] == torch.tensor(MEAN_COLOUR)[:, None]).all()
    assert set(mask.unique().tolist()) == {0, 1, 2, 3, 255}


def test_nothing_is_padded_if_the_image_covers_the_crop():
    transform = train_transform(33, scale=(1.0, 2.0))
    assert not any((transform(*sample(), index=index)[1] == 255).any() for index in range(50))


def test_image_and_mask_stay_aligned():
    image, mask = sample(120, 120)
    transform = train_transform(48)
    for index in range(30):
        crop, target = transform(image, mask, index=index)
        real = target != 255
        # Red and green say which quadrant a pixel came from, to within a pixel of the resized border.
        quadrant = (crop[0] >= 120) * 2 + (crop[1] >= 120) * 1
        clear = ((crop[0].int() - 120).abs() > 6) & ((crop[1].int() - 120).abs() > 6) & real
        assert clear.any() and (quadrant[clear] == target[clear]).all()


@pytest.mark.parametrize("scale", [0.6, 0.75, 1.3, 1.7])
def test_masks_are_not_shifted_against_their_images(scale):
    transform = train_transform(32, scale=(scale, scale), flip=0.0)
    offsets = []
    for index in range(400):
        mask = (torch.arange(101) >= 30 + index % 41).byte().expand(101, 101)  # one vertical edge
        image = (mask * 255).expand(3, 101, 101)
        crop, target = transform(tv_tensors.Image(image), tv_tensors.Mask(mask), index=index)
        if 0 < target[0].sum() < 32:  # the edge is in the crop
            offsets.append(crop[0, 0].float().sum().item() / 255 - target[0].sum().item())
    assert len(offsets) > 50
    assert abs(np.mean(offsets)) < 0.2  # in pixels; rounding down would make it about 0.4


def test_masks_are_never_interpolated():
    mask = tv_tensors.Mask(torch.where(torch.rand(50, 50) < 0.5, 0, 20).byte())
    image = tv_tensors.Image(torch.zeros(3, 50, 50, dtype=torch.uint8))
    seen = {v for index in range(30) for v in train_transform(40)(image, mask, index=index)[1].unique().tolist()}
    assert seen == {0, 20, 255}


def test_sample_depends_on_seed_epoch_and_index_alone():
    transform = train_transform(40, seed=7)
    torch.manual_seed(0)
    first = transform(*sample(), epoch=3, index=5)
    torch.manual_seed(1)
    np.random.seed(1)
    again = transform(*sample(), epoch=3, index=5)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    others = [(3, 6, 7), (4, 5, 7), (3, 5, 8), (5, 3, 7)]
    for epoch, index, seed in others:
        other = train_transform(40, seed=seed)(*sample(), epoch=epoch, index=index)
        assert not torch.equal(first[0], other[0])


def test_color_jitter_changes_colours_within_its_bounds_and_nothing_else():
    image = tv_tensors.Image(torch.full((3, 40, 40), 100, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.arange(1600, dtype=torch.int64).remainder(7).byte().view(40, 40))
    plain_samples = [train_transform(40)(image, mask, index=index) for index in range(50)]
    samples = [train_transform(40, color_jitter=0.4)(image, mask, index=index) for index in range(50)]
    again = train_transform(40, color_jitter=0.4)(image, mask, index=3)
    assert torch.equal(again[0], samples[3][0])
    inner = [sample[0][:, sample[1] != 255].float().mean().item() for sample in samples]
    assert 55 <= min(inner) < 75 and 125 < max(inner) <= 145
    for (pixels, _), (jittered, ids) in zip(plain_samples, samples, strict=True):
        assert torch.equal(jittered[:, ids == 255], pixels[:, ids == 255])  # padding keeps the mean colour


@pytest.mark.parametrize("text", ["1", "0.5,2,3", "2,0.5", "0,1", "a,b", "0.5,nan", "0.01,1", "1,17", ""])
def test_a_range_of_scales_is_two_numbers_in_order(text):
    with pytest.raises(InputError, match="--train_scale"):
        parse_scales(text)


def test_half_of_the_samples_are_flipped():
    image, mask = sample(40, 40)
    transform = train_transform(40, scale=(1.0, 1.0))
    flipped = [bool(transform(image, mask, index=index)[0][1, 0, 0] > 40) for index in range(400)]
    assert 0.42 < np.mean(flipped) < 0.58


def plain(image, mask, rng, crop_size):
    """Scales, pads, crops and flips the whole image: the reference for the fast way."""
    scale = rng.uniform(0.5, 2.0)
    height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
    image = F.resize(image, [height, width], antialias=True)
    mask = F.resize(
        mask.as_subclass(torch.Tensor)[None], [height, width], interpolation=F.InterpolationMode.NEAREST_EXACT
    )[0]
    offsets = []
    for side in (height, width):
        slack = side - crop_size
        offsets.append(int(rng.integers(min(slack, 0), max(slack, 0) + 1)))
    top, left = offsets
    image = F.pad(image, [crop_size] * 4, fill=MEAN_COLOUR)
    mask = F.pad(mask[None], [crop_size] * 4, fill=255)[0]
    box = [top + crop_size, left + crop_size, crop_size, crop_size]
    image, mask = F.crop(image, *box), F.crop(mask, *box)
    if rng.random() < 0.5:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    return image, mask


@pytest.mark.parametrize("crop_size", [33, 65, 129])
def test_window_first_gives_what_scaling_the_whole_image_gives(crop_size):
    image, mask = sample(90, 110)
    transform = train_transform(crop_size, seed=2)
    for index in range(40):
        rng = np.random.default_rng(np.random.SeedSequence(2, spawn_key=(0, index)))
        fast_image, fast_mask = transform(image, mask, index=index)
        slow_image, slow_mask = plain(image, mask, rng, crop_size)
        assert torch.equal(fast_mask == 255, slow_mask == 255)
        # At most one source pixel apart, which is 2 grey levels here; edges blend a little more.
        assert (fast_image.int() - slow_image.int()).abs().float().mean() < 1.5
        assert (fast_mask == slow_mask).float().mean() > 0.93


def test_evaluation_changes_nothing():
    image, mask = sample(37, 41)
    same_image, same_mask = eval_transform()(image, mask, epoch=1, index=2)
    assert torch.equal(image, same_image) and torch.equal(mask, same_mask)


@pytest.mark.parametrize("size", [(60, 80), (80, 60), (31, 17), (200, 33), (33, 33), (1, 1), (1, 7)])
@pytest.mark.parametrize("crop_size", [32, 33])
def test_validation_crop_always_has_the_requested_size(size, crop_size):
    image, mask = crop_val_transform(crop_size)(*sample(*size))
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
    assert isinstance(mask, tv_tensors.Mask) and mask.dtype == torch.uint8
    assert image.shape == (3, crop_size, crop_size) and mask.shape == (crop_size, crop_size)
    assert set(mask.unique().tolist()) <= {0, 1, 2, 3}  # nothing invented


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (41, 57), (101, 133)])
@pytest.mark.parametrize("crop_size", [32, 49, 97])
def test_validation_crop_keeps_image_and_mask_aligned(size, crop_size):
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")
    mask = ((rows >= size[0] // 2) * 2 + (columns >= size[1] // 2)).byte()
    image = torch.stack([(mask >= 2) * 255, (mask % 2) * 255, mask * 0]).byte()
    image, mask = crop_val_transform(crop_size)(tv_tensors.Image(image), tv_tensors.Mask(mask))
    # Red tells the upper half from the lower, green left from right; blended pixels of a border lie in between.
    for channel, half in ((image[0], mask >= 2), (image[1], mask % 2 == 1)):
        sharp = (channel < 64) | (channel > 191)
        assert sharp.float().mean() > 0.8 and torch.equal(channel[sharp] > 127, half[sharp])
        assert abs(channel.float().sum() / 255 - half.sum()) <= 0.51 * crop_size  # within half a pixel of a line
    assert 0.4 < (mask >= 2).float().mean() < 0.6 and 0.4 < (mask % 2 == 1).float().mean() < 0.6  # of the middle


def test_validation_crop_shows_the_whole_shorter_side():
    image, mask = sample(60, 100)
    crop, target = crop_val_transform(60)(image, mask)
    assert torch.equal(crop, image[:, :, 20:80]) and torch.equal(target, mask[:, 20:80])


@pytest.mark.parametrize(
    "arguments", [{"crop_size": 0}, {"crop_size": 9, "scale": (0, 1)}, {"crop_size": 9, "scale": (2, 1)}]
)
def test_impossible_crop_or_scale_is_refused(arguments):
    with pytest.raises(InputError):
        train_transform(**arguments)
    if arguments == {"crop_size": 0}:
        with pytest.raises(InputError, match="--crop_size 0"):
            crop_val_transform(**arguments)
