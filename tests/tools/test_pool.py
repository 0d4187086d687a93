"""Work spread over processes: order, how much is handed out, and killed processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launched import is_running, wait_until
from tests.runs import ROOT
from tools.pool import AHEAD, map_in_processes


def test_results_have_the_order_of_the_items() -> None:
    def square_slowly(number: int) -> int:
        time.sleep(number % 3 / 200)
        return number**2

    assert list(map_in_processes(square_slowly, range(20), workers=3)) == [number**2 for number in range(20)]


def test_items_are_read_as_they_are_handed_out() -> None:
    read: list[int] = []
    results = map_in_processes(abs, (read.append(number) or number for number in range(1000)), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(read) == 2 * AHEAD + 3
    results.close()


def test_a_killed_worker_is_an_error() -> None:
    def die(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ValueError, match=r"^a worker was killed; fewer --workers need less memory$"):
        list(map_in_processes(die, range(10), workers=2))


def test_errors_of_the_function_are_passed_on() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_processes(lambda number: 1 // number, range(10), workers=2))


# Prints the process of the first item, and hangs in the second.
HANG = """
import os, time
from tools.pool import map_in_processes
for process in map_in_processes(lambda number: os.getpid() if number == 0 else time.sleep(60), range(2), workers=1):
    print(process, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="sees in /proc which processes run")
def test_workers_end_with_their_parent() -> None:
    command = [sys.executable, "-c", HANG]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    wait_until(lambda: not is_running(worker), 20)
