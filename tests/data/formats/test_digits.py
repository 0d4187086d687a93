"""The embedded digits and their split."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data.formats.digits import CLASSES, digits_of
from data.sources import ArraySource


@pytest.fixture(scope="module")
def digits() -> dict[bool, ArraySource]:
    return {train: digits_of(train=train) for train in (True, False)}


def grey_levels(digits: ArraySource) -> list[bytes]:
    """Return the 64 levels from 0 to 16 of every image."""
    return [
        np.rint(np.asarray(digits.read(i))[..., 0] / 255 * 16).astype(np.uint8).tobytes() for i in range(len(digits))
    ]


def test_sizes(digits: dict[bool, ArraySource]) -> None:
    assert (len(digits[True]), len(digits[False])) == (1437, 360)


def test_splits_are_complete_and_disjoint(digits: dict[bool, ArraySource]) -> None:
    whole = [image.astype(np.uint8).tobytes() for image in load_digits().images]
    assert sorted(grey_levels(digits[True]) + grey_levels(digits[False])) == sorted(whole)
    assert len(set(whole)) == 1797  # duplicates would hide an overlap


def test_each_class_is_split_in_the_same_ratio(digits: dict[bool, ArraySource]) -> None:
    train, held_out = (np.bincount([d.label(i) for i in range(len(d))], minlength=10) for d in digits.values())
    assert len(train) == len(CLASSES) == 10
    assert np.abs(held_out - (train + held_out) / 5).max() < 1


def test_labels_belong_to_their_images(digits: dict[bool, ArraySource]) -> None:
    data = load_digits()
    label = {
        image.astype(np.uint8).tobytes(): int(target) for image, target in zip(data.images, data.target, strict=True)
    }
    for part in digits.values():
        assert [part.label(i) for i in range(len(part))] == [label[levels] for levels in grey_levels(part)]


def test_split_is_fixed(digits: dict[bool, ArraySource]) -> None:
    # Results are compared across machines and versions, so the split is part of the data set.
    sums = [int(np.asarray(digits[False].read(i), dtype=int)[..., 0].sum()) for i in (0, 1, 2, 180, 359)]
    assert sums == [4687, 5483, 4114, 4926, 5961]


def test_images_use_the_whole_range_of_8_bits(digits: dict[bool, ArraySource]) -> None:
    image = digits[True].read(0)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert image.getextrema()[0][0] == 0
    assert max(digits[True].read(i).getextrema()[0][1] for i in range(20)) == 255
