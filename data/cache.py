"""Cache image files in memory, once for all processes of a machine."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from data.images import StoredImage, UnreadableImage
from data.listing import Listing, process_lock
from data.sources import ImageSource
from data.wording import counted

# Images read concurrently: network files have a high latency, not a low throughput.
_READERS = 16
# Fraction of the memory kept free.
_RESERVE = 0.1
_COLUMNS = {"offset": np.int64, "size": np.int64, "exif": np.uint8}


class CachedSource(ImageSource):
    """Images whose files are read once and then served from memory; decoding and augmentation are unchanged.

    The first process of a machine fills a file in memory, which all processes map. It is unlinked when the last one has
    mapped it, so the memory is freed when they exit, even if killed. If they are killed before that, the next run
    removes what they left: the first process holds a lock while it lives. Files that do not fit or cannot be read come
    from the source.

    Args:
        source: the stored images.
        folder: a folder in memory, such as `/dev/shm`.
        key: unique name of the cache, the same for all processes that share it.
        processes: number of processes that share it.
        is_main: whether this process shows progress.
        reserved: bytes to keep free for prefetched batches.
    """

    def __init__(
        self, source: ImageSource, folder: Path, key: str, *, processes: int, is_main: bool, reserved: float = 0
    ) -> None:
        self._source = source
        self.labels = source.labels
        content, table, opened, in_use = (
            folder / f"dat-{os.getuid()}-{key}.{kind}" for kind in ("data", "index", "opened", "lock")
        )
        with process_lock(content):
            with process_lock(folder):
                _remove_abandoned(folder)
                is_first = not in_use.exists()
                if is_first:
                    self._lock = FileLock(in_use)
                    self._lock.acquire()
            if is_first:
                _make(source, content, table, show=is_main, reserved=reserved)
            self._table = Listing.load(table)
            with content.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
            with opened.open("ab") as file:
                file.write(b".")
            if opened.stat().st_size == processes:
                _remove(in_use)

        if left := len(source) - len(self._table):
            self.warnings = [
                f"DATA.CACHE: {left} of {counted(len(source), 'image')} read from the disk, as {folder} is full after "
                f"{len(self._content) / 2**30:.1f} GiB"
            ]

    def cached(self) -> int:
        """Return how many images are in memory."""
        return int((self._table.numbers["size"] > 0).sum())

    def get(self, index: int) -> StoredImage:
        """Return a stored image; raises `UnreadableImage`."""
        if index >= len(self._table) or not self._table.numbers["size"][index]:
            return self._source.get(index)
        offset, size, exif = (int(self._table.numbers[name][index]) for name in _COLUMNS)
        name = os.fsdecode(self._table.name(index))
        return StoredImage(self._content[offset : offset + size], name, exif=bool(exif))


def _remove_abandoned(folder: Path) -> None:
    """Remove the caches of this user whose first process is dead."""
    for in_use in folder.glob(f"dat-{os.getuid()}-*.lock"):
        with suppress(Timeout), FileLock(in_use, blocking=False):
            _remove(in_use)


def _remove(in_use: Path) -> None:
    """Remove the files of a cache, given that of its lock."""
    for path in in_use.parent.glob(f"{in_use.stem}.*"):
        path.unlink()


class _SourceFailed(Exception):
    """The source raised the `OSError` that is the cause of this; other such errors are those of the cache."""


def _make(source: ImageSource, content: Path, table: Path, *, show: bool, reserved: float) -> None:
    """Write the files of images and their table.

    Raises:
        ValueError: the folder has no space even for the table.
        OSError: the machine failed to read an image.
    """
    try:
        Listing.of(_fill(source, content, show=show, reserved=reserved), _COLUMNS, {}).save(table)
    except _SourceFailed as failed:
        _remove(content.with_suffix(".lock"))
        raise failed.__cause__ from None
    except OSError as error:
        _remove(content.with_suffix(".lock"))
        raise ValueError(
            f"DATA.CACHE: {content.parent} cannot be written ({error.strerror}); free it, give the container more by "
            "--shm-size, or leave DATA.CACHE off"
        ) from None


def _fill(source: ImageSource, path: Path, *, show: bool, reserved: float) -> Iterator[tuple[bytes, int, int, int]]:
    """Concatenate image files while they fit, and yield name, offset, size and orientation of each."""
    offset, disk = 0, shutil.disk_usage(path.parent)
    room = disk.free - max(_RESERVE * disk.total, reserved)
    with path.open("wb") as file, ThreadPoolExecutor(_READERS) as readers:
        for first in tqdm(range(0, len(source), 1024), "reading images into memory", disable=None if show else True):
            indices = range(first, min(first + 1024, len(source)))
            for stored in readers.map(lambda index: _read(source, index), indices):
                size = len(stored.data) if stored and isinstance(stored.data, bytes) else 0
                if offset + size > room:
                    return
                if size:
                    file.write(stored.data)
                yield (os.fsencode(stored.name) if size else b""), offset, size, int(bool(size and stored.exif))
                offset += size


def _read(source: ImageSource, index: int) -> StoredImage | None:
    try:
        return source.get(index)
    except UnreadableImage:
        return None  # it is reported when it is used
    except OSError as error:
        raise _SourceFailed from error
