"""Exit statuses, and the one-line error messages that go with them.

0: finished; 1: failed, retrying will not help; 2: wrong input; 75: another process or the machine failed, the launchers
restart the run; 128 + n: stopped by signal n.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import sys

import torch

from utils import DeviceLost, EvaluationFailed, Launch, collective_timeout, launched_as, restarts_left

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
# What PyTorch and Triton report if a call of CUDA or of its libraries failed.
_GPU_ERROR = re.compile(r"(CUDA (driver )?error|cuDNN error|Triton Error \[CUDA\]): .*")
# Such errors that come from the program, not from the device.
_GPU_MISUSED = re.compile(
    r"device-side assert|no kernel image|invalid (argument|configuration|device function)|"
    r"_STATUS_(NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE)"
)
_NCCL_MISUSED = re.compile(r"ncclInvalid(Usage|Argument)|, invalid (usage|argument) ")
_TIMED_OUT = re.compile(r"time[d ]*out", re.IGNORECASE)
_CLOSED = re.compile(r"connection (closed|reset|aborted)|broken pipe|got 0 bytes|remote process exited", re.IGNORECASE)
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
    """Log a failure of memory, files, a GPU, another process, an evaluation or a kernel and return the exit status.

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
    if reason := str(error) if isinstance(error, DeviceLost) else _gpu_failure(error):
        log.error(f"rank {launched_as().rank}: {reason}; {_continuation()}")
        return LOST_PEER
    if not _is_of_communication(error):
        raise error
    problem = f"rank {launched_as().rank}: {_communication_failure(error)}"
    if _NCCL_MISUSED.search(str(error)):
        log.error(problem)
        return FAILED
    log.error(f"{problem}; {_continuation()}")
    return LOST_PEER


def _gpu_failure(error: RuntimeError) -> str:
    """Return which GPU failed and how; empty if none did."""
    found = _GPU_ERROR.search(str(error))  # in a traceback, if a thread of the loader met it
    reason = found[0] if found else str(error).partition("\n")[0]  # general advice follows
    if not (found or isinstance(error, torch.AcceleratorError)) or _GPU_MISUSED.search(reason):
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    among = f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""
    return f"GPU {launched_as().local_rank}{among} of {socket.gethostname()} failed: {reason}"


def _is_of_communication(error: RuntimeError) -> bool:
    """Return whether processes could not communicate; errors of gloo have no specific class."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _communication_failure(error: RuntimeError) -> str:
    """Return in one line why processes could not communicate."""
    text = re.sub(r"^\[[^]]*\] ", "", str(error))  # without a line of gloo's source, or a rank
    begin, *_ = re.split(r"\n|\. ", text) if "gloo" in str(error) else text.splitlines()  # advice of gloo follows
    _, _, last = text.partition("Last error:")  # NCCL's reason, after an explanation of the kind of error
    reason = ": ".join([begin, *last.strip().splitlines()[:1]])
    if _TIMED_OUT.search(reason):
        minutes = collective_timeout().total_seconds() / 60
        return f"another process did not answer within DAT_TIMEOUT_MINUTES = {minutes:g}: {reason}"
    return f"{'another process died' if _CLOSED.search(reason) else 'communication failed'}: {reason}"


def _is_lost_worker(error: Exception) -> bool:
    """Return whether `error` means that a data loader worker was killed.

    PyTorch raises a plain RuntimeError. If the worker dies before its batch is received, the socket fails instead.
    """
    return _is_broken_socket(error) or "DataLoader worker" in str(error)


def _is_broken_socket(error: Exception) -> bool:
    """Return whether the connection to a worker failed; an error of a file on another machine names the file."""
    return isinstance(error, (ConnectionError, EOFError)) and getattr(error, "filename", None) is None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether `error` means out of memory, for which only PyTorch's own allocator of GPUs has a class."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # On the CPU; of CUDA and NCCL; of cuBLAS and cuDNN.
    return any(words in str(error) for words in ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED"))


def _continuation() -> str:
    """Describe how the run continues."""
    if restarts_left() > 0:
        return "the launcher restarts all processes from the last checkpoint"
    return "the same command continues from the last checkpoint"


def on_one_line(message: str) -> str:
    """Return `message` with line breaks and control characters, which file names may contain, escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
