"""Exit statuses, and the one-line error messages that go with them.

0: finished; 1: failed, retrying will not help; 2: wrong input; 75: another process or the machine failed, the launchers
restart the run; 128 + n: stopped by signal n.
"""

from __future__ import annotations

import errno
import logging
import re
import sys

import torch

from utils import EvaluationFailed, Launch, collective_timeout, launched_as, restarts_left

FAILED = 1
WRONG_INPUT = 2
# EX_TEMPFAIL in sysexits.h: retrying may help.
LOST_PEER = 75

# A disk, a file server or the network failed, or the machine lacks memory; no system has all of these errors.
_OF_THE_MACHINE = {
    number
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ENFILE", "ENOMEM", "ENOLINK", "ECOMM", "ENOTCONN"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH"),
    )
    if (number := getattr(errno, name, None)) is not None
}
# PyTorch's message begins with the name of the operation.
_NOT_DETERMINISTIC = " does not have a deterministic implementation"


def is_machine_failure(error: Exception) -> bool:
    """Return whether the machine, a file server or the network failed, so that retrying may help."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def report_wrong_input(error: Exception | str, *, alone: bool = False) -> int:
    """Print in one line what is wrong with the input and return the exit status.

    Once the process group exists, ranks fail together and rank 0 prints. Before that, one rank per machine prints. An
    error that only this rank knows (`alone`) is printed by it.
    """
    try:
        launch = launched_as()
    except ValueError:  # the launcher variables are invalid
        launch = Launch()
    if alone or (launch.rank if torch.distributed.is_initialized() else launch.local_rank) == 0:
        print(f"main.py: {on_one_line(str(error))}", file=sys.stderr, flush=True)
    return WRONG_INPUT


def report_failure(error: RuntimeError | OSError | EOFError | MemoryError) -> int:
    """Log a failure of memory, a file system, another process, an evaluation or a kernel and return the exit status.

    Raises:
        RuntimeError: `error` is something else.
    """
    log = logging.getLogger("dat")
    if isinstance(error, OSError) or _is_lost_worker(error):
        reason = on_one_line((str(error).strip() or type(error).__name__).splitlines()[-1])
        if _is_broken_socket(error):
            reason = f"DataLoader worker died while sending a batch: {reason}"
        hint = " (fewer DATA.NUM_WORKERS need less memory)" if _is_lost_worker(error) else ""
        if "shared memory" in reason:
            hint = " (give the container more with --shm-size or --ipc=host, or use smaller batches)"
        log.error(f"rank {launched_as().rank}: {reason}{hint}; {_continuation()}")
        return LOST_PEER
    if isinstance(error, EvaluationFailed):
        if launched_as().rank == 0:
            log.error(str(error))
        return FAILED
    if _NOT_DETERMINISTIC in str(error):
        if launched_as().rank == 0:
            operation = str(error).partition(_NOT_DETERMINISTIC)[0].split()[-1]
            log.error(f"--deterministic: {operation} has no deterministic kernel on this device; leave the flag out")
        return WRONG_INPUT
    if is_out_of_memory(error):
        log.error(
            "out of memory; reduce --batch-size and raise --accumulation-steps, pass --use-checkpoint, or use a "
            "smaller network"
        )
        return FAILED
    if not _is_lost_peer(error):
        raise error
    minutes = collective_timeout().total_seconds() / 60
    reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]  # without gloo's source line and advice
    timed_out = re.search(r"time[d ]*out", reason, flags=re.IGNORECASE)
    what = f"did not answer within DAT_TIMEOUT_MINUTES = {minutes:g}" if timed_out else "died"
    log.error(f"rank {launched_as().rank}: another process {what}: {reason}; {_continuation()}")
    return LOST_PEER


def _is_lost_peer(error: RuntimeError) -> bool:
    """Return whether `error` means that another process did not respond; errors of gloo have no specific class."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _is_lost_worker(error: Exception) -> bool:
    """Return whether `error` means that a data loader worker was killed.

    PyTorch raises a plain RuntimeError. If the worker dies before its batch is received, the socket fails instead.
    """
    return _is_broken_socket(error) or "DataLoader worker" in str(error)


def _is_broken_socket(error: Exception) -> bool:
    """Return whether the connection to a worker failed; an error of a file on another machine names the file."""
    return isinstance(error, (ConnectionError, EOFError)) and getattr(error, "filename", None) is None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether `error` means out of memory; on the CPU PyTorch raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _continuation() -> str:
    """Describe how the run continues."""
    if restarts_left() > 0:
        return "the launcher restarts all processes from the last checkpoint"
    return "the same command continues from the last checkpoint"


def on_one_line(message: str) -> str:
    """Return `message` with line breaks and control characters, which file names may contain, escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
