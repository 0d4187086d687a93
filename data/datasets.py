"""From a draw to a transformed image, and from images to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from data.generators import preserve_generators, seed_generators
from data.images import UnreadableImage
from data.samplers import Draw
from data.sources import ImageSource
from data.transforms import Transform

OnUnreadable: TypeAlias = Literal["raise", "substitute", "mark"]

# Substitutes drawn for one unreadable image before it is taken for granted that something else is wrong.
MAX_SUBSTITUTES = 10


class Sample(NamedTuple):
    """An image `[3, H, W]`, its class, and the files that could not be read on the way to it."""

    image: Tensor
    target: int
    unreadable: list[str]


class Batch(NamedTuple):
    """Images of one micro-batch.

    Attributes:
        images: `[b, 3, H, W]`, float32, normalised.
        targets: `[b]`, int64; -1 for an image that could not be read and is to be left out.
        unreadable: paths of the files that could not be read.
    """

    images: Tensor
    targets: Tensor
    unreadable: list[str]


class TransformedImages(Dataset[Sample]):
    """Images of a source, transformed by random numbers that depend on `(seed, epoch, index)` alone.

    So an image is augmented in the same way by any worker of any rank, in a run that was interrupted as in one that was
    not, and no state of a generator has to be kept.

    Args:
        source: where the images come from.
        transform: from an image to a tensor.
        seed: seed of the run.
        on_unreadable: what becomes of an image that cannot be read. "raise": `UnreadableImage` is raised. "substitute":
            another image takes its place, drawn from the seed and the draw. "mark": it is black and its target -1.
    """

    def __init__(self, source: ImageSource, transform: Transform, *, seed: int, on_unreadable: OnUnreadable) -> None:
        self._source = source
        self.transform = transform
        self._seed = seed
        self._on_unreadable = on_unreadable

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, draw: Draw) -> Sample:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Sample]:
        """Return the images of a batch, as a `DataLoader` asks for them; global generators stay as they were."""
        with preserve_generators():
            return [self._sample(draw) for draw in draws]

    def _sample(self, draw: Draw) -> Sample:
        image, target, unreadable = self._read(draw)
        seed_generators(self._seed, *draw)
        return Sample(self.transform(image), target, unreadable)

    def _read(self, draw: Draw) -> tuple[Image.Image, int, list[str]]:
        unreadable: list[str] = []
        index = draw.index
        while True:
            try:
                return self._source.read(index), self._source.label(index), unreadable
            except UnreadableImage as error:
                if self._on_unreadable == "raise":
                    raise
                if len(unreadable) == MAX_SUBSTITUTES:
                    raise UnreadableImage(f"{error} (after {MAX_SUBSTITUTES} others in a row)", error.path) from None
                unreadable.append(error.path)
            if self._on_unreadable == "mark":
                return Image.new("RGB", (1, 1)), -1, unreadable
            index = int(np.random.default_rng((self._seed, *draw, len(unreadable))).integers(len(self._source)))


def collate(samples: list[Sample]) -> Batch:
    """Put samples together to a batch."""
    return Batch(
        images=default_collate([sample.image for sample in samples]),
        targets=torch.tensor([sample.target for sample in samples]),
        unreadable=[path for sample in samples for path in sample.unreadable],
    )
