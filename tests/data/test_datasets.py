"""Augmentation as a function of seed, epoch and index; handling of unreadable images."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from data.datasets import MAX_SUBSTITUTES, Batch, TransformedImages, collate
from data.images import StoredImage, UnreadableImage
from data.samplers import Draw
from data.sources import ImageSource
from tests.data.samples import photograph


class Source(ImageSource):
    """Images that all look alike; the label of each is its index, and those in `bad` cannot be read."""

    def __init__(self, length: int = 20, bad: frozenset[int] = frozenset()) -> None:
        self.labels = np.arange(length)
        self.bad = bad
        self.tried: list[int] = []

    def get(self, index: int) -> StoredImage:
        self.tried.append(index)
        if index in self.bad:
            raise UnreadableImage(f"cannot read image '{index}.jpg': broken", f"{index}.jpg")
        return StoredImage(np.asarray(photograph()), f"{index}.jpg")


def three_generators(stored: StoredImage) -> np.ndarray:
    """Transform an image to one number of each global generator, beside one of its pixels."""
    drawn = [random.randrange(256), np.random.randint(256), int(torch.randint(256, ()))]  # noqa: NPY002
    return np.array([[drawn, stored.data[0, 0].tolist()]], dtype=np.uint8)


def dataset(bad: frozenset[int] = frozenset(), on_unreadable: str = "substitute", seed: int = 5) -> TransformedImages:
    return TransformedImages(Source(bad=bad), three_generators, seed=seed, on_unreadable=on_unreadable)


def test_augmentation_depends_on_seed_epoch_and_index() -> None:
    images = dataset()
    reference = images[Draw(3, 1)].pixels
    assert np.array_equal(images[Draw(3, 1)].pixels, reference)
    assert np.array_equal(images.__getitems__([Draw(7, 1), Draw(3, 1)])[1].pixels, reference)
    for other in (dataset(seed=6)[Draw(3, 1)], images[Draw(3, 2)], images[Draw(4, 1)], images[Draw(1, 3)]):
        assert (other.pixels[0, 0] != reference[0, 0]).any()


def test_generators_of_the_caller_are_not_disturbed() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    stored = Source().get(0)
    expected = three_generators(stored)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    dataset().__getitems__([Draw(0, 0), Draw(1, 0)])
    dataset()[Draw(2, 0)]
    assert np.array_equal(three_generators(stored), expected)


def test_unreadable_image_is_raised() -> None:
    images = dataset(frozenset({3}), "raise")
    assert images[Draw(2, 0)].target == 2
    with pytest.raises(UnreadableImage, match=r"cannot read image '3\.jpg': broken"):
        images[Draw(3, 0)]


def test_substitutes_depend_on_the_draw_alone() -> None:
    images = dataset(frozenset({3, 4, 5}))
    draws = [Draw(index, epoch) for index in (3, 4) for epoch in range(30)]
    targets = [images[draw].target for draw in draws]
    assert targets == [images[draw].target for draw in draws]
    assert not set(targets) & {3, 4, 5}
    assert len(set(targets)) > 10
    assert targets[:30] != targets[30:]
    assert images[Draw(3, 0)].unreadable[0] == "3.jpg"
    augmented_as = dataset()[Draw(3, 0)].pixels  # as the image would have been
    assert np.array_equal(images[Draw(3, 0)].pixels, augmented_as)


@pytest.mark.parametrize("length", [2, 4, 11])
def test_no_image_is_tried_twice(length: int) -> None:
    for epoch in range(20):
        source = Source(length, bad=frozenset(range(1, length)))
        images = TransformedImages(source, three_generators, seed=5, on_unreadable="substitute")
        assert images[Draw(1, epoch)].target == 0
        assert len(set(source.tried)) == len(source.tried)


def test_each_file_is_counted_once() -> None:
    """A substitute that cannot be read, either, is counted when it is drawn itself."""
    bad = frozenset(range(1, 20, 2))
    samples = dataset(bad).__getitems__([Draw(index, 0, repeat) for repeat in range(2) for index in range(20)])
    assert all(sample.target not in bad for sample in samples)
    assert sorted(path for sample in samples for path in sample.unreadable) == sorted(f"{index}.jpg" for index in bad)


@pytest.mark.parametrize(("length", "others"), [(20, f"{MAX_SUBSTITUTES} others"), (2, "1 other")])
def test_only_unreadable_images(length: int, others: str) -> None:
    source = Source(length, bad=frozenset(range(length)))
    images = TransformedImages(source, three_generators, seed=5, on_unreadable="substitute")
    with pytest.raises(UnreadableImage, match=rf"broken \(after {others} in a row\)$"):
        images[Draw(0, 0)]


def test_marked_images_are_black_and_without_target() -> None:
    images = dataset(frozenset({3}), "mark")
    sample = images[Draw(3, 0)]
    assert (sample.target, sample.unreadable, sample.pixels[0, 1].tolist()) == (-1, ["3.jpg"], [0, 0, 0])
    assert images[Draw(4, 0)].target == 4


def test_batch() -> None:
    batch = collate(dataset(frozenset({3}), "mark").__getitems__([Draw(2, 0), Draw(3, 0), Draw(9, 0)]))
    assert isinstance(batch, Batch)
    assert batch.images.shape == (3, 3, 1, 2)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.targets.dtype == torch.int64
    assert batch.targets.tolist() == [2, -1, 9]
    assert batch.unreadable == ["3.jpg"]


def test_batch_of_images_with_several_labels() -> None:
    images = dataset(frozenset({3}), "mark")
    images._source.labels = np.eye(20, dtype=np.uint8)
    batch = collate(images.__getitems__([Draw(2, 0), Draw(3, 0)]))
    assert batch.targets.dtype == torch.float32
    assert batch.targets[0].tolist() == np.eye(20)[2].tolist()
    assert (batch.targets[1] == -1).all()


def test_repeats_are_augmented_differently() -> None:
    images = dataset()
    assert np.array_equal(images[Draw(3, 1, 0)].pixels, images[Draw(3, 1)].pixels)
    assert not np.array_equal(images[Draw(3, 1, 1)].pixels, images[Draw(3, 1)].pixels)


def test_data_set_reaches_spawned_workers(tmp_path: Path) -> None:
    images = dataset()
    copy = pickle.loads(pickle.dumps(images))
    assert np.array_equal(copy[Draw(3, 1)].pixels, images[Draw(3, 1)].pixels)
    assert pickle.loads(pickle.dumps(collate)) is collate
