"""Workers survive signals to the whole job from a terminal or SLURM, but not the end of their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A training process that records signals, continues to the end of the epoch, and fails while its workers run.
PROGRAM = """
import multiprocessing, signal, sys, time
from tests.data.samples import build_train_loader, small_config

multiprocessing.set_start_method(sys.argv[1])
multiprocessing.set_forkserver_preload(["data.build"])  # once, instead of once in each worker
received = set()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: received.add(number))
loader = build_train_loader(small_config(NUM_WORKERS=2, BATCH_SIZE=16), rank=0, world_size=1)
batches = iter(loader)
seen = [next(batches), next(batches)]  # one of each worker
print(*(worker.pid for worker in batches._workers), flush=True)
while len(received) < 3:
    time.sleep(0.01)
print(len([*seen, *batches]), flush=True)
raise RuntimeError("the end")
"""
# A training process whose workers are still starting.
STARTING = """
import functools, multiprocessing, sys, time
from tests.data.samples import build_train_loader, small_config
from tests.data.test_workers import wait_for_file

multiprocessing.set_start_method(sys.argv[1])
multiprocessing.set_forkserver_preload(["data.build"])  # once, instead of once in each worker
loader = build_train_loader(small_config(NUM_WORKERS=2, BATCH_SIZE=16), rank=0, world_size=1)
loader.worker_init_fn = functools.partial(wait_for_file, sys.argv[2], loader.worker_init_fn)
batches = iter(loader)
print(*(worker.pid for worker in batches._workers), flush=True)
time.sleep(60)
"""
Start: TypeAlias = Callable[..., tuple[subprocess.Popen[str], list[int]]]


def wait_for_file(path: str, start_worker: Callable[[int], None], worker_id: int) -> None:
    while not Path(path).exists():
        time.sleep(0.01)
    start_worker(worker_id)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for_end(pids: list[int], seconds: float) -> list[int]:
    """Return those that still run after a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(is_alive, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]


@pytest.fixture
def start() -> Iterator[Start]:
    """Run a program and return its process and the ids of its workers, which it prints in a line."""
    started: list[int] = []

    def run(program: str, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        started.append(process.pid)
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        return process, workers

    yield run
    for pid in started:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS does not tell who sent a signal"),
    pytest.mark.xdist_group("workers"),
]


def test_workers_ignore_signals_to_the_whole_job(start: Start) -> None:
    process, workers = start(PROGRAM, "fork")
    for number in SIGNALS:
        os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert out.split() == [str(1437 // 16)]
    assert process.returncode == 1
    assert wait_for_end(workers, seconds=15) == []


def test_the_parent_ends_workers_that_a_server_forked(start: Start) -> None:
    process, workers = start(PROGRAM, "forkserver")
    for number in SIGNALS:
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert wait_for_end(workers, seconds=15) == []


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_after_their_parent_was_killed(start: Start, method: str) -> None:
    process, workers = start(PROGRAM, method)
    kill(process)
    assert wait_for_end(workers, seconds=15) == []


# The start methods of Linux up to Python 3.13, of macOS, and of Linux from 3.14.
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def test_workers_end_if_their_parent_is_killed_while_they_start(start: Start, tmp_path: Path, method: str) -> None:
    process, workers = start(STARTING, method, str(tmp_path / "go"))
    kill(process)
    assert wait_for_end(workers, seconds=0.2) == workers
    (tmp_path / "go").touch()
    assert wait_for_end(workers, seconds=15) == []
