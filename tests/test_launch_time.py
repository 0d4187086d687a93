"""train_slurm.sh: the time of launch that a job passes on to its tasks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, run_command

WRITE = 'printf %s "$DAT_LAUNCHED" >'


def write_program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def test_a_submitted_job_knows_when_it_was_submitted(tmp_path: Path) -> None:
    write_program(tmp_path, "sbatch", f"{WRITE} {tmp_path / 'told'}")
    begin = int(time.time())
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CHECK_FIRST": "0", "DAT_LAUNCHED": "1"}
    done = run_command("bash", "train_slurm.sh", 2, "tiny.yaml", "job", **env)
    assert done.returncode == 0, done.stderr
    assert begin <= int((tmp_path / "told").read_text()) <= time.time()


@pytest.mark.parametrize("requeued", ["", "0", "1"])
def test_a_requeued_job_keeps_the_time_of_its_submission(tmp_path: Path, requeued: str) -> None:
    write_program(tmp_path, "srun", f"{WRITE} {tmp_path / 'told'}")
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "SLURM_NTASKS": "1", "SLURM_RESTART_COUNT": requeued}
    env = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DAT_LAUNCHED": "1"}
    begin = int(time.time())
    command = ["bash", ROOT / "train_slurm.sh", "--inside-job", tmp_path, sys.executable, "main.py"]
    subprocess.run(command, env=env, cwd=tmp_path, check=True, timeout=60)
    told = int((tmp_path / "told").read_text())
    assert told == 1 if requeued == "1" else begin <= told <= time.time()
