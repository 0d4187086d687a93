"""Scenes of handwritten digits with exact boxes, masks and class maps: dense prediction without a download.

Several digits of scikit-learn are drawn on a canvas with random sizes and colours, among lines and ellipses. A scene
depends only on its split and index; it is drawn on demand, and the last one is cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data.formats.digits import CLASSES, digits_of

SEED = 20
SIDE = 128  # of the canvas, in pixels
HELD_OUT = 150  # scenes
_DIGITS = (2, 6)  # minimum and maximum number in a scene
_SIZES = (18, 56)  # side of a digit before its margin is removed
_CLUTTER = (4, 9)  # lines and ellipses
_COVERED = 0.5  # ink from which on a pixel belongs to the digit
_TRIES = 30


@dataclass(frozen=True)
class Scene:
    """An image and the objects in it.

    Attributes:
        pixels: `[SIDE, SIDE, 3]`, uint8.
        boxes: `[n, 4]`, float32: x1, y1, x2, y2 in pixels, around the pixels of each mask.
        labels: `[n]`, int64: the digits.
        masks: `[n, SIDE, SIDE]`, bool; no two overlap.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray

    @property
    def class_map(self) -> np.ndarray:
        """Return `[SIDE, SIDE]`, uint8: 0 for the background and 1 + digit on the pixels of a digit."""
        return (self.masks * (self.labels[:, None, None] + 1)).sum(0).astype(np.uint8)


class DigitScenes:
    """The scenes of a split; splits have no digits in common.

    Args:
        train: whether these are the training scenes, or the held-out ones.
        scenes: number of training scenes; scene i does not depend on it.

    Attributes:
        classes: names by label.
    """

    classes = CLASSES

    def __init__(self, *, train: bool, scenes: int) -> None:
        self._digits = digits_of(train=train)
        self._part = 0 if train else 1
        self._length = scenes if train else HELD_OUT
        self._kept: dict[int, Scene] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Scene:
        if index not in self._kept:  # pixels and objects of a sample are requested one after the other
            self._kept = {index: self._draw(index)}
        return self._kept[index]

    def _draw(self, index: int) -> Scene:
        rng = np.random.default_rng((SEED, self._part, index))
        pixels = np.asarray(_background(rng), dtype=np.float32)
        taken = np.zeros((SIDE, SIDE), dtype=bool)
        found: list[tuple[list[int], int, np.ndarray]] = []
        for _ in range(rng.integers(_DIGITS[0], _DIGITS[1] + 1)):
            chosen = int(rng.integers(len(self._digits)))
            ink = self._ink(chosen, int(rng.integers(_SIZES[0], _SIZES[1] + 1)))
            place = _free_place(rng, ink.shape, taken)
            if place is None:  # the scene is full
                continue
            taken[place] = True
            pixels[place] += ink[..., None] * (_contrasting(rng, pixels[place]) - pixels[place])
            mask = np.zeros((SIDE, SIDE), dtype=bool)
            mask[place] = ink >= _COVERED
            top, left = place[0].start, place[1].start
            found.append(([left, top, left + ink.shape[1], top + ink.shape[0]], self._digits.label(chosen), mask))
        pixels += rng.normal(0, 6, pixels.shape)
        boxes, labels, masks = zip(*found, strict=True)
        return Scene(
            pixels.clip(0, 255).astype(np.uint8),
            np.array(boxes, dtype=np.float32),
            np.array(labels, dtype=np.int64),
            np.stack(masks),
        )

    def _ink(self, index: int, side: int) -> np.ndarray:
        """Return the ink of a digit from 0 to 1, `[h, w]`, without the margin around its mask."""
        grown = self._digits.read(index).convert("L").resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(grown, dtype=np.float32) / 255
        rows, columns = (np.flatnonzero((ink >= _COVERED).any(axis)) for axis in (1, 0))
        return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _background(rng: np.random.Generator) -> Image.Image:
    """Return a canvas of one colour with lines and ellipses in other colours."""
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(0, 120, 3).tolist()))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(*_CLUTTER)):
        points = rng.integers(0, SIDE, (2, 2))
        colour, width = tuple(rng.integers(30, 160, 3).tolist()), int(rng.integers(1, 4))
        if rng.random() < 0.5:
            draw.line(points.ravel().tolist(), fill=colour, width=width)
        else:
            draw.ellipse(np.sort(points, axis=0).ravel().tolist(), outline=colour, width=width)
    return canvas


def _free_place(rng: np.random.Generator, shape: tuple[int, ...], taken: np.ndarray) -> tuple[slice, slice] | None:
    """Return rows and columns of a random free position for a shape, or None if none was found."""
    for _ in range(_TRIES):
        top, left = (int(rng.integers(0, SIDE - side + 1)) for side in shape)
        place = slice(top, top + shape[0]), slice(left, left + shape[1])
        if not taken[place].any():
            return place
    return None


def _contrasting(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Return a colour that stands out from `pixels`."""
    return np.clip(pixels.mean((0, 1)) + rng.integers(70, 150, 3), 0, 255).astype(np.float32)
