"""Names, labels and offsets of many images in a few arrays that processes share."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

_MAGIC = b"dat listing 1\n"
_ALIGNMENT = 64
_USER = os.getuid() if hasattr(os, "getuid") else 0  # temporary folders of Windows are not shared by users


class Listing:
    """A table of images: a name and a few integers each.

    Python objects would be copied into every worker that accesses them, because of reference counts; arrays are shared
    with forked workers. When loaded from a file they are memory-mapped and shared by all processes of a machine.

    Args:
        text: the concatenated names, uint8.
        ends: end of each name in `text`, `[n]`.
        numbers: further columns, `[n]` each.
        about: metadata of the whole table, as JSON.
        path: the file it was loaded from.
    """

    def __init__(
        self,
        text: np.ndarray,
        ends: np.ndarray,
        numbers: dict[str, np.ndarray],
        about: dict[str, Any],
        path: Path | None = None,
    ) -> None:
        self._text = text
        self._ends = ends
        self.numbers = numbers
        self.about = about
        self.path = path

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]], columns: dict[str, type[np.generic]], about: dict[str, Any]) -> Listing:
        """Build a table from rows of a name (bytes) and one integer for each of `columns`.

        `about` is used after the rows are read, so reading them may fill it.
        """
        text, ends, numbers = bytearray(), array("q"), [array("q") for _ in columns]
        for name, *values in rows:
            text += name
            ends.append(len(text))
            for column, value in zip(numbers, values, strict=True):
                column.append(value)
        arrays = {
            key: np.frombuffer(column, np.int64).astype(dtype)
            for (key, dtype), column in zip(columns.items(), numbers, strict=True)
        }
        width = np.uint32 if len(text) < 2**32 else np.int64
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64).astype(width), arrays, about)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> bytes:
        """Return the name of an image."""
        begin = int(self._ends[index - 1]) if index else 0
        return self._text[begin : int(self._ends[index])].tobytes()

    def __reduce__(self) -> tuple:
        """Pickle the path of a file instead of its content; workers that are not forked map it again."""
        if self.path:
            return Listing.load, (self.path,)
        return Listing, (self._text, self._ends, self.numbers, self.about)

    def save(self, path: Path) -> None:
        """Write the table atomically."""
        arrays = {"text": self._text, "ends": self._ends, **self.numbers}
        columns = {key: [column.dtype.str, len(column)] for key, column in arrays.items()}
        header = json.dumps({"about": self.about, "columns": columns}).encode() + b"\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Process ids are not unique: processes on several machines may write the same file.
        staged = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            with staged.open("wb") as file:
                file.write(_MAGIC + header)
                for column in arrays.values():
                    file.write(bytes(-file.tell() % _ALIGNMENT))
                    file.write(memoryview(np.ascontiguousarray(column)).cast("B"))
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)

    def shared(self, path: Path) -> Listing:
        """Write the table to `path` and return it memory-mapped; this one if `path` cannot be written."""
        try:
            self.save(path)
        except OSError:  # such as a home folder without write permission
            return self
        return Listing.load(path)

    @classmethod
    def load(cls, path: Path) -> Listing:
        """Memory-map a table written by `save`.

        Raises:
            ValueError: the file is something else or truncated.
        """
        damaged = ValueError(f"index {path} is damaged or not an index; delete it to rebuild it")
        try:
            with path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise damaged
                header = json.loads(file.readline())
                columns, about = header["columns"].items(), header["about"]
                position, arrays, size = file.tell(), {}, path.stat().st_size
        except (ValueError, KeyError, TypeError, IsADirectoryError):
            raise damaged from None
        content = np.memmap(path, np.uint8, "r")
        for key, (dtype, length) in columns:
            position += -position % _ALIGNMENT
            end = position + length * np.dtype(dtype).itemsize
            if end > size:
                raise damaged
            arrays[key], position = content[position:end].view(dtype), end
        return cls(arrays.pop("text"), arrays.pop("ends"), arrays, about, path)


@contextmanager
def process_lock(path: Path) -> Iterator[None]:
    """Hold a lock for `path` that excludes other processes of this user on this machine."""
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir(), f"dat-{_USER}-{name}.lock")):
        yield


def cache_folder() -> Path:
    """Return the folder for tables that are not stored next to the data: `$XDG_CACHE_HOME/dat`.

    For a user without a home folder, as in some containers, it is in the temporary folder.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given, "dat")
    try:
        return Path.home() / ".cache" / "dat"
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"dat-{_USER}")
