"""Files that are kept open for reading at any position."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Descriptors left to the rest of the process: its libraries, and batches that workers share.
_RESERVED = 256
# The limit is raised to this at most: under one of a billion, as in some containers, programs that close all possible
# descriptors run for minutes.
_ENOUGH = 65536
# Files kept open on Windows, which has no such limit.
_ON_WINDOWS = 1024


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Return bytes of a file, which is kept open; several threads and processes may read it at the same time."""
    if hasattr(os, "pread"):
        file = _opener()(path)  # another thread may remove it from the cache; this reference keeps it open
        return os.pread(file.fileno(), size, offset)
    file = _opener()(path, threading.get_ident())  # Windows: each thread needs its own file position
    file.seek(offset)
    return file.read(size)


def forget_files() -> None:
    """Open every file again when it is read next, as it may have been replaced."""
    _opener.cache_clear()


@functools.cache
def _opener() -> Callable[..., Any]:
    """Return the function that opens a file or returns it if it is open."""
    return functools.lru_cache(maxsize=_most_open())(_open)


def _open(path: Path, thread: int | None = None) -> Any:  # noqa: ARG001 - it is a part of the cache's key
    return path.open("rb", buffering=0)


def _most_open() -> int:
    """Return how many files to keep open, after raising the limit of this process."""
    try:
        import resource
    except ImportError:
        return _ON_WINDOWS
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, most = (_ENOUGH if limit == resource.RLIM_INFINITY else min(limit, _ENOUGH) for limit in limits)
    if soft < most:
        with suppress(ValueError, OSError):  # macOS has a lower limit than the one it gives
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
            soft = most
    return max(1, soft - min(_RESERVED, soft // 2))
