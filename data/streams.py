"""Images that come one after the other and cannot be asked for by number: shards out of pipes and object stores.

What an index gives is given up here, as far as it must be. An epoch is as long as an option says. The order is that of
shuffled shards and of a buffer; every process and every worker reads shards of its own, over again where they hold
fewer images than their share, and not to the end where they hold more. So an image may come twice in an epoch, or not.
What stays: the same seed, processes and workers give the same batches. A run that continues within an epoch reads the
images again that it had used, without decoding them, and goes on with the next one.
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


class HeldImages(ImageSource):
    """A few images in memory."""

    def __init__(self, images: Sequence[tuple[StoredImage, int | np.ndarray]]) -> None:
        self._images = [image for image, _ in images]
        self.labels = np.array([label for _, label in images])

    def get(self, index: int) -> StoredImage:
        """Return an image as it came."""
        return self._images[index]


class StreamedBatches(IterableDataset[list[Sample]], ABC):
    """The batches of one rank, made by any number of workers in turn.

    Args:
        stream: where the images come from.
        transform: from a stored image to pixels.
        batch_size: images of a batch.
        rank: which process this is.
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
        """Yield the batches of a worker; a loader takes one of each worker in turn."""

    def _shards(self, urls: Sequence[str], share: int, workers: int) -> Sequence[str]:
        """Return a worker's part of the shards."""
        return urls[self._rank + self._world_size * share :: self._world_size * workers]

    def _samples(self, held: Sequence[tuple[StoredImage, int | np.ndarray]], epoch: int, number: int) -> list[Sample]:
        """Return a batch, whose augmentation depends on its number within the epoch and on the rank."""
        source = HeldImages(held)
        images = TransformedImages(source, self._transform, seed=self._seed, on_unreadable=self._on_unreadable)
        place = number * self._world_size + self._rank
        return images.__getitems__([Draw(index, epoch, place) for index in range(len(held))])


class TrainBatches(StreamedBatches):
    """What is left of an epoch for this rank.

    Args:
        sampler: says where the epoch begins and how long it is.
        buffer: images that are held back to shuffle them, in each worker.
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
        share = (first + worker) % workers  # so that each goes on with its own shards where an epoch continues
        order = np.random.default_rng((self._seed, epoch)).permutation(self.stream.urls).tolist()
        chance = Random(f"{self._seed} {epoch} {self._rank} {share}")
        images = self._again_and_again(self._shards(order, share, workers), chance)
        images = islice(images, len(range(share, first, workers)) * size, None)
        for number in range(first + worker, first + len(self._sampler) // size, workers):
            yield self._samples(list(islice(images, size)), epoch, number)

    def _again_and_again(self, urls: Sequence[str], chance: Random) -> Iterator[tuple[StoredImage, int | np.ndarray]]:
        """Yield the images of shards in random order, all of them before any comes a second time."""
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
    """Batches of a stream behind what a run asks of a `DataLoader`.

    Args:
        batches: of this rank.
        sampler: whose position counts.
        collate: from samples to a batch.
        options: of the `DataLoader` that workers work for.

    Attributes:
        dataset: the stream; its length is that of an epoch.
        sampler: the same.
        batch_size: images of a batch.
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


# What a run takes its batches from.
Loader: TypeAlias = DataLoader | StreamLoader
