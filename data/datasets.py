"""Load and transform samples, and collate them into batches."""

from __future__ import annotations

import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data.generators import preserve_generators, seed_generators
from data.images import StoredImage, UnreadableImage
from data.samplers import Draw
from data.sources import ImageSource
from data.transforms import Transform
from data.wording import counted

OnUnreadable: TypeAlias = Literal["raise", "substitute", "mark"]
S = TypeVar("S")

# Maximum number of substitutes for one unreadable image; more failures have another cause.
MAX_SUBSTITUTES = 10


class Sample(NamedTuple):
    """Pixels `[H, W, 3]`, uint8, a label, and the unreadable file that it replaces, if any."""

    pixels: np.ndarray
    target: int | np.ndarray
    unreadable: list[str]


class Batch(NamedTuple):
    """Images of one micro-batch.

    Attributes:
        images: `[b, 3, H, W]`, uint8, channels last in memory.
        targets: `[b]`, int64, or `[b, classes]` of 0 and 1, float32, for multi-label data; -1 for an unreadable image
            that is left out.
        unreadable: paths of the files that could not be read.
    """

    images: Tensor
    targets: Tensor
    unreadable: list[str]


class SeededSamples(Dataset[S], ABC, Generic[S]):
    """Samples transformed with random numbers that depend only on `(seed, epoch, index)`.

    An image is therefore augmented identically by any worker of any rank, also in a resumed run, and no generator state
    has to be saved.

    Args:
        length: number of samples.
        seed: seed of the run.
        on_unreadable: handling of unreadable images. "raise": raise `UnreadableImage`. "substitute": use another image,
            drawn from the seed and the draw; if that cannot be read, either, it is counted when it is drawn itself.
            "mark": use `left_out`.
    """

    def __init__(self, length: int, *, seed: int, on_unreadable: OnUnreadable) -> None:
        self._length = length
        self._seed = seed
        self._on_unreadable = on_unreadable

    @abstractmethod
    def sample(self, index: int, unreadable: list[str]) -> S:
        """Return a sample, with the unreadable file that it replaces, if any.

        Raises:
            UnreadableImage: its image cannot be read.
        """

    @abstractmethod
    def left_out(self, index: int, unreadable: list[str]) -> S:
        """Return the placeholder for a sample whose image cannot be read and is not counted."""

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, draw: Draw) -> S:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[S]:
        """Return the samples of a batch for a `DataLoader`; the state of global generators is preserved."""
        known: set[str] = set()
        with preserve_generators():
            return [self._drawn(draw, known) for draw in draws]

    def _drawn(self, draw: Draw, known: set[str]) -> S:
        """Return the sample of a draw, given the unreadable files that other samples of the batch replace."""
        unreadable: list[str] = []
        for tried, index in enumerate(chain([draw.index], self._substitutes(draw))):
            seed_generators(self._seed, *draw)  # a substitute gets the augmentation of the original image
            try:
                return self.sample(index, unreadable)
            except UnreadableImage as error:
                if self._on_unreadable == "raise":
                    raise
                last = error
            if not tried and last.path not in known:
                unreadable.append(last.path)
                known.add(last.path)
            if self._on_unreadable == "mark":
                return self.left_out(index, unreadable)
        raise UnreadableImage(f"{last} (after {counted(tried, 'other')} in a row)", last.path)

    def _substitutes(self, draw: Draw) -> Iterator[int]:
        """Yield images that may replace the one drawn, each once."""
        chance = np.random.default_rng((self._seed, *draw, 1))
        indices = chance.choice(self._length, min(self._length, MAX_SUBSTITUTES + 1), replace=False).tolist()
        yield from islice((index for index in indices if index != draw.index), MAX_SUBSTITUTES)


class TransformedImages(SeededSamples[Sample]):
    """Images of a source and their labels.

    Args:
        source: the stored images.
        transform: from a stored image to pixels.
        seed: seed of the run.
        on_unreadable: see `SeededSamples`; a marked image is black and its target -1.

    Attributes:
        warnings: the source's warnings.
    """

    def __init__(self, source: ImageSource, transform: Transform, *, seed: int, on_unreadable: OnUnreadable) -> None:
        super().__init__(len(source), seed=seed, on_unreadable=on_unreadable)
        self._source = source
        self.transform = transform
        self.warnings = source.warnings

    def sample(self, index: int, unreadable: list[str]) -> Sample:
        return Sample(self.transform(self._source.get(index)), self._source.label(index), unreadable)

    def left_out(self, index: int, unreadable: list[str]) -> Sample:
        blank = StoredImage(np.zeros((1, 1, 3), np.uint8), "")
        label = self._source.label(index)
        target = np.full_like(label, -1, dtype=np.int8) if isinstance(label, np.ndarray) else -1
        return Sample(self.transform(blank), target, unreadable)


def collate(samples: list[Sample], *, shared: bool = True) -> Batch:
    """Collate samples of one size into a batch with a single copy of the pixels.

    Args:
        samples: the samples.
        shared: whether a worker allocates the pixels in shared memory.
    """
    shape = (len(samples), *samples[0].pixels.shape)
    images = torch.empty(0, dtype=torch.uint8)
    if shared and get_worker_info() is not None:  # as in default_collate
        images.set_(torch.UntypedStorage._new_shared(math.prod(shape)))
    images = images.resize_(shape)
    for pixels, sample in zip(images.numpy(), samples, strict=True):
        pixels[:] = sample.pixels
    multi_label = isinstance(samples[0].target, np.ndarray)
    targets = np.array([sample.target for sample in samples], dtype=np.float32 if multi_label else np.int64)
    unreadable = [path for sample in samples for path in sample.unreadable]
    return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(targets), unreadable)


class PipedCollate:
    """A collate function whose batches are sent to the training process through a pipe instead of shared memory.

    Args:
        collate: the function that makes the batches.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        return _Pickled(self._collate(samples))


class _Pickled:
    """A batch that is pickled with its bytes; the pickler of workers would move its tensors into shared memory."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __reduce__(self) -> tuple:
        return pickle.loads, (pickle.dumps(self._batch),)
