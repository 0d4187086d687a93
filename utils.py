"""Process group, random seeds, signals, and asynchronous reads of numbers from the device."""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

STAGED = ".tmp"  # suffix of files that are still being written


@dataclass(frozen=True)
class World:
    """The processes of a run, and the device of this one."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


class Launch(NamedTuple):
    """Rank and number of processes, globally and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched_as() -> Launch:
    """Return how torchrun or SLURM started this process.

    Raises:
        ValueError: their environment variables are not valid numbers.
    """
    try:
        return _launched_as(os.environ)
    except ValueError as error:
        raise ValueError(f"launcher variables such as RANK must be whole numbers ({error})") from None


def _has_torchrun_variables(env: Mapping[str, str]) -> bool:
    return "RANK" in env and "WORLD_SIZE" in env


def _launched_as(env: Mapping[str, str]) -> Launch:
    if _has_torchrun_variables(env):
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        return Launch(rank, size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size)))
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # of this srun; the batch script itself has only the job's number
        size = int(env["SLURM_STEP_NUM_TASKS"])
        return Launch(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), _slurm_tasks_on_node(env))
    return Launch()


def _slurm_tasks_on_node(env: Mapping[str, str]) -> int:
    """Return the number of tasks on this node, from a list such as `4(x2),2`: 4 on two nodes, 2 on the third."""
    counts: list[int] = []
    for group in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, nodes = group.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(nodes or 1)
    return counts[int(env.get("SLURM_NODEID", "0"))]


class DeviceLost(RuntimeError):
    """PyTorch does not see all GPUs that SLURM gave to this job. Another attempt may succeed."""


def pick_device(name: str, local_rank: int, local_size: int) -> torch.device:
    """Return this process's device; the best available one if `name` is empty.

    Raises:
        ValueError: the machine has no such device, or fewer devices than processes.
        DeviceLost: it has fewer than SLURM gave the job.
    """
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and local_size > 1:
            name = "cpu"
    if name == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_size <= count:
            return torch.device("cuda", local_rank)
        if count and _has_own_gpus(local_size, count):
            return torch.device("cuda", 0)
        host = socket.gethostname()
        if (given := _gpus_of_srun()) >= local_size:
            raise DeviceLost(
                f"{host}: SLURM gave this job {given} of its GPUs, and PyTorch sees {count}; check the driver there, "
                "or exclude the node (SBATCH_FLAGS)"
            )
        if count == 0:
            raise ValueError(
                f"--device cuda: PyTorch sees no CUDA device on {host}; use --device cpu, or check the driver"
            )
        raise ValueError(
            f"{local_size} processes were started here, but this machine has {count} GPU{'s' * (count > 1)}; "
            f"start at most {count}, or use --device cpu"
        )
    if name == "mps" and (not torch.backends.mps.is_available() or local_size > 1):
        raise ValueError("--device mps: needs an Apple GPU and a single process; use --device cpu")
    return torch.device(name)


def _gpus_of_srun() -> int:
    """Return how many GPUs of this machine srun gave to all its tasks; 0 if another launcher started this one."""
    return 0 if _has_torchrun_variables(os.environ) else int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))


def _has_own_gpus(local_size: int, count: int) -> bool:
    """Return whether a launcher gave each process `count` GPUs of its own, so that it sees no others."""
    if launched_as().size == 1:
        return False
    if not _has_torchrun_variables(os.environ):
        return _gpus_of_srun() >= local_size * count
    # torchrun passes the variable of the user to all processes.
    visible = "" if "TORCHELASTIC_RUN_ID" in os.environ else os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return bool(visible) and "," not in visible


def init_world(device_name: str) -> World:
    """Pick the device and join the other processes, if there are any.

    Raises:
        ValueError: see `pick_device`; or some processes have GPUs and others do not.
        DeviceLost: see `pick_device`.
    """
    rank, size, local_rank, local_size = launched_as()
    device = pick_device(device_name, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)  # srun does not set it, unlike torchrun
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_slurm_host()
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(_slurm_port(os.environ))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=collective_timeout())
        if different_on_ranks({"device": device.type}):
            raise ValueError(
                "some processes have a GPU and others have none; check the drivers (--device cuda names the machines "
                "without GPUs), or use --device cpu"
            )
    return World(rank, size, local_rank, device)


def collective_timeout() -> timedelta:
    """Return the timeout of collective operations, after which the run ends: DAT_TIMEOUT_MINUTES, 30 by default.

    Raises:
        ValueError: the variable is not a valid time.
    """
    text = os.environ.get("DAT_TIMEOUT_MINUTES", "30")
    try:
        timeout = timedelta(minutes=float(text))
    except (ValueError, OverflowError):
        timeout = timedelta(0)
    if timeout <= timedelta(0):
        raise ValueError(f"the variable DAT_TIMEOUT_MINUTES must be a number above 0, such as 30, not {text!r}")
    return timeout


def restarts_left() -> int:
    """Return how many restarts after a dead process the launcher has left."""
    if "DAT_RESTARTS_LEFT" in os.environ:  # of tools/launch.py and train_slurm.sh
        return int(os.environ["DAT_RESTARTS_LEFT"])
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    )


def was_restarted() -> bool:
    """Return whether a launcher or SLURM started this run again after a failure."""
    counts = ("DAT_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name, "0")) > 0 for name in counts)


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
    return names.stdout.split()[0]


def _slurm_port(env: Mapping[str, str]) -> int:
    """Return a port that is the same on every node; other jobs, and other starts of this one, mostly have another.

    It is below those that Linux gives to connections that name none, from 32768 on.
    """
    start = int(env.get("SLURM_JOB_ID", "0")) + 4001 * int(env.get("DAT_RESTART_COUNT", "0"))
    return 20000 + start % 12000


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of `values` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def different_on_ranks(facts: dict[str, object]) -> list[str]:
    """Return the names of the facts that are not the same in all processes; a collective call with the same result."""
    everywhere = [facts]
    if dist.is_initialized():
        everywhere *= dist.get_world_size()
        dist.all_gather_object(everywhere, facts)
    return [name for name in facts if any(there[name] != facts[name] for there in everywhere)]


class EvaluationFailed(RuntimeError):
    """An evaluation without a result. All processes raise it."""


@contextmanager
def fail_together() -> Iterator[None]:
    """If the block raises on any rank, raise that error on all of them.

    Raises:
        ValueError: that of the first rank that met an error.
        OSError: likewise, with its number.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as met:
        error = met
    errors = [error and _as_built_in(error)]
    if dist.is_initialized():
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, errors[0])
    found = next((there for there in errors if there is not None), None)
    if found is not None:
        raise found from error


def _as_built_in(error: ValueError | OSError) -> ValueError | OSError:
    """Return a copy of `error` that can be sent to other processes; subclasses of libraries need not allow that."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename, None, error.filename2)
    kind = next(kind for kind in (TimeoutError, OSError, ValueError) if isinstance(error, kind))
    return kind(str(error) or type(error).__name__)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a kill or a full disk leaves either the old file or the new one."""
    staged = path.with_name(f"{path.name}{STAGED}")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


@contextmanager
def leave_together(timeout: timedelta) -> Iterator[None]:
    """Let no process leave the block before all have reached its beginning and its end.

    `timeout` limits the waiting for the end, instead of that of other collective operations.
    """
    if not dist.is_initialized():
        yield
        return
    dist.barrier()
    group = dist.new_group(backend="gloo", timeout=timeout)
    yield
    dist.barrier(group)


def close_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch with `key`, a few integers; trailing zeros are ignored.

    Every micro-batch is seeded with (seed, epoch, position, rank). Random numbers therefore depend only on the position
    in the run, and checkpoints need no generator states.
    """
    words = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[0])  # noqa: NPY002  (timm's mixup draws from the global generator)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


class LateReader:
    """Reads small tensors from the device one step late.

    The copy of a step's numbers is queued right after the step and read after the next step was queued. The host thus
    never waits for the latest work, and the device is never idle.
    """

    def __init__(self) -> None:
        self._pending: tuple[object, torch.Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, tag: object, values: torch.Tensor) -> tuple[object, list[float]] | None:
        """Queue this step's `values` and return those of the previous step as `(tag, numbers)`; None at the first."""
        previous = self.flush()
        copy = values.to("cpu", non_blocking=values.is_cuda)
        event = None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending = (tag, copy, event)
        return previous

    def flush(self) -> tuple[object, list[float]] | None:
        """Wait for the last queued values and return them."""
        if self._pending is None:
            return None
        tag, copy, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        return tag, copy.tolist()


class StopSignal:
    """Records a request to stop: SIGTERM, SIGINT, SIGUSR1 or SIGHUP. A second Ctrl-C ends the process at once.

    A thread reads the signals, so that a second Ctrl-C also ends a process whose main thread waits for a hung rank.
    """

    # Windows has the first two.
    _NUMBERS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, n))
    # torchrun forwards a Ctrl-C of the terminal to processes that have already received it.
    _SAME_CTRL_C = 1.0

    def __init__(self) -> None:
        self.received: int | None = None

    def listen(self) -> None:
        """Install the signal handlers; not in a thread other than the main one."""
        if threading.current_thread() is not threading.main_thread():
            return
        numbers, written = socket.socketpair()
        written.setblocking(False)
        signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
        for number in self._NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
                signal.signal(number, _leave_to_thread)
        threading.Thread(target=self._listen, args=(numbers,), daemon=True).start()

    def exit_status(self) -> int:
        """Return 128 + the signal number, as a shell does; a collective call with the same result on all ranks."""
        received = torch.tensor(self.received or 0)
        if dist.is_initialized():
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return 128 + int(received)

    def _listen(self, numbers: socket.socket) -> None:
        first_interrupt = math.inf
        while True:
            number = numbers.recv(1)[0]
            if number not in self._NUMBERS:  # such as SIGCHLD, which data loaders handle
                continue
            now = time.monotonic()
            if number == signal.SIGINT:
                if now - first_interrupt >= self._SAME_CTRL_C:
                    os._exit(128 + signal.SIGINT)
                first_interrupt = min(first_interrupt, now)
            is_first, self.received = self.received is None, number
            if is_first and launched_as().rank == 0:
                again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
                with suppress(OSError, ValueError):  # a terminal that was closed must not stop this thread
                    print(f"{signal.Signals(number).name}: stopping after this update{again}", file=sys.stderr)


def _leave_to_thread(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal in Python; required for the thread to be notified."""
