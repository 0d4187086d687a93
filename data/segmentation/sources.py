"""Segmentation data sets, independent of their format, and reading masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from data.images import StoredImage, UnreadableImage, read_file

IGNORED = 255  # label of pixels that are ignored; so there are at most 255 classes


class MaskedSource(ABC):
    """Stored images, and the class of each of their pixels."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def get(self, index: int) -> StoredImage:
        """Return a stored image; raises `UnreadableImage`."""

    @abstractmethod
    def mask(self, index: int) -> np.ndarray:
        """Return the classes `[height, width]` of its pixels, uint8, `IGNORED` where unknown.

        Raises:
            UnreadableImage: they cannot be read, or a label is not a class.
        """

    def pair(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return an image as RGB and the classes of its pixels.

        Raises:
            UnreadableImage: one of them cannot be read, or their sizes differ.
        """
        stored, mask = self.get(index), self.mask(index)
        image = stored.decode()
        if (image.height, image.width) != mask.shape:
            raise UnreadableImage(
                f"image {stored.name!r} is {image.width} x {image.height} pixels, its mask {mask.shape[1]} x "
                f"{mask.shape[0]}; they must have the same size",
                stored.name,
            )
        return image, mask


@dataclass(frozen=True, kw_only=True)
class MaskedDataset:
    """A data set of segmentation.

    Attributes:
        classes: names by label.
        train: training images; None if not requested.
        held_out: held-out images; None if not requested.
        format_warnings: warnings from the format.
    """

    classes: list[str]
    train: MaskedSource | None = None
    held_out: MaskedSource | None = None
    format_warnings: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Mapping from the values of mask files to classes.

    Attributes:
        mapping: class by value; other values are ignored. Empty: each value is a class.
        reduce_zero: ignore 0 and subtract one from all other values, as in ADE20K.
        ignored: value of pixels that are ignored.
    """

    mapping: Mapping[int, int] = field(default_factory=dict)
    reduce_zero: bool = False
    ignored: int = IGNORED

    def table(self) -> np.ndarray:
        """Return the class by value, `[256]`, uint8."""
        table = np.arange(256)
        if self.mapping:
            table = np.full(256, IGNORED)
            table[list(self.mapping)] = list(self.mapping.values())
        if self.reduce_zero:
            table = np.where((table == 0) | (table == IGNORED), IGNORED, table - 1)
        table[self.ignored] = IGNORED
        return table.astype(np.uint8)

    def check_unmapped(self, by: str) -> None:
        """Check that every option has its default.

        Args:
            by: what has no use for them, for the message.

        Raises:
            ValueError: one has another value.
        """
        for option, value, default in (
            ("LABEL_MAP", self.mapping, {}),
            ("REDUCE_ZERO_LABEL", self.reduce_zero, False),
            ("IGNORE_LABEL", self.ignored, IGNORED),
        ):
            if value != default:
                raise ValueError(f"DATA.{option} is not supported by {by}; leave it at {default}")


def read_mask(path: str, table: np.ndarray, classes: int) -> np.ndarray:
    """Return the classes `[height, width]` in a mask file, uint8.

    Args:
        path: an image with one channel, or with a palette, of which the indices are used.
        table: class by value, see `Labels.table`.
        classes: their number.

    Raises:
        UnreadableImage: the file is not such an image, or a label is not a class.
    """
    values = StoredImage(read_file(path), path).values()
    if not 0 <= values.min() <= values.max() <= 255:
        raise UnreadableImage(
            f"mask {path!r} has values from {values.min()} to {values.max()}; they must be 0 to 255", path
        )
    mask = table[values.astype(np.uint8)]
    wrong = (mask >= classes) & (mask != IGNORED)
    if wrong.any():
        raise UnreadableImage(
            f"mask {path!r} has the value {values[wrong].min()}, which is none of the {classes} classes; add classes, "
            f"or define it with DATA.LABEL_MAP, DATA.IGNORE_LABEL or DATA.REDUCE_ZERO_LABEL",
            path,
        )
    return mask


def check_some(dataset: MaskedDataset, most: int = 8) -> None:
    """Check a few images of each split with their masks. Unreadable images are handled when they are used.

    Raises:
        UnreadableImage: a mask is wrong.
    """
    for source in filter(None, (dataset.train, dataset.held_out)):
        for index in np.linspace(0, len(source) - 1, min(most, len(source))).astype(int).tolist():
            try:
                source.get(index).decode()
            except UnreadableImage:
                continue
            source.pair(index)
