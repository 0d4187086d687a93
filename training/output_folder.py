"""The output folder of a run: create, check, clear, and lock it."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from utils import STAGED

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None
    import msvcrt

LOCK = ".lock"
WRITERS = ("tensorboard", "wandb")  # folders that a run may create
_WINDOWS_LOCK = 2**20  # the byte locked on Windows, beyond the text, as a locked byte cannot be read


def open_folder(folder: Path) -> Path:
    """Create the output folder and return it.

    Raises:
        ValueError: it cannot be created or written; nothing is left behind.
    """
    try_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def try_folder(folder: Path) -> None:
    """Check that the output folder can be created and written, and leave nothing behind.

    Missing folders are created inside a temporary folder instead of in place: removing them in place could remove them
    under another run that starts at the same time.

    Raises:
        ValueError: it cannot.
    """
    try:
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with TemporaryDirectory(dir=existing) as scratch:
            Path(scratch, folder.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output folder {folder} cannot be written ({error.strerror}); choose another with --output"
        ) from None


def lock_folder(folder: Path, *, patience: float = 120) -> TextIO:
    """Lock a folder against other runs until the returned file is closed or this process ends.

    Args:
        folder: an existing, writable folder.
        patience: seconds to wait for another run to release it. A stopping run has to save first, and a network file
            system takes up to two minutes to notice a dead machine.

    Raises:
        ValueError: another run still holds the lock.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    if not _lock(file):
        file.seek(0)
        holder = file.read()
        if patience:
            print(f"another run is using {folder} ({holder}); waiting for it to end", file=sys.stderr, flush=True)
        end = time.monotonic() + patience
        while not _lock(file):
            if time.monotonic() > end:
                file.close()
                raise ValueError(
                    f"another run is using {folder} ({holder}); stop it, or give another --tag; if its machine is "
                    f"dead, remove {folder / LOCK}"
                )
            time.sleep(0.2)
    with suppress(OSError):  # a full disk
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def _lock(file: TextIO) -> bool:
    """Lock `file` unless another process has locked it, and return whether it may be used."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which data loader workers would inherit
        else:
            os.lseek(file.fileno(), _WINDOWS_LOCK, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # other errors: the file system has no locks
    return True


def set_aside(folder: Path, files: Collection[Path] | None = None) -> Path | None:
    """Move files of an earlier run in `folder` to a subfolder and return it, or None if there are no files.

    Args:
        folder: an existing folder.
        files: those to move; None for all but temporary files of a killed write.
    """
    if files is None:
        files = _files_of_run(folder)
    if not files:
        return None
    numbers = [path.name.removeprefix("earlier_") for path in folder.glob("earlier_*")]
    earlier = folder / f"earlier_{1 + max((int(number) for number in numbers if number.isdigit()), default=0)}"
    earlier.mkdir()
    for path in files:
        path.replace(earlier / path.name)
    return earlier


def _files_of_run(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.iterdir()
        if path.name in WRITERS or (path.is_file() and path.name != LOCK and path.suffix != STAGED)
    ]
