"""Detection samples and batches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from data.datasets import OnUnreadable, SeededSamples
from data.detection.sources import DetectionSource
from data.detection.transforms import EvalTransform, TrainTransform, to_target
from data.images import UnreadableImage

Target = dict[str, Tensor]


class Sample(NamedTuple):
    """An image `[3, h, w]`, uint8, its target, and the unreadable files that it replaces."""

    image: Tensor
    target: Target
    unreadable: list[str]


class Batch(NamedTuple):
    """Images of one micro-batch, each of its own size.

    Attributes:
        images: `[3, h, w]` each, uint8.
        targets: of each training image, `boxes` `[n, 4]`, `labels` `[n]` and, for detectors with masks, `masks`
            `[n, h, w]`; of each held-out image, its `index`, and its `size` (height, width) before resizing: 0 and 0
            if it is left out.
        unreadable: paths of the files that could not be read.
    """

    images: list[Tensor]
    targets: list[Target]
    unreadable: list[str]


class _Samples(SeededSamples[Sample]):
    """Images of a source.

    Args:
        source: the stored images.
        seed: seed of the run.
        on_unreadable: see `SeededSamples`; a marked image is one black pixel, and its size is 0 and 0.
    """

    def __init__(self, source: DetectionSource, *, seed: int, on_unreadable: OnUnreadable) -> None:
        super().__init__(len(source), seed=seed, on_unreadable=on_unreadable)
        self._source = source

    def pixels(self, index: int) -> tv_tensors.Image:
        """Return a stored image.

        Raises:
            UnreadableImage: it cannot be read, or its size differs from that in the annotations.
        """
        stored, size = self._source.get(index), self._source.size(index)
        pixels = np.array(stored.decode())
        if pixels.shape[:2] != size:
            (height, width), (h, w) = pixels.shape[:2], size
            raise UnreadableImage(
                f"image {stored.name!r} is {width} x {height} pixels, its annotations say {w} x {h}", stored.name
            )
        return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))

    def left_out(self, index: int, unreadable: list[str]) -> Sample:
        return Sample(torch.zeros(3, 1, 1, dtype=torch.uint8), _place(index, (0, 0)), unreadable)


class TrainSamples(_Samples):
    """Augmented images with their objects, without crowds.

    Args:
        source: the stored images.
        transform: augments them.
        masks: whether to include masks.
        seed: seed of the run.
        on_unreadable: see `SeededSamples`.
    """

    def __init__(
        self, source: DetectionSource, transform: TrainTransform, *, masks: bool, seed: int, on_unreadable: OnUnreadable
    ) -> None:
        super().__init__(source, seed=seed, on_unreadable=on_unreadable)
        self._transform = transform
        self._masks = masks

    def sample(self, index: int, unreadable: list[str]) -> Sample:
        image, size, objects = self.pixels(index), self._source.size(index), self._source.objects(index)
        learned = torch.from_numpy(~objects.crowd)
        masks = torch.from_numpy(objects.decoded(size))[learned] if self._masks else None
        boxes, labels = (torch.from_numpy(x)[learned] for x in (objects.boxes, objects.labels))
        image, target = self._transform(image, to_target(boxes, labels, masks, size))
        return Sample(_plain(image), {name: _plain(value) for name, value in target.items()}, unreadable)


class EvalSamples(_Samples):
    """Held-out images, resized.

    Args:
        source: the stored images.
        transform: resizes them.
        on_unreadable: see `SeededSamples`.
    """

    def __init__(self, source: DetectionSource, transform: EvalTransform, *, on_unreadable: OnUnreadable) -> None:
        super().__init__(source, seed=0, on_unreadable=on_unreadable)
        self._transform = transform

    def sample(self, index: int, unreadable: list[str]) -> Sample:
        target = _place(index, self._source.size(index))
        return Sample(_plain(self._transform(self.pixels(index))), target, unreadable)


def _place(index: int, size: tuple[int, int]) -> Target:
    return {"index": torch.tensor(index), "size": torch.tensor(size)}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor).contiguous()


def collate(samples: list[Sample]) -> Batch:
    """Collate samples into a batch."""
    images, targets, unreadable = zip(*samples, strict=True)
    return Batch(list(images), list(targets), [path for paths in unreadable for path in paths])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors copied to a device, asynchronously where that is possible."""
    images = [image.to(device, non_blocking=True) for image in batch.images]
    targets = [
        {name: value.to(device, non_blocking=True) for name, value in target.items()} for target in batch.targets
    ]
    return Batch(images, targets, batch.unreadable)
