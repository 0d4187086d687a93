"""Workers outlive the signals that a terminal or SLURM sends to a whole job, but not their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A training process that notes signals, goes on to the end of the epoch, and ends by an error, its workers still there.
PROGRAM = """
import signal, time
from data.build import build_train_loader
from tests.data.samples import small_config

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


def start() -> tuple[subprocess.Popen[str], list[int]]:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    return program, [int(pid) for pid in program.stdout.readline().split()]


pytestmark = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS does not tell who sent a signal")


def test_signals_to_the_whole_job_leave_the_workers_at_work() -> None:
    program, workers = start()
    assert len(workers) == 2
    for number in SIGNALS:
        os.killpg(program.pid, number)
    out, _ = program.communicate(timeout=60)
    assert out.split() == [str(1437 // 16)]
    assert program.returncode == 1
    assert wait_for_end(workers, seconds=2) == []


def test_workers_end_after_their_parent_was_killed() -> None:
    program, workers = start()
    assert len(workers) == 2
    program.kill()
    program.wait()
    program.stdout.close()
    assert wait_for_end(workers, seconds=15) == []
