"""Segmentation samples and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from data.datasets import OnUnreadable, SeededSamples
from data.segmentation.sources import IGNORED, MaskedSource

Transform = Callable[[Image.Image, Tensor], tuple[Tensor | list[Tensor], Tensor]]


class Sample(NamedTuple):
    """An image and the classes of its pixels.

    Attributes:
        image: uint8; in training `[3, H, W]`, otherwise `[3, h, w]` of each scale.
        labels: `[H, W]`, uint8.
        unreadable: paths of the unreadable files that it replaces.
    """

    image: Tensor | list[Tensor]
    labels: Tensor
    unreadable: list[str]


class Batch(NamedTuple):
    """Images of one micro-batch.

    Attributes:
        images: uint8; in training `[b, 3, H, W]`, otherwise `[3, h, w]` of each image and scale.
        labels: classes of the pixels, uint8, `IGNORED` where unknown; in training `[b, H, W]`, otherwise `[H, W]` each,
            `[0, 0]` for an image that is left out.
        unreadable: paths of the files that could not be read.
    """

    images: Sequence[list[Tensor]] | Tensor
    labels: Sequence[Tensor] | Tensor
    unreadable: list[str]


class MaskedImages(SeededSamples[Sample]):
    """Images of a source with the classes of their pixels.

    Args:
        source: the stored images.
        transform: of both.
        seed: seed of the run.
        on_unreadable: see `SeededSamples`; a marked image is one black pixel without labels.
    """

    def __init__(self, source: MaskedSource, transform: Transform, *, seed: int, on_unreadable: OnUnreadable) -> None:
        super().__init__(len(source), seed=seed, on_unreadable=on_unreadable)
        self._source = source
        self.transform = transform

    def sample(self, index: int, unreadable: list[str]) -> Sample:
        image, mask = self._source.pair(index)
        return Sample(*self.transform(image, torch.from_numpy(mask)), unreadable)

    def left_out(self, index: int, unreadable: list[str]) -> Sample:  # noqa: ARG002
        pixel = torch.zeros(3, 1, 1, dtype=torch.uint8)
        return Sample([pixel], torch.full((0, 0), IGNORED, dtype=torch.uint8), unreadable)


def collate(samples: list[Sample]) -> Batch:
    """Collate samples of different sizes into a batch."""
    images, labels, unreadable = zip(*samples, strict=True)
    return Batch(images, labels, [path for paths in unreadable for path in paths])


def stack(samples: list[Sample]) -> Batch:
    """Collate samples of one size into a batch of two tensors."""
    images, labels, unreadable = collate(samples)
    return Batch(torch.stack(images), torch.stack(labels), unreadable)
