"""train_slurm.sh on a SLURM of two nodes: requeued, out of time, a task killed, and continued to the same end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launched import Trial, first_difference, outcome
from tests.runs import ROOT

CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start SLURM and return the environment in which its commands find it."""
    missing = subprocess.run(["bash", CLUSTER, "check"], capture_output=True, text=True)
    if missing.returncode:
        pytest.skip(f"SLURM cannot run here: {missing.stdout.strip()}")
    folder = tmp_path / "slurm"
    try:
        started = subprocess.run(["bash", CLUSTER, "start", folder], capture_output=True, text=True, timeout=120)
        if started.returncode:
            pytest.skip(f"SLURM does not start here: {' | '.join((started.stdout + started.stderr).splitlines()[-5:])}")
        yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    finally:
        subprocess.run(["bash", CLUSTER, "stop", folder], capture_output=True)


class SlurmJob:
    """A job in the queue."""

    def __init__(self, env: dict[str, str], *submit: str | Path) -> None:
        self._env = env
        self.number = re.search(r"Submitted batch job (\d+)", self.call(*submit))[1]

    def call(self, *command: str | Path, check: bool = True) -> str:
        """Return what a command printed."""
        done = subprocess.run([str(word) for word in command], env=self._env, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait_until(self, holds: Callable[[], bool], seconds: float = 180) -> None:
        """Return as soon as `holds()`. A job that SLURM has queued again starts at once, not after two minutes."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.call("squeue")
            if "PENDING" in self.call("squeue", "--noheader", "--format", "%T", "--jobs", self.number):
                # In vain where it has started in between.
                self.call("scontrol", "update", f"jobid={self.number}", "StartTime=now", check=False)
            time.sleep(0.25)

    def tasks(self, rank: int) -> list[int]:
        """Return the process ids of the task `rank`, workers included."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_text(errors="replace").split("\0")
            except OSError:
                continue
            if {f"SLURM_JOB_ID={self.number}", f"SLURM_PROCID={rank}", f"SLURM_CONF={self._env['SLURM_CONF']}"} <= set(
                variables
            ) and "main.py" in path.with_name("cmdline").read_text(errors="replace"):
                found.append(int(path.parent.name))
        return found


@pytest.mark.slow
def test_a_preempted_job_continues_to_the_same_result(slurm: dict[str, str], tmp_path: Path) -> None:
    sections = {"TRAIN": {"EPOCHS": 1000, "EMA": {"ENABLED": True}}, "KEEP_CHECKPOINTS": 0}
    undisturbed, trial = (Trial(tmp_path / name, 2, 0, **sections) for name in ("undisturbed", "trial"))
    expected = undisturbed.start()
    settings = {"GPUS_PER_NODE": "1", "CPUS_PER_TASK": "1", "TIME_LIMIT": "1", "GRACE": "10"}
    console = tmp_path / "console.txt"
    env = {**slurm, **settings, "MASTER_ADDR": "127.0.0.1", "SBATCH_FLAGS": f"--output={console}"}
    submit = ["bash", ROOT / "train_slurm.sh", "2", trial.words[1], "default", *trial.words[2:], "--device", "cpu"]
    job = SlurmJob(env, *submit)

    def said(words: str) -> int:
        log = trial.folder / "log.txt"
        return log.read_text(encoding="utf-8").count(words) if log.exists() else 0

    def snapshots(folder: Path) -> set[str]:
        return {path.name for path in folder.glob("epoch_*.pth")}

    try:
        job.wait_until(lambda: trial.rows() > 3)
        job.call("scontrol", "requeue", job.number)
        job.wait_until(lambda: said("stopped as asked") == 1 and said("continuing from") == 1)
        assert "DUE TO JOB REQUEUE" in console.read_text()

        job.wait_until(lambda: said("stopped as asked") == 2)  # a little before the minute is over
        job.wait_until(lambda: said("continuing from") == 2)
        assert f"Exited with exit code {128 + signal.SIGUSR1}" in console.read_text()

        before = trial.rows()
        job.wait_until(lambda: trial.rows() > before)
        for pid in job.tasks(1):
            os.kill(pid, signal.SIGKILL)
        job.wait_until(lambda: said("continuing from") == 3)
        assert "a process died; restart 1 of 3" in console.read_text()

        before = snapshots(trial.folder)
        job.wait_until(lambda: len(snapshots(trial.folder)) > len(before))
        job.call("scancel", job.number)
        job.wait_until(lambda: said("stopped as asked") == 3)
        expected.wait_until(lambda: snapshots(undisturbed.folder) >= snapshots(trial.folder), 180)
        expected.signal(signal.SIGTERM)
        assert expected.wait() == [143, 143]
    finally:
        expected.signal(signal.SIGKILL)
        subprocess.run(["scancel", job.number], env=env)
    one, other = outcome(undisturbed.folder), outcome(trial.folder)
    common = snapshots(trial.folder)
    assert len(common) > 3
    assert first_difference({name: one[name] for name in common}, {name: other[name] for name in common}) is None
    rows = min(len(one["metrics"]), len(other["metrics"]))
    assert one["metrics"][:rows] == other["metrics"][:rows]
