"""Streams without random access: shards from pipes and object stores.

The guarantees of indexed data sets are relaxed. The length of an epoch is an option. The order is that of shuffled
shards and of a shuffle buffer; every process and worker reads its own shards, repeatedly if they have fewer images than
its share, and only partly if they have more. An image may therefore appear twice in an epoch, or not at all. Still, the
same seed, processes and workers give the same batches. A run resumed in mid-epoch reads the used images again, without
decoding them, and continues after them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random
from typing import Any, TypeAlias

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.datasets import Batch, OnUnreadable, Sample, TransformedImages
from data.formats.stream import ImageStream
from data.images import StoredImage
from data.samplers import Draw, EvalSampler, TrainSampler
from data.sources import ImageSource
from data.transforms import Transform


class BatchSource(ImageSource):
    """The stored images and labels of one batch."""

    def __init__(self, images: Sequence[tuple[StoredImage, int | np.ndarray]]) -> None:
        self._images = [image for image, _ in images]
        self.labels = np.array([label for _, label in images])

    def get(self, index: int) -> StoredImage:
        """Return a stored image."""
        return self._images[index]


class StreamedBatches(IterableDataset[list[Sample]], ABC):
    """The batches of one rank, produced by any number of workers in turn.

    Args:
        stream: the stored images.
        transform: from a stored image to pixels.
        batch_size: images per batch.
        rank: rank of this process.
        world_size: number of processes.
        seed: seed of the run.
        on_unreadable: see `data.datasets`; a substitute is another image of the batch.
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

    def _samples(self, held: Sequence[tuple[StoredImage, int | np.ndarray]], epoch: int, number: int) -> list[Sample]:
        """Return a batch; its augmentation depends on its number within the epoch and on the rank."""
        source = BatchSource(held)
        images = TransformedImages(source, self._transform, seed=self._seed, on_unreadable=self._on_unreadable)
        place = number * self._world_size + self._rank
        return images.__getitems__([Draw(index, epoch, place) for index in range(len(held))])


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
        for number in range(first + worker, first + len(self._sampler) // size, workers):
            yield self._samples(list(islice(images, size)), epoch, number)

    def _repeat(self, urls: Sequence[str], chance: Random) -> Iterator[tuple[StoredImage, int | np.ndarray]]:
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
            yield self._samples(held, 0, 0)


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
