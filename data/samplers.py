"""Which images a process sees, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One image of one epoch: all that its augmentation may depend on, besides the seed.

    Attributes:
        index: which image.
        epoch: which epoch.
        repeat: how often the image was drawn before in the epoch; trailing zeros do not change a seed.
    """

    index: int
    epoch: int
    repeat: int = 0


class TrainSampler(Sampler[Draw]):
    """One rank's share of a random order that is the same for every rank and every number of ranks.

    An epoch is a permutation drawn from the seed and the epoch alone, cut to whole updates. Each run of
    `batch_size * world_size` images of it is a micro-batch, of which every rank takes a contiguous part, so one process
    with a batch of 2b and two processes with a batch of b see the same micro-batches.

    Args:
        length: images in the data set.
        batch_size: images per rank and micro-batch.
        rank: which of the `world_size` parts this is.
        world_size: number of processes.
        seed: seed of the run.
        accumulation_steps: micro-batches per update.
        repeats: how often an image stands in the order, each time augmented otherwise (repeated augmentation, Hoffer et
            al., arXiv 1901.09335); an epoch stays as long as it is, so it holds a part of the images.
        balanced: classes of all images, `[length]`, to take as many images of each; None for each image once.

    Attributes:
        updates_per_epoch: updates in a whole epoch.
        epoch: which epoch it stands in.
        start: images of the epoch, of all ranks, that were used already.

    Raises:
        ValueError: where the data set is smaller than one update.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        accumulation_steps: int = 1,
        repeats: int = 1,
        balanced: np.ndarray | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        self._length = length
        self._batch_size = batch_size
        self._rank = rank
        self._micro_batch = batch_size * world_size
        self._update = self._micro_batch * accumulation_steps
        self._seed = seed
        self._repeats = repeats
        self._balanced = balanced
        self.epoch = 0
        self.start = 0
        self.updates_per_epoch = length // self._update
        if not self.updates_per_epoch:
            raise ValueError(
                f"{length} training images are fewer than one update takes: {batch_size} a batch x {world_size} "
                f"processes x {accumulation_steps} accumulation steps = {self._update}; reduce DATA.BATCH_SIZE, "
                f"TRAIN.ACCUMULATION_STEPS or the number of processes"
            )

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Move to `epoch`, behind the first `start` images of its order, which were already used.

        `start` counts the images of all ranks. It may come from a run with another number of ranks.
        """
        if not 0 <= start <= self._length:
            raise ValueError(
                f"the run is to continue behind image {start} of an epoch, but there are {self._length} training "
                f"images; continue with the data set that it began with"
            )
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[Draw]:
        epoch, batch_size, repeats = self.epoch, self._batch_size, self._repeats
        order, drawn = self._order(np.random.default_rng((self._seed, epoch)))
        stop = self.start + self._updates_left() * self._update
        firsts = range(self.start + self._rank * batch_size, stop, self._micro_batch)
        places = (place for first in firsts for place in range(first, first + batch_size))
        return (
            Draw(int(order[place // repeats]), epoch, int(drawn[place // repeats]) * repeats + place % repeats)
            for place in places
        )

    def __len__(self) -> int:
        """Images left for this rank."""
        return self._updates_left() * self._update // self._micro_batch * self._batch_size

    def _order(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of an epoch in order, and how often each was drawn before."""
        if self._balanced is None:
            return generator.permutation(self._length), np.zeros(self._length, np.uint8)
        order = balanced_order(self._balanced, generator)
        return order, times_before(order)

    def _updates_left(self) -> int:
        return (self._length - self.start) // self._update


def balanced_order(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return as many indices as there are images, of every class that has images as many as of any other, or one more.

    No image of a class comes once more before all of them came.
    """
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    members = [images for images in members if len(images)]
    shares = np.full(len(members), len(labels) // len(members))
    shares[generator.permutation(len(members))[: len(labels) % len(members)]] += 1
    rounds = (
        np.concatenate([generator.permutation(images) for _ in range(-(-share // len(images)))])[:share]
        for images, share in zip(members, shares, strict=True)
    )
    return generator.permutation(np.concatenate(list(rounds)))


def times_before(order: np.ndarray) -> np.ndarray:
    """Return for each place how often its value stands at earlier places."""
    places = np.argsort(order, kind="stable")
    is_first = np.diff(order[places], prepend=-1) != 0
    counts = np.arange(len(order)) - np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    before = np.empty_like(counts)
    before[places] = counts
    return before


class EvalSampler(Sampler[Draw]):
    """Every `world_size`-th image from `rank` on: over all ranks each image once, none twice.

    Ranks differ by one image where `length` is no multiple of `world_size`.
    """

    def __init__(self, length: int, *, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
        self._indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(index, 0) for index in self._indices)

    def __len__(self) -> int:
        return len(self._indices)
