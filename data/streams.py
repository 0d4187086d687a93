"""Streams without random access: shards from pipes and object stores.

The guarantees of indexed data sets are relaxed. The length of an epoch is an option. The order is that of shuffled
shards and of a shuffle buffer; every process and worker reads its own shards, repeatedly if they have fewer images than
its share, and only partly if they have more. An image may therefore appear twice in an epoch, or not at all. Still, the
same seed, processes and workers give the same batches. A run resumed in mid-epoch reads the used images again, without
decoding them, and continues after them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random
from typing import Any, TypeAlias

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.datasets import MAX_SUBSTITUTES, Batch, OnUnreadable, Sample, TransformedImages
from data.formats.stream import ImageStream
from data.images import StoredImage
from data.samplers import Draw, EvalSampler, TrainSampler
from data.sources import ImageSource
from data.transforms import Transform

# A stored image and its label.
Item: TypeAlias = tuple[StoredImage, int | np.ndarray]


class NextImages(ImageSource):
    """The next images of a stream, read when they are needed.

    Args:
        items: the stream.
        length: how many of them there are to choose from.
    """

    def __init__(self, items: Iterator[Item], length: int) -> None:
        self._items = items
        self._length = length
        self._held: deque[Item] = deque()

    def __len__(self) -> int:
        return self._length

    def get(self, index: int) -> StoredImage:
        """Return a stored image."""
        return self._at(index)[0]

    def label(self, index: int) -> int | np.ndarray:
        """Return the class of an image, or `[classes]` of 0 and 1."""
        return self._at(index)[1]

    def move_on(self, count: int) -> None:
        """Drop the first `count` images, which were all read."""
        for _ in range(count):
            self._held.popleft()

    def _at(self, index: int) -> Item:
        while len(self._held) <= index:
            self._held.append(next(self._items))
        return self._held[index]


class StreamedBatches(IterableDataset[list[Sample]], ABC):
    """The batches of one rank, produced by any number of workers in turn.

    Args:
        stream: the stored images.
        transform: from a stored image to pixels.
        batch_size: images per batch.
        rank: rank of this process.
        world_size: number of processes.
        seed: seed of the run.
        on_unreadable: see `data.datasets`; a substitute is another image of the batch, or one of those that follow a
            small batch.
    """

    def __init__(
        self,
        stream: ImageStream,
        transform: Transform,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        on_unreadable: OnUnreadable,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self._transform = transform
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._on_unreadable = on_unreadable

    def __iter__(self) -> Iterator[list[Sample]]:
        worker = get_worker_info()
        return self._batches(worker.id, worker.num_workers) if worker else self._batches(0, 1)

    @abstractmethod
    def _batches(self, worker: int, workers: int) -> Iterator[list[Sample]]:
        """Yield the batches of a worker; a loader takes one from each worker in turn."""

    def _shards(self, urls: Sequence[str], share: int, workers: int) -> Sequence[str]:
        """Return the shards of a worker."""
        return urls[self._rank + self._world_size * share :: self._world_size * workers]

    def _samples(self, source: NextImages, size: int, epoch: int, number: int) -> list[Sample]:
        """Return a batch of `size` images; its augmentation depends on its number within the epoch and on the rank."""
        images = TransformedImages(source, self._transform, seed=self._seed, on_unreadable=self._on_unreadable)
        place = number * self._world_size + self._rank
        return images.__getitems__([Draw(index, epoch, place) for index in range(size)])


class TrainBatches(StreamedBatches):
    """The remaining batches of an epoch for this rank.

    Args:
        sampler: provides start and length of the epoch.
        buffer: size of the shuffle buffer of each worker, in images.
        options: of `StreamedBatches`.
    """

    def __init__(
        self, stream: ImageStream, transform: Transform, *, sampler: TrainSampler, buffer: int, **options: Any
    ) -> None:
        super().__init__(stream, transform, **options)
        self._sampler = sampler
        self._buffer = buffer

    def _batches(self, worker: int, workers: int) -> Iterator[list[Sample]]:
        epoch, size = self._sampler.epoch, self.batch_size
        first = self._sampler.start // (size * self._world_size)
        share = (first + worker) % workers  # so that each continues with its own shards when an epoch resumes
        order = np.random.default_rng((self._seed, epoch)).permutation(self.stream.urls).tolist()
        chance = Random(f"{self._seed} {epoch} {self._rank} {share}")
        images = self._repeat(self._shards(order, share, workers), chance)
        images = islice(images, len(range(share, first, workers)) * size, None)
        # The images that follow a small batch are read for substitutes alone, and are in the next batches as well.
        source = NextImages(images, max(size, 1 + MAX_SUBSTITUTES))
        for number in range(first + worker, first + len(self._sampler) // size, workers):
            yield self._samples(source, size, epoch, number)
            source.move_on(size)

    def _repeat(self, urls: Sequence[str], chance: Random) -> Iterator[Item]:
        """Yield the images of shards in random order without end; each pass has every image once."""
        from webdataset import shuffle

        mixed = shuffle(self._buffer, rng=chance) if self._buffer else iter
        while True:
            yield from mixed(image for url in urls for image in self.stream.read(url))


class EvalBatches(StreamedBatches):
    """Every image of this rank's shards once."""

    def _batches(self, worker: int, workers: int) -> Iterator[list[Sample]]:
        images = (image for url in self._shards(self.stream.urls, worker, workers) for image in self.stream.read(url))
        while held := list(islice(images, self.batch_size)):
            yield self._samples(NextImages(iter(held), len(held)), len(held), 0, 0)


class StreamLoader:
    """Batches of a stream with the interface that a run needs of a `DataLoader`.

    Args:
        batches: of this rank.
        sampler: provides the position.
        collate: from samples to a batch.
        options: arguments of the internal `DataLoader`.

    Attributes:
        dataset: the stream; its length is that of an epoch.
        sampler: the sampler.
        batch_size: images per batch.
    """

    def __init__(
        self,
        batches: StreamedBatches,
        sampler: TrainSampler | EvalSampler,
        collate: Callable[[list[Sample]], Batch],
        **options: Any,
    ) -> None:
        self.dataset = batches.stream
        self.sampler = sampler
        self.batch_size = batches.batch_size
        self._loader = DataLoader(batches, batch_size=None, collate_fn=collate, **options)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


# The loaders that a run supports.
Loader: TypeAlias = DataLoader | StreamLoader
