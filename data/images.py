"""Read and decode images of any format."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

# Errors of the file itself. All others are errors of the machine, such as too many open files or a server that does not
# respond. EIO may be a single bad sector, but also a failing disk or network, for which every file fails; it is better
# to stop and name the file than to continue with substitutes.
_ERRORS_OF_FILES = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,  # a socket
    errno.EINVAL,  # a negative offset in a damaged file
}

# What turns stored pixels upright, by EXIF orientation: whether to exchange rows and columns, then the steps in which
# the new rows and columns are taken.
_TURNS = {
    1: (False, 1, 1),
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


class UnusableImage(ValueError):
    """An image that cannot be used, found while a run reads its data. The message is one line that says which, and why.

    Args:
        message: the line, or a traceback that ends with it.
    """

    def __init__(self, message: str) -> None:
        # For an exception in a worker, DataLoader raises the same class with the traceback as its message.
        line = message.strip().rpartition("\n")[2]
        super().__init__(line.removeprefix(f"{__name__}.{type(self).__name__}: "))


class UnreadableImage(UnusableImage):
    """A file that cannot be decoded.

    Args:
        message: as for `UnusableImage`.
        path: the file; empty if the exception was raised in a `DataLoader` worker.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class StoredImage:
    """An image as stored in a data set.

    Args:
        data: the bytes of an image file, or decoded pixels `[height, width]` or `[height, width, 3]`, uint8.
        name: its name in messages: the path, or the position in an archive.
        exif: whether to apply the EXIF orientation.
    """

    def __init__(self, data: bytes | np.ndarray, name: str, *, exif: bool = False) -> None:
        self.data = data
        self.name = name
        self.exif = exif
        self._pixels: np.ndarray | None = None
        self._size: tuple[int, ...] | None = None
        self._orientation = 1

    def decode(self) -> Image.Image:
        """Return the first frame as 8-bit RGB, decoded by Pillow.

        Transparency is dropped. 16-bit grey images are scaled to 8 bits.

        Raises:
            UnreadableImage: it is damaged, not an image, has no pixels, or exceeds Pillow's limit against decompression
                bombs.
            MemoryError: out of memory.
        """
        if isinstance(self.data, np.ndarray):
            return Image.fromarray(self.data).convert("RGB")
        with _naming_image(self.name), warnings.catch_warnings():
            # Damaged metadata and transparent palettes are common and harmless, but would warn in every worker.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(self.data)) as image:
                orientation = orientation_of(image) if self.exif else 1
                pixels = _to_rgb(image)
                return pixels if orientation == 1 else Image.fromarray(_turned(np.asarray(pixels), orientation))

    def describe(self) -> tuple[str, int]:
        """Return Pillow's name of the file format and the EXIF orientation, from the header; "" and 1 for pixels.

        Raises:
            UnreadableImage: it is not an image.
        """
        if isinstance(self.data, np.ndarray):
            return "", 1
        with _naming_image(self.name), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(self.data)) as image:
                return image.format, orientation_of(image)

    def values(self) -> np.ndarray:
        """Return the values of a single-channel file, `[height, width]`; for a palette, the indices.

        Raises:
            UnreadableImage: it cannot be read, or has several channels.
        """
        with _naming_image(self.name), Image.open(io.BytesIO(self.data)) as image:
            if len(image.getbands()) > 1 or image.mode == "F":
                raise ValueError(f"its mode is {image.mode}; a mask has one channel, whose values are labels")
            return np.asarray(image).astype(np.int32)

    def size(self) -> tuple[int, int]:
        """Return height and width in pixels; raises the errors of `decode`."""
        return self._jpeg_size() or self._whole().shape[:2]

    def crop(self, top: int, left: int, height: int, width: int, *, at_least: tuple[int, int]) -> np.ndarray:
        """Return a crop of the image, `[h, w, 3]`, uint8, possibly decoded at a smaller scale.

        JPEG files are decoded by libjpeg-turbo at a half, a quarter or an eighth of their size if the crop then still
        has a height and width of `at_least`; otherwise the pixels are those of `decode`.

        Raises:
            UnreadableImage: see `decode`.
        """
        whole = self.size()
        pixels = self._scaled(max(at_least[0] / height, at_least[1] / width))
        down, across = pixels.shape[0] / whole[0], pixels.shape[1] / whole[1]
        rows = slice(int(top * down), math.ceil((top + height) * down))
        part = pixels[rows, int(left * across) : math.ceil((left + width) * across)]
        return part if self._orientation == 1 else np.ascontiguousarray(part)  # PyTorch has no negative strides

    def _scaled(self, scale: float) -> np.ndarray:
        """Return the pixels; JPEG files at the smallest of the scales 1/8, 1/4, 1/2, 1 that is at least `scale`."""
        if (size := self._jpeg_size()) is None:
            return self._whole()
        height, width = (math.ceil(side * scale) for side in _turned_size(size, self._orientation))
        # Scales between 1/2 and 1 are slower than full size.
        least = {} if scale > 0.5 else {"min_height": height, "min_width": width, "min_factor": 2}
        try:
            pixels = simplejpeg.decode_jpeg(self.data, **least)
        except ValueError:  # damaged; Pillow decides whether it can still be read
            self._size = ()
            return self._whole()
        return _turned(pixels, self._orientation)

    def _whole(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels = np.array(self.decode())
        return self._pixels

    def _jpeg_size(self) -> tuple[int, int] | None:
        """Return height and width, upright, of a JPEG file for which libjpeg-turbo gives the same pixels as Pillow."""
        if self._size is None:
            self._size = ()
            if isinstance(self.data, bytes) and self.data.startswith(b"\xff\xd8"):
                with suppress(ValueError):
                    height, width, colours, _ = simplejpeg.decode_jpeg_header(self.data)
                    if colours in ("YCbCr", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf):
                        if self.exif:
                            self._orientation = self.describe()[1]
                        self._size = _turned_size((height, width), self._orientation)
        return self._size or None


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image file.

    Raises:
        UnreadableImage: the file is missing or not accessible.
        OSError: an error of the machine, not of the file, which is still named.
        MemoryError: out of memory.
    """
    with _naming_image(os.fspath(path)):
        return Path(path).read_bytes()


def read_image(path: str | os.PathLike[str], *, exif: bool = False) -> Image.Image:
    """Decode an image file to 8-bit RGB; see `read_file` and `StoredImage`."""
    return StoredImage(read_file(path), os.fspath(path), exif=exif).decode()


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened file that Pillow does not apply, 1 to 8.

    It is 1 if there is none, if the metadata is damaged, and for TIFF files, which Pillow turns upright itself.
    """
    if image.format == "TIFF":
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # parsers can raise any exception on damaged metadata, which says nothing about the pixels
        return 1
    return orientation if orientation in _TURNS else 1


def _turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if _TURNS[orientation][0] else size


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of stored pixels `[height, width, 3]` that is upright."""
    exchanged, down, across = _TURNS[orientation]
    return (pixels.swapaxes(0, 1) if exchanged else pixels)[::down, ::across]


@contextmanager
def _naming_image(name: str) -> Iterator[None]:
    """Add the name of the image to exceptions, and raise errors of the image itself as `UnreadableImage`."""
    try:
        yield
    except MemoryError:
        raise MemoryError(f"no memory left to read image {name!r}") from None
    except Exception as error:  # decoders can raise any exception on damaged files
        if isinstance(error, OSError) and error.errno and error.errno not in _ERRORS_OF_FILES:
            raise OSError(error.errno, error.strerror, name) from None
        reason = re.sub(r" <_io\.BytesIO.*?>", "", " ".join(str(error).split())) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UnreadableImage(f"cannot read image {name!r}: {reason}", name) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _scale_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    return image.convert("RGB")


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """Scale grey values from 0..65535, stored as 16- or 32-bit integers, to 0..255. Pillow's conversion would clip."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values from {values.min()} to {values.max()} do not fit 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
