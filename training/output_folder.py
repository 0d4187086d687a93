"""The output folder of a run: made, tried, cleared, and held against other runs."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
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
WRITERS = ("tensorboard", "wandb")  # folders that a run may leave
_WINDOWS_LOCK = 2**20  # the byte locked there: nobody can read a locked one, and the text before it is for everybody


def open_folder(folder: Path) -> Path:
    """Make the output folder and return it.

    Raises:
        ValueError: where it cannot be made or written; nothing is left behind then.
    """
    try_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def try_folder(folder: Path) -> None:
    """Check that the output folder can be made and written, and leave nothing behind.

    What is missing is made in a folder of its own, beside where it belongs: to make it there and take it away again
    could take it from another run that starts at the same moment.

    Raises:
        ValueError: where it cannot.
    """
    try:
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with TemporaryDirectory(dir=existing) as scratch:
            Path(scratch, folder.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output folder {folder} cannot be written ({error.strerror}); choose another with --output"
        ) from None


def hold_folder(folder: Path, *, patience: float = 120) -> TextIO:
    """Keep other runs from writing into a folder until the returned file is closed or this process has ended.

    Args:
        folder: an existing folder that can be written.
        patience: seconds to wait for another run to let go. One that was told to stop has to save first, and where a
            machine has died, a network file system takes up to two minutes to notice.

    Raises:
        ValueError: where another run still holds the folder then.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    if not _lock(file):
        file.seek(0)
        holder = file.read()
        if patience:
            print(f"another run writes into {folder} ({holder}); waiting for its end", file=sys.stderr, flush=True)
        end = time.monotonic() + patience
        while not _lock(file):
            if time.monotonic() > end:
                file.close()
                raise ValueError(
                    f"another run writes into {folder} ({holder}); stop it, or give another --tag; if its machine is "
                    f"dead, remove {folder / LOCK}"
                )
            time.sleep(0.2)
    with suppress(OSError):  # a full disk
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def _lock(file: TextIO) -> bool:
    """Lock `file` unless another process has, and return whether it may be used."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which the workers of loaders would inherit
        else:
            os.lseek(file.fileno(), _WINDOWS_LOCK, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # others: a file system without locks
    return True


def set_aside(folder: Path) -> Path | None:
    """Move what an earlier run left in `folder` to a folder inside it; return that, or None if there was nothing.

    What a killed write left half written is nothing.
    """
    files = [
        path
        for path in folder.iterdir()
        if path.name in WRITERS or (path.is_file() and path.name != LOCK and path.suffix != STAGED)
    ]
    if not files:
        return None
    numbers = [path.name.removeprefix("earlier_") for path in folder.glob("earlier_*")]
    earlier = folder / f"earlier_{1 + max((int(number) for number in numbers if number.isdigit()), default=0)}"
    earlier.mkdir()
    for path in files:
        path.replace(earlier / path.name)
    return earlier
