"""Load and transform samples, and collate them into batches."""

from __future__ import annotations

import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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

OnUnreadable: TypeAlias = Literal["raise", "substitute", "mark"]
S = TypeVar("S")

# Maximum number of substitutes for one unreadable image; more failures have another cause.
MAX_SUBSTITUTES = 10


class Sample(NamedTuple):
    """Pixels `[H, W, 3]`, uint8, a label, and the files that could not be read before it."""

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
            drawn from the seed and the draw. "mark": use `left_out`.
    """

    def __init__(self, length: int, *, seed: int, on_unreadable: OnUnreadable) -> None:
        self._length = length
        self._seed = seed
        self._on_unreadable = on_unreadable

    @abstractmethod
    def sample(self, index: int, unreadable: list[str]) -> S:
        """Return a sample, with the files that could not be read before it.

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
        with preserve_generators():
            return [self._drawn(draw) for draw in draws]

    def _drawn(self, draw: Draw) -> S:
        unreadable: list[str] = []
        index = draw.index
        while True:
            seed_generators(self._seed, *draw)  # a substitute gets the augmentation of the original image
            try:
                return self.sample(index, unreadable)
            except UnreadableImage as error:
                if self._on_unreadable == "raise":
                    raise
                if len(unreadable) == MAX_SUBSTITUTES:
                    raise UnreadableImage(f"{error} (after {MAX_SUBSTITUTES} others in a row)", error.path) from None
                unreadable.append(error.path)
            if self._on_unreadable == "mark":
                return self.left_out(index, unreadable)
            index = int(np.random.default_rng((self._seed, *draw, len(unreadable))).integers(self._length))


class TransformedImages(SeededSamples[Sample]):
    """Images of a source and their labels.

    Args:
        source: the stored images.
        transform: from a stored image to pixels.
        seed: seed of the run.
        on_unreadable: see `SeededSamples`; a marked image is black and its target -1.

    Attributes:
        remarks: of the source.
    """

    def __init__(self, source: ImageSource, transform: Transform, *, seed: int, on_unreadable: OnUnreadable) -> None:
        super().__init__(len(source), seed=seed, on_unreadable=on_unreadable)
        self._source = source
        self.transform = transform
        self.remarks = source.remarks

    def sample(self, index: int, unreadable: list[str]) -> Sample:
        return Sample(self.transform(self._source.get(index)), self._source.label(index), unreadable)

    def left_out(self, index: int, unreadable: list[str]) -> Sample:
        blank = StoredImage(np.zeros((1, 1, 3), np.uint8), "")
        label = self._source.label(index)
        target = np.full_like(label, -1, dtype=np.int8) if isinstance(label, np.ndarray) else -1
        return Sample(self.transform(blank), target, unreadable)


def collate(samples: list[Sample]) -> Batch:
    """Collate samples into a batch with a single copy of the pixels, into shared memory in a worker."""
    shape = (len(samples), *samples[0].pixels.shape)
    images = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is not None:  # as in default_collate
        images.set_(torch.UntypedStorage._new_shared(math.prod(shape)))
    images = images.resize_(shape)
    _fill(images.numpy(), samples)
    return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(_targets(samples)), _unreadable(samples))


def collate_for_a_pipe(samples: list[Sample]) -> Batch:
    """Collate samples into a batch that is sent to the training process through a pipe, without shared memory."""
    pixels = np.empty((len(samples), *samples[0].pixels.shape), np.uint8)
    _fill(pixels, samples)
    return Batch(_ByValue(pixels), _ByValue(_targets(samples)), _unreadable(samples))


class ByValue:
    """A collating function whose batches go to the training process through a pipe, without shared memory."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        return _Packed(self._collate(samples))


class _Packed:
    """Arrives as what it holds; tensors themselves would be sent as names of shared memory."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def __reduce__(self) -> tuple:
        return pickle.loads, (pickle.dumps(self._content),)


class _ByValue:
    """An array that is unpickled as a tensor; tensors themselves would be sent through shared memory."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __reduce__(self) -> tuple:
        return _to_tensor, (self._array,)


def _to_tensor(array: np.ndarray) -> Tensor:
    """Return targets unchanged, and pixels `[b, H, W, 3]` as `[b, 3, H, W]`."""
    tensor = torch.from_numpy(array)
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def _fill(pixels: np.ndarray, samples: list[Sample]) -> None:
    for place, sample in zip(pixels, samples, strict=True):
        place[:] = sample.pixels


def _targets(samples: list[Sample]) -> np.ndarray:
    several = isinstance(samples[0].target, np.ndarray)
    return np.array([sample.target for sample in samples], dtype=np.float32 if several else np.int64)


def _unreadable(samples: list[Sample]) -> list[str]:
    return [path for sample in samples for path in sample.unreadable]
