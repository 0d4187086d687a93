"""What a worker process of a loader does with signals."""

from __future__ import annotations

import os
import signal
import threading


def leave_signals_to_parent(worker_id: int) -> None:  # noqa: ARG001
    """Make the current process, a worker of a `DataLoader`, go on when the whole job is signalled.

    A terminal and SLURM signal all processes of a job at once. What to do is decided by the training process, which
    first finishes its update and saves: workers that stopped before would end it with an error. SIGTERM from the
    training process itself is obeyed; that is how Python ends its children.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS; there SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    """Wait for SIGTERM of the parent and end the process. Waiting tells who sent a signal; a handler is not told."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
