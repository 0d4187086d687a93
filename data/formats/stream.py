"""Shards that are read sequentially, from pipes and object stores, through the library WebDataset."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.formats.folders import image_extensions
from data.formats.labels import ClassList, label_of
from data.images import StoredImage, UnusableImage
from data.sources import Dataset, Request, split_labels, to_matrix
from data.wording import shorten

LAYOUT = (
    "DATA_PATH is a folder with classes.txt, a class on each line; DATA.TRAIN and DATA.VAL say where shards come from, "
    "such as 'pipe:aws s3 cp s3://bucket/train-{000000..001281}.tar -', with members <key>.jpg and <key>.cls (a label)"
)
_END = 2 * tarfile.BLOCKSIZE
_GZIP = b"\x1f\x8b"
# Warning for every run that trains on a stream.
APPROXIMATE = (
    "training images are read as a stream, in an approximately random order: an epoch is {} images "
    "(DATA.STREAM.IMAGES), some may appear twice and others not at all; docs/data.md describes the limitations"
)


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """Labelled images in shards of WebDataset's layout that are read sequentially.

    Attributes:
        urls: the URLs of the shards, as accepted by `webdataset.gopen`: `pipe:` and a command, a URL, a file.
        listed: the classes, as written in the shards.
        labels: their labels, `[classes]`.
        length: images per epoch.
        exif: whether to apply the EXIF orientation.
        multi_label: whether an image may have several labels, or none.
        warnings: warnings for the log, about how they are read.
    """

    urls: Sequence[str]
    listed: ClassList
    labels: np.ndarray
    length: int
    exif: bool = False
    multi_label: bool = False
    warnings: Sequence[str] = ()

    def __len__(self) -> int:
        return self.length

    def relabelled(self, lookup: np.ndarray) -> ImageStream:
        """Return the same images with `lookup[label]` as the label of each."""
        return replace(self, labels=lookup[self.labels])

    def read(self, url: str) -> Iterator[tuple[StoredImage, int | np.ndarray]]:
        """Yield the images of a shard with their labels.

        Raises:
            OSError: the shard cannot be read to its end, or has no image.
            UnusableImage: an image has no label, or an unknown one.
        """
        first, found = None, False
        for sample in _samples(url):
            first = first or sample
            ending = next((key for key in sample if f".{key}" in image_extensions()), None)
            if ending is not None:
                found = True
                name = f"{url}/{sample['__key__']}.{ending}"
                yield StoredImage(sample[ending], name, exif=self.exif), self._label(sample, name)
        if not found:
            held = [f"{first['__key__']}.{key}" for key in first if not key.startswith("__")]
            raise OSError(
                f"shard {url} has no image: its first sample is {shorten(held)}; the extension begins at the first dot "
                f"of a name, and that of an image is .jpg, .png or another of the {len(image_extensions())} that "
                "Pillow reads"
            )

    def _label(self, sample: dict[str, Any], name: str) -> int | np.ndarray:
        written = next((label_of(sample[key], f".{key}") for key in ("cls", "json") if key in sample), None)
        if written is None:
            raise UnusableImage(f"{name!r} has no label; {LAYOUT}")
        names = split_labels(written) if self.multi_label else (written,)
        try:
            labels = [int(self.labels[self.listed.label(one)]) for one in names]
        except ValueError as error:
            raise UnusableImage(f"{name!r}: {error}") from None
        return to_matrix([labels], len(self.labels))[0] if self.multi_label else labels[0]


def open_stream(request: Request) -> Dataset:
    """Open a data set of streamed shards; none is read yet.

    Raises:
        ValueError: a split is not given, has no size or an invalid name, or the list of classes is missing.
    """
    root = request.existing_root(LAYOUT)
    listed = ClassList.of_shards(root)
    if not listed.names:
        raise ValueError(f"{root} has no classes.txt; {LAYOUT}")
    streams = {}
    for split in request.needs:
        length = _length(request, split)
        streams[split] = ImageStream(
            urls=_shards(request, split),
            listed=listed,
            labels=np.arange(len(listed.names)),
            length=length,
            exif=request.exif,
            multi_label=request.multi_label,
            warnings=[APPROXIMATE.format(length)] if split == "train" else [],
        )
    return Dataset(classes=listed.names, train=streams.get("train"), held_out=streams.get("val"))


def _shards(request: Request, split: str) -> list[str]:
    """Return the shards of a split, with braces expanded."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise ValueError("DATA.DATASET webdataset needs the package webdataset: pip install webdataset") from None
    given = getattr(request, split)
    if not given:
        raise ValueError(f"DATA.DATASET webdataset needs DATA.{split.upper()}; {LAYOUT}")
    try:
        return expand_urls(given)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"DATA.{split.upper()} {given}: {error}; {LAYOUT}") from None


def _length(request: Request, split: str) -> int:
    key = {"train": "DATA.STREAM.IMAGES", "val": "DATA.STREAM.VAL_IMAGES"}[split]
    length = request.stream_images[split]
    if not length:
        raise ValueError(f"the number of images of a stream is unknown; set {key}")
    return length


def _samples(url: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard: the files of one key together."""
    from webdataset import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    found, damage = False, None
    try:
        stream = _Watched(gopen(url))
        try:
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                found = True
                yield sample
        except (ValueError, tarfile.TarError) as error:
            damage = error
        stream.finish()  # raises if the command failed, which explains a damaged archive
        if damage:
            raise damage
        if not stream.is_whole():  # tarfile does not detect a truncation between two members
            raise ValueError("unexpected end of data")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise OSError(f"shard {url} cannot be read to its end: {_reason(error)}") from None
    if not found:
        raise OSError(f"shard {url} is empty")


class _Watched:
    """A stream that detects whether the archive was complete: it ends with two blocks of zeros."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._first = self._last = b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._first = self._first or data[:2]
        self._last = (self._last + data[-_END:])[-_END:]
        return data

    def finish(self) -> None:
        """Read the padding of the archive, so that the command can end; raise `OSError` if it failed."""
        while self.read(2**16):
            pass
        self._stream.close()

    def is_whole(self) -> bool:
        return self._last == bytes(_END) or self._first == _GZIP  # gzip has checksums


def _reason(error: Exception) -> str:
    """Return the message of an error of WebDataset, without object representations."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error.args[0])
    status = re.search(r"exit (-?\d+)", text)
    return f"the command ended with status {status[1]}" if status else text.partition(" @ ")[0]
