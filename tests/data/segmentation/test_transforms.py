"""Augmentation: image and mask are transformed together."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.datasets import Draw, PipedCollate
from data.images import StoredImage
from data.segmentation.datasets import MaskedImages, stack
from data.segmentation.sources import IGNORED, MaskedSource
from data.segmentation.transforms import EvalTransform, TrainTransform, resized

PLAIN = {"scale": (0.5, 2.0), "largest_share": 1.0, "hflip": 0.5, "photometric": 0.0}


class Stripes(MaskedSource):
    """Images whose red is ten times the class of the pixel, in stripes of eight pixels."""

    def __len__(self) -> int:
        return 4

    def get(self, index: int) -> StoredImage:
        return StoredImage(np.stack([10 * self.mask(index)] * 3, axis=-1), str(index))

    def mask(self, index: int) -> np.ndarray:
        rows, columns = np.mgrid[: 40 + index, :64]
        return (rows // 8 + columns // 8).astype(np.uint8)


def sample(transform: TrainTransform, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    image, mask = Stripes().pair(0)
    return transform(image, torch.from_numpy(mask))


def test_pixels_and_classes_stay_together() -> None:
    transform, padded = TrainTransform((48, 56), **PLAIN), False
    for seed in range(12):
        image, labels = sample(transform, seed)
        assert image.shape == (3, 48, 56)
        assert labels.shape == (48, 56)
        assert type(image) is type(labels) is Tensor
        known = labels != IGNORED
        padded |= bool((~known).any())
        assert (image[0][~known] == 124).all()
        # Stripes blend where they meet; inside they are ten times their class.
        close = (image[0].int() - 10 * labels.int()).abs()[known] <= 1
        assert close.float().mean() > 0.5
    assert padded


def test_scale_flip_and_distortion_are_drawn() -> None:
    images = [sample(TrainTransform((32, 32), **{**PLAIN, "photometric": 0.5}), seed)[0] for seed in range(4)]
    assert all(not torch.equal(images[0], other) for other in images[1:])
    assert torch.equal(images[0], sample(TrainTransform((32, 32), **{**PLAIN, "photometric": 0.5}), 0)[0])
    kept = {**PLAIN, "scale": (1.0, 1.0)}
    mirrored = sample(TrainTransform((40, 64), **{**kept, "hflip": 1.0}), 0)
    for one, other in zip(mirrored, sample(TrainTransform((40, 64), **{**kept, "hflip": 0.0}), 0), strict=True):
        assert torch.equal(one.flip(-1), other)


def test_classes_are_not_shifted() -> None:
    mask = torch.randint(9, (60, 96), dtype=torch.uint8)
    transform = TrainTransform((20, 32), **{**PLAIN, "scale": (1.0, 1.0), "hflip": 0.0})
    _, labels = transform(Image.new("RGB", (96, 60)), mask)
    assert torch.equal(labels, mask[1::3, 1::3])  # the middle of each three pixels


def distorted(colour: tuple[int, int, int], seed: int) -> Tensor:
    """Return a colour after all distortions, `[3]`; below the image, the crop is padded."""
    transform = TrainTransform((4, 2), **{**PLAIN, "scale": (1.0, 1.0), "photometric": 1.0})
    torch.manual_seed(seed)
    image, labels = transform(Image.new("RGB", (8, 2), colour), torch.zeros(2, 8, dtype=torch.uint8))
    assert (labels[2:] == IGNORED).all()
    assert image[:, 2:].float().mean((1, 2)).tolist() == [124, 116, 104]  # the mean colour is not distorted
    return image[:, 0, 0].float() / 255


def test_hue_changes_by_a_tenth_of_the_circle_and_channels_keep_their_order() -> None:
    hues = [colorsys.rgb_to_hsv(*distorted((160, 60, 60), seed).tolist())[0] for seed in range(60)]
    hues = [(hue + 0.5) % 1 - 0.5 for hue in hues]  # red is 0
    assert 0.07 < max(hues) < 0.11
    assert -0.11 < min(hues) < -0.07


def test_brightness_is_added_and_contrast_multiplied() -> None:
    black, grey = (torch.stack([distorted((level,) * 3, seed) for seed in range(60)]) * 255 for level in (0, 100))
    assert 24 < black.max() <= 48  # of at most 32, times 1.5
    assert 34 <= grey.min() < 50
    assert 150 < grey.max() <= 198


def test_a_crop_of_mostly_one_class_is_drawn_again() -> None:
    image = Image.new("RGB", (80, 20))
    mask = torch.zeros(20, 80, dtype=torch.uint8)
    mask[:, :10] = 1

    def shares(largest: float) -> list[float]:
        transform = TrainTransform((20, 20), **{**PLAIN, "scale": (1.0, 1.0), "largest_share": largest})
        torch.manual_seed(0)
        return [transform(image, mask)[1].float().mean().item() for _ in range(40)]

    mixed = [sum(0.25 < share < 0.75 for share in shares(largest)) for largest in (1.0, 0.75)]
    assert mixed[1] > mixed[0] + 3


@pytest.mark.parametrize(
    ("size", "short", "expected"), [((480, 640), 512, [512, 683]), ((100, 900), 512, [228, 2048]), ((3, 3), 1, [1, 1])]
)
def test_short_side_is_limited_by_the_long_side(size: tuple[int, int], short: int, expected: list[int]) -> None:
    assert resized(size, short) == expected


def test_held_out_masks_are_unchanged() -> None:
    image, mask = Stripes().pair(1)
    (pixels,), labels = EvalTransform((32, 64))(image, torch.from_numpy(mask))
    assert pixels.shape == (3, 32, round(64 * 32 / 41))
    assert np.array_equal(labels, mask)


def test_each_scale_is_resized_from_the_stored_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    transform = EvalTransform((20, 30), (0.01, 1.0, 2.0))
    views, _ = transform(Image.fromarray(noise), torch.zeros(40, 50))
    assert [tuple(view.shape) for view in views] == [(3, 1, 1), (3, 20, 25), (3, 40, 50)]
    assert np.array_equal(views[1], transform.apply(Image.fromarray(noise)))
    assert np.array_equal(views[2].permute(1, 2, 0), noise)


def test_samples_depend_on_seed_and_draw_alone_and_batches_go_through_pipes() -> None:
    images = MaskedImages(Stripes(), TrainTransform((32, 32), **PLAIN), seed=3, on_unreadable="raise")
    draws = [Draw(index, 1) for index in (2, 0)]
    batch = stack(images.__getitems__(draws))
    torch.manual_seed(5)
    again = stack([images[draw] for draw in draws])
    assert torch.equal(batch.images, again.images)
    assert torch.equal(batch.labels, again.labels)
    rebuild, arguments = PipedCollate(stack)(images.__getitems__(draws)).__reduce__()
    assert torch.equal(rebuild(*arguments).images, batch.images)
