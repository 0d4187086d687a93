"""Shards that can be read from the beginning alone, out of pipes and object stores, through the library WebDataset."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.formats.folders import endings
from data.formats.tar import label_of
from data.images import StoredImage
from data.sources import Dataset, Request, read_class_list, split_labels, to_matrix

LAYOUT = (
    "DATA_PATH is a folder with classes.txt, a class on each line; DATA.TRAIN and DATA.VAL say where shards come from, "
    "such as 'pipe:aws s3 cp s3://bucket/train-{000000..001281}.tar -', with members <key>.jpg and <key>.cls (a label)"
)
_END = 2 * tarfile.BLOCKSIZE
_GZIP = b"\x1f\x8b"
# What the log says of every run that trains on a stream.
APPROXIMATE = (
    "training images come as a stream, in an order that is approximately random: an epoch is {} images "
    "(DATA.STREAM.IMAGES), of which some may come twice and others not at all; docs/data.md has what else is given up"
)


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """Labelled images in shards of WebDataset's layout that are read one after the other.

    Attributes:
        urls: of the shards, as `webdataset.gopen` takes them: `pipe:` and a command, an address, a file.
        labels: by what the shards call them.
        length: images of an epoch.
        turn: whether to apply the EXIF orientation.
        multi_label: whether an image may have several labels, or none.
        remarks: warnings for the log about how they are read.
    """

    urls: Sequence[str]
    labels: Mapping[str, int]
    length: int
    turn: bool = False
    multi_label: bool = False
    remarks: Sequence[str] = ()

    def __len__(self) -> int:
        return self.length

    def relabelled(self, lookup: np.ndarray) -> ImageStream:
        """Return the same images with `lookup[label]` as the label of each."""
        return replace(self, labels={name: int(lookup[label]) for name, label in self.labels.items()})

    def read(self, url: str) -> Iterator[tuple[StoredImage, int | np.ndarray]]:
        """Yield the images of a shard with their labels.

        Raises:
            OSError: the shard cannot be read to its end.
            ValueError: for an image without a label, or with one that there is not.
        """
        for sample in _samples(url):
            ending = next((key for key in sample if f".{key}" in endings()), None)
            if ending is not None:
                name = f"{url}/{sample['__key__']}.{ending}"
                yield StoredImage(sample[ending], name, turn=self.turn), self._label(sample, name)

    def _label(self, sample: dict[str, Any], name: str) -> int | np.ndarray:
        written = next((label_of(sample[key], f".{key}") for key in ("cls", "json") if key in sample), None)
        if written is None:
            raise ValueError(f"{name} has no label; {LAYOUT}")
        names = split_labels(written) if self.multi_label else (written,)
        unknown = next((one for one in names if one not in self.labels), None)
        if unknown is not None:
            raise ValueError(f"{name} has the label {unknown!r}, which is no class of classes.txt and no line of it")
        places = [self.labels[one] for one in names]
        return to_matrix([places], 1 + max(self.labels.values()))[0] if self.multi_label else places[0]


def open_stream(request: Request) -> Dataset:
    """Open a data set whose shards come as streams. None is read yet.

    Raises:
        ValueError: for a part that is not named, has no size or no readable name, and a missing list of classes.
    """
    root = request.root(LAYOUT)
    classes = read_class_list(root)
    if not classes:
        raise ValueError(f"{root} holds no classes.txt; {LAYOUT}")
    labels = {name: label for label, name in enumerate(classes)} | {str(label): label for label in range(len(classes))}
    parts = {}
    for part in request.needs:
        length = _length(request, part)
        parts[part] = ImageStream(
            urls=_shards(request, part),
            labels=labels,
            length=length,
            turn=request.turn,
            multi_label=request.multi_label,
            remarks=[APPROXIMATE.format(length)] if part == "train" else [],
        )
    return Dataset(classes=classes, train=parts.get("train"), held_out=parts.get("val"))


def _shards(request: Request, part: str) -> list[str]:
    """Return the shards that the name of a part stands for: braces are unfolded."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise ValueError("DATA.DATASET webdataset needs the package webdataset: pip install webdataset") from None
    given = getattr(request, part)
    if not given:
        raise ValueError(f"DATA.DATASET webdataset needs DATA.{part.upper()}; {LAYOUT}")
    try:
        return expand_urls(given)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"DATA.{part.upper()} {given}: {error}; {LAYOUT}") from None


def _length(request: Request, part: str) -> int:
    key = {"train": "DATA.STREAM.IMAGES", "val": "DATA.STREAM.VAL_IMAGES"}[part]
    length = request.stream_images[part]
    if not length:
        raise ValueError(f"the images of a stream cannot be counted beforehand; say how many there are by {key}")
    return length


def _samples(url: str) -> Iterator[dict[str, Any]]:
    """Yield what a shard holds, the files of one key together."""
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
        stream.finish()  # which raises where the command failed; that explains a damaged archive
        if damage:
            raise damage
        if not stream.is_whole():  # of which tarfile says nothing between two members
            raise ValueError("unexpected end of data")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise OSError(f"shard {url} cannot be read to its end: {_reason(error)}") from None
    if not found:
        raise OSError(f"shard {url} holds nothing")


class _Watched:
    """A stream that knows whether it was an archive to its end, which is two blocks of zeros."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._first = self._last = b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._first = self._first or data[:2]
        self._last = (self._last + data[-_END:])[-_END:]
        return data

    def finish(self) -> None:
        """Read what pads the archive, so that a command can end, and raise `OSError` where it failed."""
        while self.read(2**16):
            pass
        self._stream.close()

    def is_whole(self) -> bool:
        return self._last == bytes(_END) or self._first == _GZIP  # which has checksums of its own


def _reason(error: Exception) -> str:
    """Return what WebDataset's errors say, without the objects that they show."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error.args[0])
    status = re.search(r"exit (-?\d+)", text)
    return f"the command ended with status {status[1]}" if status else text.partition(" @ ")[0]
