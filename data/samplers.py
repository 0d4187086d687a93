"""Samplers: which images a process uses, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data.wording import counted


class Draw(NamedTuple):
    """One image of one epoch; its augmentation depends only on this and the seed.

    Attributes:
        index: index of the image.
        epoch: the epoch.
        repeat: how often the image was drawn before in the epoch; trailing zeros do not change a seed.
    """

    index: int
    epoch: int
    repeat: int = 0


class TrainSampler(Sampler[Draw]):
    """One rank's share of a random order that is the same for all ranks and any number of ranks.

    An epoch is a permutation that depends only on seed and epoch, without an incomplete last update. Consecutive
    `batch_size * world_size` images are a micro-batch, of which every rank takes a contiguous part, so one process with
    a batch size of 2b and two processes with a batch size of b use the same micro-batches.

    Args:
        length: images in the data set.
        batch_size: images per rank and micro-batch.
        rank: rank of this process.
        world_size: number of processes.
        seed: seed of the run.
        accumulation_steps: micro-batches per update.
        repeats: copies of each image, each augmented differently (repeated augmentation, Hoffer et al., arXiv
            1901.09335); an epoch keeps its length, so it contains only some of the images.
        balanced: classes of all images, `[length]`, to draw equally many images of each; None for each image once.

    Attributes:
        updates_per_epoch: updates in a full epoch.
        epoch: the current epoch.
        start: images of the epoch already used, over all ranks.

    Raises:
        ValueError: the data set is smaller than one update.
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
                f"one update needs {self._update} training images, batch size {batch_size} x "
                f"{counted(world_size, 'process', 'processes')} x {counted(accumulation_steps, 'accumulation step')}, "
                f"and there are {length}; reduce --batch-size, --accumulation-steps or the number of processes"
            )

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Move to `epoch`, after the first `start` images of its order, which were already used.

        `start` counts the images of all ranks. It may come from a run with a different number of ranks.
        """
        if not 0 <= start <= self._length:
            raise ValueError(
                f"the run should continue after image {start} of an epoch, but there are {self._length} training "
                f"images; continue with the data set that it started with"
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
    """Return `len(labels)` indices with equally many images of every class, up to one more.

    No image of a class repeats before all of them were drawn.
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
    """Return for each position how often its value occurs at earlier positions."""
    places = np.argsort(order, kind="stable")
    is_first = np.diff(order[places], prepend=-1) != 0
    counts = np.arange(len(order)) - np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    before = np.empty_like(counts)
    before[places] = counts
    return before


class EvalSampler(Sampler[Draw]):
    """Every `world_size`-th image starting at `rank`, so that all ranks together use each image exactly once.

    The shares differ by one image if `length` is not a multiple of `world_size`.
    """

    def __init__(self, length: int, *, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
        self._indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(index, 0) for index in self._indices)

    def __len__(self) -> int:
        return len(self._indices)
