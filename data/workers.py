"""Signal handling of data loader workers, and their exit with the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def leave_signals_to_parent(worker_id: int) -> None:  # noqa: ARG001
    """Make the current process, a worker of a `DataLoader`, go on when the whole job is signalled.

    A terminal and SLURM signal all processes of a job at once. What to do is decided by the training process, which
    first finishes its update and saves: workers that stopped before would end it with an error. SIGTERM from the
    training process itself is obeyed; that is how Python ends its children. A worker also ends when that process does.
    """
    # Not os.getppid(), which is the server under "forkserver", and init where the parent died in the meantime.
    parent = multiprocessing.parent_process()
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):  # Windows has only SIGINT
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows, where SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in the threads below as well
        threading.Thread(target=_obey, args=(parent.pid,), daemon=True).start()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _obey(parent: int) -> None:
    """Wait for SIGTERM from the parent and end the process. sigwaitinfo returns the sender, unlike a handler."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Wait for the end of the parent and end the process.

    The loader's own watch compares os.getppid() with what it was at first: too late where the parent died before, and
    never different under "forkserver". This waits for the end of a pipe that the parent holds. Workers forked later
    hold it, too, but the last one's is the parent's alone, so that they end one after the other.
    """
    parent.join()
    os._exit(0)
