"""Pictures of class maps and objects drawn over their image, with one colour per class."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from data.segmentation.sources import IGNORED

_OPACITY = 0.65
_GOLDEN = 0.618034  # hue step between consecutive classes; the golden ratio keeps them distinct
SAMPLES = 4  # images in the picture of an evaluation
SHOWN = 0.5  # minimum score of drawn objects
_HEIGHT = 288  # height of a row in pixels
_TITLE = 20  # height of a title in pixels
_LEGEND = 20  # maximum classes in a legend
_LEGIBLE = 480  # longest side in pixels up to which a legend has the size of a title; it grows with larger pictures
_LETTERS = 30  # of a name in a legend
_SIDE = 256  # minimum short side in pixels for legible names


def palette() -> np.ndarray:
    """Return the colour of each class, `[256, 3]`, uint8; that of `IGNORED` is black."""
    colours = [
        colorsys.hsv_to_rgb(_GOLDEN * i % 1, 0.85 - 0.3 * (i // 7 % 2), 1 - 0.35 * (i // 14 % 2)) for i in range(256)
    ]
    colours[IGNORED] = (0, 0, 0)
    return (255 * np.array(colours)).round().astype(np.uint8)


def paint(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw a class map over its image.

    Args:
        pixels: `[h, w, 3]`, uint8, of any size.
        labels: classes `[height, width]`, `IGNORED` where unknown.

    Returns:
        `[height, width, 3]`, uint8.
    """
    below = np.asarray(Image.fromarray(pixels).resize(labels.shape[::-1]), dtype=np.float32)
    return (_OPACITY * palette()[labels] + (1 - _OPACITY) * below).round().astype(np.uint8)


def with_legend(pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Return a painted class map with the colours of its largest classes on the right.

    Args:
        pixels: `[h, w, 3]`, uint8, as `paint` returns it.
        labels: classes of the pixels, `[h, w]`.
        classes: names by label.
    """
    counts = np.bincount(labels.ravel(), minlength=len(classes))[: len(classes)]
    present = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    colours = palette()[present[:_LEGEND]]
    names = [_shortened(classes[label]) for label in present[:_LEGEND]]
    if len(present) > _LEGEND:
        names.append(f"and {len(present) - _LEGEND} more")
    step = round(_TITLE * max(1.0, max(pixels.shape[:2]) / _LEGIBLE))
    font, side = ImageFont.load_default(0.7 * step), round(0.7 * step)
    width = step + side + round(max(map(font.getlength, names), default=0))
    picture = Image.new("RGB", (pixels.shape[1] + width, max(pixels.shape[0], step * len(names))), "white")
    picture.paste(Image.fromarray(pixels))
    draw, left = ImageDraw.Draw(picture), pixels.shape[1] + step // 4
    for row, name in enumerate(names):
        top = step * row + step // 8
        if row < len(colours):
            draw.rectangle((left, top, left + side, top + side), tuple(colours[row].tolist()), "black")
        draw.text((left + step, top - step // 20), name, "black", font)
    return np.asarray(picture)


def _shortened(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"


def draw_objects(
    pixels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    words: Sequence[str],
    masks: Sequence[dict[str, Any]] | None = None,
) -> np.ndarray:
    """Draw objects over an image, which is enlarged if small; the first objects are on top.

    Args:
        pixels: `[h, w, 3]`, uint8.
        boxes: `[n, 4]`: x1, y1, x2, y2 in pixels.
        labels: `[n]`, which determine the colours.
        words: text at each box.
        masks: run-length encoded, or None.
    """
    scale = max(1, round(_SIDE / min(pixels.shape[:2])))
    image = torch.from_numpy(_enlarged(pixels, scale)).permute(2, 0, 1)
    if not len(boxes):
        return image.permute(1, 2, 0).numpy()
    boxes, words, masks = boxes[::-1].copy(), list(words)[::-1], None if masks is None else list(masks)[::-1]
    colours = [tuple(colour) for colour in palette()[labels[::-1] % 256].tolist()]
    if masks is not None:
        covered = torch.from_numpy(_enlarged(rle.decode(masks), scale)).permute(2, 0, 1).bool()
        image = draw_segmentation_masks(image, covered, alpha=1 - _OPACITY, colors=colours)
    image = draw_bounding_boxes(image, torch.from_numpy(boxes) * scale, words, colours, fill_labels=True, width=2)
    return image.permute(1, 2, 0).numpy()


def _enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Return `[h, w, c]` with each pixel `scale` times in both directions."""
    return np.ascontiguousarray(pixels.repeat(scale, 0).repeat(scale, 1))


def stack_rows(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> np.ndarray:
    """Return pictures `[h, w, 3]` of each row side by side, at one height, and the rows one below the other.

    Args:
        rows: pictures of each row.
        titles: written above the pictures of each row.
    """
    drawn = [np.concatenate([_titled(*column) for column in zip(row, titles, strict=True)], axis=1) for row in rows]
    widest = max(row.shape[1] for row in drawn)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0)), constant_values=255) for row in drawn]
    )


def _titled(pixels: np.ndarray, title: str) -> np.ndarray:
    """Return a picture at the height of a row, below its title."""
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels).resize((max(1, round(width * _HEIGHT / height)), _HEIGHT))
    picture = ImageOps.expand(picture, (0, _TITLE, 0, 0), "white")
    ImageDraw.Draw(picture).text((4, 2), title, "black", ImageFont.load_default(_TITLE - 6))
    return np.asarray(picture)
