"""Signal handling of data loader workers, and their exit with the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def leave_signals_to_parent(worker_id: int) -> None:  # noqa: ARG001
    """Make this process, a `DataLoader` worker, ignore signals sent to the whole job.

    A terminal and SLURM signal all processes of a job at once. The training process reacts by finishing its update and
    saving; workers that stopped earlier would end it with an error. SIGTERM from the training process itself is obeyed,
    as Python uses it to end its children. A worker also ends when that process does.
    """
    # Not os.getppid(), which is the server under "forkserver", and init if the parent has died in the meantime.
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

    The loader's own check compares os.getppid() with its initial value, which fails if the parent died before, and
    under "forkserver". This waits for the end of a pipe held by the parent. Workers forked later hold it, too, but that
    of the last worker is only held by the parent, so they end one after another.
    """
    parent.join()
    os._exit(0)
