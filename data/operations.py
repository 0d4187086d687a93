"""Replacements for operations of timm's augmentation policies: fixes and faster versions."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps

Operation = Callable[..., Image.Image]


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Keep the highest bits of every value.

    The strongest level of the recipe keeps no bits, which gives a black image; Pillow rejects it from version 13 on.
    """
    if bits_to_keep:
        return ImageOps.posterize(image, min(bits_to_keep, 8))
    return Image.new(image.mode, image.size)


def shear_x(image: Image.Image, factor: float, **options: object) -> Image.Image:
    """Shift every row by `factor` times its distance from the top."""
    return _shift_rows(image, factor, 0.0, **options)


def shear_y(image: Image.Image, factor: float, **options: object) -> Image.Image:
    """Shift every column by `factor` times its distance from the left."""
    return _shift_columns(image, factor, 0.0, **options)


def translate_x_rel(image: Image.Image, pct: float, **options: object) -> Image.Image:
    """Shift the image by a fraction of its width."""
    return _shift_rows(image, 0.0, pct * image.width, **options)


def translate_y_rel(image: Image.Image, pct: float, **options: object) -> Image.Image:
    """Shift the image by a fraction of its height."""
    return _shift_columns(image, 0.0, pct * image.height, **options)


def translate_x_abs(image: Image.Image, pixels: float, **options: object) -> Image.Image:
    """Shift the image by a number of pixels."""
    return _shift_rows(image, 0.0, pixels, **options)


def translate_y_abs(image: Image.Image, pixels: float, **options: object) -> Image.Image:
    """Shift the image by a number of pixels."""
    return _shift_columns(image, 0.0, pixels, **options)


# By timm's names.
OPERATIONS: dict[str, Operation] = {
    "Posterize": posterize,
    "PosterizeIncreasing": posterize,
    "PosterizeOriginal": posterize,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x_abs,
    "TranslateY": translate_y_abs,
    "TranslateXRel": translate_x_rel,
    "TranslateYRel": translate_y_rel,
}


def _shift_columns(image: Image.Image, slope: float, offset: float, **options: object) -> Image.Image:
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    return _shift_rows(turned, slope, offset, **options).transpose(Image.Transpose.TRANSPOSE)


def _shift_rows(
    image: Image.Image, slope: float, offset: float, *, fillcolor: tuple[int, int, int], resample: object, **_: object
) -> Image.Image:
    """Apply the affine map `(1, slope, offset, 0, 1, 0)` like `image.transform`, with Pillow's cubic filter.

    Pillow computes every value from sixteen pixels. This map does not mix rows, so four pixels are enough. One value in
    a thousand differs from Pillow's by one level, due to rounding.
    """
    filters = list(resample) if isinstance(resample, (list, tuple)) else [resample]
    chosen = random.choice(filters) if len(filters) > 1 else filters[0]  # drawn as timm draws it
    if chosen != Image.Resampling.BICUBIC:
        return image.transform(
            image.size, Image.Transform.AFFINE, (1, slope, offset, 0, 1, 0), resample=chosen, fillcolor=fillcolor
        )
    width, height = image.size
    shifts = slope * (np.arange(height)[:, None] + 0.5) + offset
    whole = np.floor(shifts)
    columns = np.clip(np.arange(-1, width + 2) + whole.astype(np.int64), 0, width - 1)
    pixels = np.asarray(image.convert("RGBA")).view(np.uint32).reshape(-1)  # four bytes move as one
    taps = np.take(pixels, columns + width * np.arange(height)[:, None]).view(np.uint8)
    values = _cubic(torch.from_numpy(taps).float(), torch.from_numpy(shifts - whole), 4 * width)
    shifted = values.clamp_(0, 255).byte().numpy().view(np.uint32)
    sources = np.arange(width, dtype=np.float32) + (shifts + 0.5).astype(np.float32)
    fill = np.frombuffer(bytes((*fillcolor, 255)), np.uint32)
    shifted = np.where((sources >= 0) & (sources < width), shifted, fill)
    return Image.fromarray(shifted.view(np.uint8).reshape(height, width, 4)).convert("RGB")


def _cubic(taps: torch.Tensor, d: torch.Tensor, width: int) -> torch.Tensor:
    """Interpolate at the fraction `d` between the second and third of four neighbouring pixels.

    The filter is the cubic with a = -1, as in Pillow, which truncates the result to integers. A small constant is added
    before, so that rounding errors of single precision do not darken areas of one colour.

    Args:
        taps: the pixels, `[rows, width + 12]`; neighbours are four bytes apart.
        d: `[rows, 1]`, from 0 to 1.
        width: bytes of a row of the result.

    Returns:
        `[rows, width]`.
    """
    weights = -d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2
    values = taps[:, :width] * weights[0].float()
    for place, weight in enumerate(weights[1:], 1):
        values.addcmul_(taps[:, 4 * place : 4 * place + width], weight.float())
    return values.add_(2**-10)
