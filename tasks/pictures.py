"""Pictures of class maps: each class has its colour, over the image that it was found in."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.segmentation.sources import IGNORED

_OPACITY = 0.65
_GOLDEN = 0.618034  # turns of the hue from each class to the next, which keep neighbours apart
_HEIGHT = 192  # pixels of a row


def palette() -> np.ndarray:
    """Return the colour of each class, `[256, 3]`, uint8; that of `IGNORED` is black."""
    colours = [
        colorsys.hsv_to_rgb(_GOLDEN * i % 1, 0.85 - 0.3 * (i // 7 % 2), 1 - 0.35 * (i // 14 % 2)) for i in range(256)
    ]
    colours[IGNORED] = (0, 0, 0)
    return (255 * np.array(colours)).round().astype(np.uint8)


def paint(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the colours of a class map over its image.

    Args:
        pixels: `[h, w, 3]`, uint8, of any size.
        labels: classes `[height, width]`, `IGNORED` where none is known.

    Returns:
        `[height, width, 3]`, uint8.
    """
    below = np.asarray(Image.fromarray(pixels).resize(labels.shape[::-1]), dtype=np.float32)
    return (_OPACITY * palette()[labels] + (1 - _OPACITY) * below).round().astype(np.uint8)


def stack_rows(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Return pictures `[h, w, 3]` of each row side by side, at one height, and the rows one below the other."""
    drawn = []
    for row in rows:
        scaled = [Image.fromarray(x).resize((max(1, round(x.shape[1] * _HEIGHT / x.shape[0])), _HEIGHT)) for x in row]
        drawn.append(np.concatenate([np.asarray(picture) for picture in scaled], axis=1))
    widest = max(row.shape[1] for row in drawn)
    return np.concatenate([np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0))) for row in drawn])
