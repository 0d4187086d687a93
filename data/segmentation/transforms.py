"""Augmentation of images together with their masks, with torchvision's TVTensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.segmentation.sources import IGNORED

_PADDING = {tv_tensors.Image: [round(255 * value) for value in IMAGENET_DEFAULT_MEAN], tv_tensors.Mask: IGNORED}
_LONGEST = 4  # maximum ratio of long to short side, as 2048 to 512
_CROPS = 10  # maximum number of crops drawn to limit the share of a class
_BRIGHTNESS = 32  # largest change of a pixel's values, of 255
_FACTORS = (0.5, 1.5)  # of contrast and saturation
_HUE = 0.1  # largest change, as a share of the circle


class TrainTransform:
    """Random scale, crop and flip, photometric distortion: the recipe of ADE20K, with torch's generator.

    Args:
        size: height and width of the crop in pixels.
        scale: range of the scale relative to an image whose short side is that of the crop.
        largest_share: maximum share of one class in a crop; larger ones are redrawn.
        hflip: probability of a horizontal flip.
        photometric: see `PhotometricDistortion`.
    """

    def __init__(
        self, size: tuple[int, int], *, scale: Sequence[float], largest_share: float, hflip: float, photometric: float
    ) -> None:
        self._size = size
        self._scale = tuple(scale)
        self._largest_share = largest_share
        self._distort = PhotometricDistortion(photometric)
        self._flip = v2.RandomHorizontalFlip(hflip)

    def __call__(self, image: Image.Image, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return an image `[3, height, width]` and the classes `[height, width]` of its pixels, both uint8."""
        pixels, labels = tv_tensors.Image(F.pil_to_tensor(image)), tv_tensors.Mask(mask)
        factor = torch.empty(()).uniform_(*self._scale).item()
        size = resized(pixels.shape[-2:], factor * min(self._size))
        # Not NEAREST, which takes labels from up to half a pixel further left and above than colours.
        pixels, labels = F.resize(pixels, size), F.resize(labels, size, v2.InterpolationMode.NEAREST_EXACT)
        window = self._window(labels)
        pixels, labels = self._distort(F.crop(pixels, *window)), F.crop(labels, *window)
        pixels, labels = self._flip(self._filled(pixels), self._filled(labels))
        return pixels.as_subclass(Tensor), labels.as_subclass(Tensor)

    def _window(self, labels: Tensor) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a crop, redrawn while one class has too large a share."""
        height, width = (min(side, most) for side, most in zip(labels.shape, self._size, strict=True))
        for _ in range(_CROPS):
            top, left = (
                int(torch.randint(side - cropped + 1, ()))
                for side, cropped in zip(labels.shape, (height, width), strict=True)
            )
            if self._largest_share == 1:
                break
            counts = torch.bincount(labels[top : top + height, left : left + width].flatten(), minlength=256)[:IGNORED]
            if (counts > 0).sum() > 1 and counts.max() < self._largest_share * counts.sum():
                break
        return top, left, height, width

    def _filled(self, x: Tensor) -> Tensor:
        """Pad an image with the mean, or a mask with `IGNORED`, at the bottom and right if it is too small."""
        below, right = (most - side for most, side in zip(self._size, x.shape[-2:], strict=True))
        return F.pad(x, [0, 0, right, below], fill=_PADDING[type(x)]) if below or right else x


class PhotometricDistortion:
    """Brightness, contrast, saturation and hue as in the recipe of ADE20K, which is that of SSD (arXiv 1512.02325).

    Brightness is added to the pixels, contrast multiplies them, before or after saturation and hue.

    Args:
        probability: of each of them.
    """

    def __init__(self, probability: float) -> None:
        self._probability = probability

    def __call__(self, pixels: tv_tensors.Image) -> tv_tensors.Image:
        """Return an image `[3, H, W]`, uint8, with changed colours."""
        if self._drawn():
            shifted = pixels + torch.empty(()).uniform_(-_BRIGHTNESS, _BRIGHTNESS)
            pixels = tv_tensors.wrap(shifted.round().clamp(0, 255).byte(), like=pixels)
        # What torchvision calls brightness is a factor on the pixels; its contrast would preserve their mean.
        order = [F.adjust_saturation, F.adjust_hue]
        order.insert(2 if torch.rand(()) < 0.5 else 0, F.adjust_brightness)
        for change in order:
            if self._drawn():
                limits = (-_HUE, _HUE) if change is F.adjust_hue else _FACTORS
                pixels = change(pixels, torch.empty(()).uniform_(*limits).item())
        return pixels

    def _drawn(self) -> bool:
        return bool(torch.rand(()) < self._probability)


class EvalTransform:
    """The whole image resized to one or several short sides; its mask unchanged.

    Args:
        size: height and width of the network's images, of which the smaller is the short side.
        scales: factors on the short side.
    """

    def __init__(self, size: tuple[int, int], scales: Sequence[float] = (1.0,)) -> None:
        self._short = min(size)
        self._scales = scales

    def __call__(self, image: Image.Image, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return an image `[3, h, w]` of each scale and the classes `[height, width]` of its pixels, all uint8."""
        return [self.apply(image, scale) for scale in self._scales], mask

    def apply(self, image: Image.Image, scale: float = 1.0) -> Tensor:
        """Return an image at one scale as `[3, h, w]`, uint8."""
        return F.resize(F.pil_to_tensor(image), resized((image.height, image.width), scale * self._short))


def resized(size: Sequence[int], short: float) -> list[int]:
    """Return height and width for a short side in pixels, less if the long side would exceed its limit."""
    factor = min(short / min(size), _LONGEST * short / max(size))
    return [max(1, math.floor(side * factor + 0.5)) for side in size]
