"""Transforms from a stored image to the pixels of a batch, and from a batch to the network's input."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from data.images import StoredImage
from data.operations import OPERATIONS

# Returns pixels `[height, width, 3]`, uint8.
Transform = Callable[[StoredImage], np.ndarray]
Size = tuple[int, int]


class TrainTransform:
    """Random crop, flip, and RandAugment or colour jitter.

    The crop depends only on the image size, so only the necessary part is decoded. It is resized by PyTorch, whose
    8-bit antialiased filters match Pillow's (a difference of a twentieth of a grey level on average) at three times the
    speed. Random numbers are drawn from the global generators.

    Args:
        size: height and width of the result in pixels.
        interpolation: "bicubic" or "bilinear".
        crop: "resized": a random crop, resized; "padded": a random crop of the whole image padded with black pixels, as
            for CIFAR.
        padding: width of the padding in pixels.
        scale: smallest and largest area of a resized crop, as fractions of the image.
        ratio: smallest and largest aspect ratio of a resized crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength; ignored with policies that change colours themselves.
        auto_augment: a timm policy such as "rand-m9-mstd0.5-inc1", "3a" (three-augment), "original" (AutoAugment) or
            "augmix-m3-w3"; empty for none.

    Raises:
        ValueError: the policy is unknown to timm.
    """

    def __init__(
        self,
        size: Size,
        *,
        interpolation: str,
        crop: str = "resized",
        padding: int = 4,
        scale: Sequence[float],
        ratio: Sequence[float],
        hflip: float,
        color_jitter: float,
        auto_augment: str,
    ) -> None:
        self._size = size
        self._interpolation = interpolation
        self._crop = crop
        self._padding = padding
        self._scale = tuple(scale)
        self._ratio = tuple(ratio)
        self._hflip = hflip
        self._colours = _colour_transform(size, interpolation, color_jitter, auto_augment)

    def __call__(self, stored: StoredImage) -> np.ndarray:
        """Return `[height, width, 3]`, uint8; raises `UnreadableImage`."""
        pixels = self._resized_crop(stored) if self._crop == "resized" else self._padded_crop(stored)
        if torch.rand(()) < self._hflip:
            pixels = torch.from_numpy(pixels).flip(1).numpy()  # ten times faster than copying pixels[:, ::-1]
        return pixels if self._colours is None else np.asarray(self._colours(Image.fromarray(pixels)))

    def _resized_crop(self, stored: StoredImage) -> np.ndarray:
        height, width = stored.size()
        blank = Image.new("1", (width, height))  # timm only reads its size
        top, left, rows, columns = RandomResizedCropAndInterpolation.get_params(blank, self._scale, self._ratio)
        rows, columns = max(rows, 1), max(columns, 1)  # timm rounds the sides of a crop of a few pixels to 0
        top, left = min(top, height - rows), min(left, width - columns)
        return resize(stored.crop(top, left, rows, columns, at_least=self._size), self._size, self._interpolation)

    def _padded_crop(self, stored: StoredImage) -> np.ndarray:
        height, width = stored.size()
        whole = stored.crop(0, 0, height, width, at_least=self._size)
        if whole.shape[:2] != self._size:
            whole = resize(whole, self._size, self._interpolation)
        padded = np.pad(whole, ((self._padding, self._padding), (self._padding, self._padding), (0, 0)))
        top, left = (random.randint(0, 2 * self._padding) for _ in range(2))
        return padded[top : top + self._size[0], left : left + self._size[1]]


class EvalTransform:
    """Resize and centre crop with Pillow, bit for bit as for the published numbers.

    Args:
        size: height and width of the result in pixels.
        interpolation: "bicubic" or "bilinear".
        crop: resize to `1 / crop_ratio` of `size` and crop the centre; otherwise resize directly to `size`.
        crop_ratio: side of the crop relative to the resized image.
        resize: "squash": both sides, without keeping the aspect ratio, as published; "shorter": the shorter side,
            keeping the aspect ratio; the centre is then cropped in any case.
    """

    def __init__(
        self, size: Size, *, interpolation: str, crop: bool, crop_ratio: float = 224 / 256, resize: str = "squash"
    ) -> None:
        self._size = size
        self._filter = Image.Resampling[interpolation.upper()]
        self._resized = tuple(int(side / crop_ratio) for side in size) if crop else size
        self._keeps_ratio = resize == "shorter"

    def __call__(self, stored: StoredImage) -> np.ndarray:
        """Return `[height, width, 3]`, uint8; raises `UnreadableImage`."""
        return np.asarray(self.apply(stored.decode()))

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the image resized and cropped."""
        height, width = self._resized
        if self._keeps_ratio:
            scale = max(height / image.height, width / image.width)
            height, width = max(height, round(image.height * scale)), max(width, round(image.width * scale))
        return transforms.functional.center_crop(image.resize((width, height), self._filter), list(self._size))


def eval_transform(size: Size, *, interpolation: str, crop: bool, **options: object) -> Callable[[Image.Image], Tensor]:
    """Return a function that applies `EvalTransform` to an image and normalises it: a tensor `[3, height, width]`."""
    resized = EvalTransform(size, interpolation=interpolation, crop=crop, **options)
    return transforms.Compose([resized.apply, transforms.PILToTensor(), normalize])


def resize(pixels: np.ndarray, size: Size, interpolation: str) -> np.ndarray:
    """Return pixels `[h, w, 3]`, uint8, resized with antialiasing."""
    if pixels.shape[:2] == size:
        return pixels
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    return F.interpolate(planes, size=size, mode=interpolation, antialias=True).permute(0, 2, 3, 1)[0].numpy()


def normalize(images: Tensor) -> Tensor:
    """Normalise `[..., 3, H, W]`, uint8, to float32 with ImageNet's mean and standard deviation, on its device."""
    mean, deviation = _statistics(images.device)
    return images.float().div_(255).sub_(mean).div_(deviation)


@cache  # a copy to a GPU in every step would wait for the step before it
@torch.inference_mode(False)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ImageNet's mean and standard deviation, `[3, 1, 1]` each."""
    mean, deviation = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device).view(2, 3, 1, 1)
    return mean, deviation


def as_pixels(image: Tensor) -> np.ndarray:
    """Return a normalised image `[3, H, W]` as pixels `[H, W, 3]`, uint8, on the CPU."""
    mean, deviation = _statistics(torch.device("cpu"))
    levels = (image.float().cpu() * deviation + mean) * 255
    return levels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


class Erase:
    """Random erasing of a normalised batch on its device, with the generators of Python and of the device.

    Args:
        probability: of each image.
        mode: "pixel" (noise), "rand" (one random colour) or "const" (the mean).
        count: largest number of erased areas.
    """

    def __init__(self, probability: float, *, mode: str, count: int) -> None:
        self._options = {"probability": probability, "mode": mode, "max_count": count}

    def __call__(self, images: Tensor) -> Tensor:
        """Erase areas of the images `[b, 3, H, W]` in place and return them."""
        return RandomErasing(**self._options, device=images.device)(images)


def _colour_transform(
    size: Size, interpolation: str, color_jitter: float, auto_augment: str
) -> Callable[[Image.Image], Image.Image] | None:
    """Return timm's transform between cropping and normalising, or None."""
    if not auto_augment and not color_jitter:
        return None
    try:
        _, colours, _ = create_transform(
            size,
            is_training=True,
            interpolation=interpolation,
            color_jitter=color_jitter or None,
            auto_augment=auto_augment or None,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError):
        raise ValueError(
            f"AUG.AUTO_AUGMENT {auto_augment!r} is not a policy of timm; use one such as rand-m9-mstd0.5-inc1, or '' "
            f"for none"
        ) from None
    for step in colours.transforms:
        for operation in _operations(step):
            operation.aug_fn = OPERATIONS.get(operation.name, operation.aug_fn)
    return colours


def _operations(step: object) -> list[AugmentOp]:
    """Return the operations of a timm policy of any kind."""
    return list(getattr(step, "ops", ())) + [operation for row in getattr(step, "policy", ()) for operation in row]
