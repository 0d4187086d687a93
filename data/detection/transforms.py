"""Augmentation of images with their boxes and masks, with torchvision's TVTensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# An image `[3, h, w]`, uint8, and its target: `boxes`, `labels`, and optionally `masks`.
Pair = tuple[tv_tensors.Image, dict[str, Any]]

# Limit of the long side before a crop, relative to the largest side of the options. Only images of which one side is
# over four times the other reach it, and very thin ones would take gigabytes without it.
_LONGEST = 4
_BILINEAR = v2.InterpolationMode.BILINEAR


class TrainTransform:
    """The augmentation of DETR (Carion et al., arXiv 2005.12872, section 4), with torch's generator.

    A flip; then the image is resized, or with probability 0.5 resized, cropped and resized again.

    Args:
        short_sides: one of these is drawn for the short side, in pixels.
        long_side: maximum of the long side; the short one is then shorter.
        crop_sides: short sides before a crop; empty: no image is cropped.
        crop: minimum and maximum side of a crop in pixels.
        hflip: probability of a horizontal flip.
    """

    def __init__(
        self,
        *,
        short_sides: Sequence[int],
        long_side: int,
        crop_sides: Sequence[int],
        crop: Sequence[int],
        hflip: float,
    ) -> None:
        resized: v2.Transform = RandomShortSide(short_sides, long_side)
        if crop_sides:
            longest = _LONGEST * max(long_side, *crop_sides)
            cropped = v2.Compose([RandomShortSide(crop_sides, longest), RandomSizedCrop(*crop), resized])
            resized = v2.RandomChoice([resized, cropped])
        # Boxes smaller than a pixel after resizing or a crop are removed, and so would be those on the border that
        # rounding moves beyond it.
        cleaned = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
        self._steps = v2.Compose([v2.RandomHorizontalFlip(hflip), resized, *cleaned])

    def __call__(self, image: tv_tensors.Image, target: dict[str, Any]) -> Pair:
        """Return the image with the remaining objects of its target."""
        return self._steps(image, target)


class EvalTransform:
    """Resizing to a short side, or less if the long side would exceed its limit.

    Args:
        short_side: in pixels.
        long_side: in pixels.
    """

    def __init__(self, *, short_side: int, long_side: int) -> None:
        self._resize = RandomShortSide([short_side], long_side)

    def __call__(self, image: tv_tensors.Image) -> tv_tensors.Image:
        """Return the image resized."""
        return self._resize(image)


class RandomShortSide(v2.Transform):
    """Resizing to a random short side; no side of a thin image is rounded to 0 pixels.

    Args:
        short_sides: one of these is drawn for the short side, in pixels.
        long_side: maximum of the long side.
    """

    def __init__(self, short_sides: Sequence[int], long_side: int) -> None:
        super().__init__()
        self._short_sides = short_sides
        self._long_side = long_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, list[int]]:
        """Draw the short side, and return the height and width that follow, rounded as by mmdetection."""
        sides = v2.query_size(flat_inputs)
        short = self._short_sides[int(torch.randint(len(self._short_sides), ()))]
        factor = min(short / min(sides), self._long_side / max(sides))
        return {"size": [max(1, math.floor(side * factor + 0.5)) for side in sides]}

    def transform(self, inpt: Any, params: dict[str, list[int]]) -> Any:
        """Return one of the inputs resized."""
        # The other nearest neighbor takes pixels from half a pixel further left and above than boxes and colours.
        mode = v2.InterpolationMode.NEAREST_EXACT if isinstance(inpt, tv_tensors.Mask) else _BILINEAR
        return self._call_kernel(F.resize, inpt, **params, interpolation=mode)


class RandomSizedCrop(v2.Transform):
    """A crop of random size and position.

    Args:
        smallest: side in pixels, limited to that of the image.
        largest: likewise.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self._smallest = smallest
        self._largest = largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draw top, left, height and width of the crop."""
        sides = v2.query_size(flat_inputs)
        height, width = (_integer(min(side, self._smallest), min(side, self._largest)) for side in sides)
        top, left = _integer(0, sides[0] - height), _integer(0, sides[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """Return one of the inputs cropped."""
        return self._call_kernel(F.crop, inpt, **params)


def _integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def to_target(boxes: Tensor, labels: Tensor, masks: Tensor | None, size: tuple[int, int]) -> dict[str, Any]:
    """Return the target as TVTensors, for an image of this height and width."""
    target = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size), "labels": labels}
    return target if masks is None else {**target, "masks": tv_tensors.Mask(masks)}
