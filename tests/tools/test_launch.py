"""Which exit statuses tools/launch.py restarts, with processes that only exit."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.launched import CONTEXT
from tools import launch

pytestmark = pytest.mark.xdist_group("serial")

# Records its start, and exits with the planned status; below 0, by a signal.
PROCESS = """
import json, os, sys
restart, rank = int(os.environ["DAT_RESTART_COUNT"]), int(os.environ["RANK"])
open(f"{__file__}.{restart}.{rank}", "w").close()
status = json.loads(sys.argv[1])[restart][rank]
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""


def _launch(folder: Path, plan: str) -> None:
    os.environ["MAX_RESTARTS"] = "2"
    launch.ROOT = folder
    sys.exit(launch.main(["2", plan]))


@pytest.mark.parametrize(
    ("plan", "runs", "status"),
    [
        ([[0, 0]], 1, 0),
        ([[-9, 75], [75, -11], [0, 0]], 3, 0),
        ([[75, -9], [2, 75]], 2, 2),
        ([[1, 1]], 1, 1),
        ([[143, 143]], 1, 143),
        ([[-9, -9], [75, 75], [-9, 75]], 3, 75),
    ],
    ids=["well", "killed", "wrong input", "broken off", "stopped", "killed each time"],
)
def test_only_a_lost_process_is_started_again(tmp_path: Path, plan: list, runs: int, status: int) -> None:
    (tmp_path / "main.py").write_text(PROCESS)
    process = CONTEXT.Process(target=_launch, args=(tmp_path, json.dumps(plan)))
    process.start()
    process.join(60)
    assert process.exitcode == status
    assert len(list(tmp_path.glob("main.py.*.0"))) == runs


@pytest.mark.parametrize("number", ["0", "02", "-1", "two", "\u00b2"])
def test_number_of_processes_that_is_none(
    number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "run_once", lambda *_: [0])
    assert launch.main([number, "--cfg", "tiny.yaml"]) == 2
    assert capsys.readouterr().err == "usage: python tools/launch.py <processes> <flags of main.py...>\n"


@pytest.mark.parametrize("requeued", ["0", "1"])
def test_every_start_is_told_when_the_launcher_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requeued: str
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", requeued)
    monkeypatch.setenv("DAT_LAUNCHED", "1")  # of another launcher
    monkeypatch.setenv("DAT_RESTART_COUNT", "0")  # restored after the test, as the others
    monkeypatch.setenv("DAT_RESTARTS_LEFT", "0")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    told = []

    def run_once(*_: object) -> list[int]:
        told.append(os.environ["DAT_LAUNCHED"])
        return [75]

    monkeypatch.setattr(launch, "run_once", run_once)
    begin = time.time()
    assert launch.main(["2"]) == 75
    assert len(told) == 4
    assert len(set(told)) == 1
    if requeued == "0":
        assert begin <= float(told[0]) <= time.time()
    else:  # the checkpoints of the job before it was requeued count, too
        assert told[0] == "1"
