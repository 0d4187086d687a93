"""train_slurm.sh: how it reacts to the exit statuses of its tasks, and a run on a SLURM with two nodes.

The run is requeued, is out of time, has a task killed, and is continued to the same end.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launched import Trial, first_difference, outcome
from tests.runs import ROOT

pytestmark = pytest.mark.xdist_group("serial")

CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"

# A command for tasks. Each word is one start with the end of each task: an exit status; below 0 a signal to the
# process alone; "gone" for a kill of all its processes; "saves" for writing a file and exiting after a signal.
TASK = """
import os, signal, sys, time
starts = sys.argv[1:]
rank = os.environ["SLURM_PROCID"]
end = starts[int(os.environ["DAT_RESTART_COUNT"])].split(",")[int(rank)]
if end == "gone":
    os.killpg(0, signal.SIGKILL)
elif end == "saves":
    def save(number, frame):
        time.sleep(0.3)
        open(f"saved-{rank}", "w").close()
        os._exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        assert signal.getsignal(number) != signal.SIG_IGN
        signal.signal(number, save)
    print("ready", flush=True)
    time.sleep(30)
elif end.startswith("-"):
    os.kill(os.getpid(), -int(end))
sys.exit(int(end))
"""

# Like srun: one process per task, signals go to all processes of a task, the status is the highest one.
SRUN = f"""#!{sys.executable} -S
import os, signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
print("srun", flush=True)
tasks = []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    env = {{**os.environ, "SLURM_PROCID": str(rank)}}
    tasks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, start_new_session=True))
if "SIGNAL" in os.environ:
    for task in tasks:
        task.stdout.readline()
    for task in tasks:
        os.killpg(task.pid, int(os.environ["SIGNAL"]))
statuses = [task.wait() for task in tasks]
sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
"""

SCONTROL = """#!/bin/sh
[ "$*" != "show job 7" ] || exec echo "JobId=7 PreemptEligibleTime=2026-01-02T03:00:00 PreemptTime=${PREEMPTED:-None}"
echo "$@" >>CALLED
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start SLURM and return the environment for its commands."""
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
        stopped = subprocess.run(["bash", CLUSTER, "stop", folder], capture_output=True, text=True)
    assert stopped.returncode == 0, stopped.stderr


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
        """Return as soon as `holds()`. A requeued job is started at once, not after two minutes."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.call("squeue")
            if "PENDING" in self.call("squeue", "--noheader", "--format", "%T", "--jobs", self.number):
                # Fails if it has started in the meantime.
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


def run_batch_script(folder: Path, *starts: str, **env: str) -> tuple[int, int, str]:
    """Run train_slurm.sh like SLURM, with replacements of srun and scontrol.

    Args:
        folder: an empty one.
        starts: for each start of the tasks what becomes of each, as in `TASK`.
        env: environment variables; PREEMPTED is when scontrol says that the job was preempted.

    Returns:
        the exit status, how often the tasks were started, and the words that scontrol was called with, except to ask.
    """
    (folder / "bin").mkdir()
    (folder / "statuses").mkdir()
    called = folder / "scontrol.txt"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL.replace("CALLED", str(called)))):
        (folder / "bin" / name).write_text(text, encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "SLURM_NTASKS": str(len(starts[0].split(",")))}
    command = [ROOT / "train_slurm.sh", "--inside-job", folder / "statuses", sys.executable, "-Sc", TASK, *starts]
    env = {**os.environ, **job, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **env}
    console = folder / "console.txt"
    with console.open("w") as out:  # with a pipe, communicate() would wait for tasks left by the script
        done = subprocess.run(["bash", *command], env=env, cwd=folder, stdout=out, stderr=out, timeout=60)
    printed = console.read_text(encoding="utf-8")
    started = printed.count("srun\n")
    assert not list((folder / "statuses").iterdir())
    assert printed.count("a process died") == started - 1, printed
    return done.returncode, started, called.read_text().strip() if called.exists() else ""


@pytest.mark.parametrize(
    ("starts", "status", "started"),
    [
        (["0,0"], 0, 1),
        (["2,75"], 2, 1),
        (["75,75,1"], 1, 1),
        (["2,1,75"], 2, 1),
        (["1,-9"], 1, 1),
        (["2,gone"], 2, 1),
        (["143,75"], 143, 1),
        (["130,-9"], 130, 1),
        (["129,75"], 129, 1),
        (["75,75"] * 3, 75, 3),
        (["-9,75"] * 3, 137, 3),
        (["75,-11", "gone,75", "2,75"], 2, 3),
        (["-6,75", "gone,gone", "0,0"], 0, 3),
    ],
)
def test_failed_task_decides_the_exit_status(starts: list[str], status: int, started: int, tmp_path: Path) -> None:
    assert run_batch_script(tmp_path, *starts, MAX_RESTARTS="2") == (status, started, "")


@pytest.mark.parametrize(
    ("number", "status", "called"),
    [
        (signal.SIGUSR1, 0, "requeue 7"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGINT, 130, ""),
        (signal.SIGHUP, 129, ""),
    ],
)
def test_signals_reach_the_run_and_leave_time_to_save(number: int, status: int, called: str, tmp_path: Path) -> None:
    ended = run_batch_script(tmp_path, "saves,saves", SIGNAL=str(int(number)))
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert ended == (status, 1, called)


@pytest.mark.parametrize(
    ("ends", "preempted", "status", "called"),
    [
        ("143,143", "2026-01-02T03:04:05", 0, "requeue 7"),
        ("143,75", "2026-01-02T03:04:05", 0, "requeue 7"),
        ("143,143", "None", 143, ""),
        ("0,0", "2026-01-02T03:04:05", 0, ""),
        ("2,2", "2026-01-02T03:04:05", 2, ""),
    ],
)
def test_a_job_that_is_preempted_with_time_to_stop_is_requeued(
    ends: str, preempted: str, status: int, called: str, tmp_path: Path
) -> None:
    assert run_batch_script(tmp_path, ends, PREEMPTED=preempted) == (status, 1, called)


@pytest.mark.slow
def test_slurm_continues_a_job_preempted_with_time_to_stop(slurm: dict[str, str], tmp_path: Path) -> None:
    resources = ["--ntasks=2", "--nodes=2", "--cpus-per-task=1", "--requeue", "--open-mode=append"]
    console = tmp_path / "console.txt"
    command = [ROOT / "train_slurm.sh", "--inside-job", tmp_path, sys.executable, "-Sc", TASK, "saves,saves"]
    job = SlurmJob(slurm, "sbatch", *resources, f"--output={console}", f"--chdir={tmp_path}", *command)

    def state() -> str:
        return job.call("scontrol", "show", "job", job.number)

    job.wait_until(lambda: console.exists() and console.read_text().count("ready\n") == 2, 60)
    assert "PreemptTime=None" in state()
    other = ["--partition=urgent", "--nodes=2", "--ntasks=2", "--output=/dev/null", "--wrap", "true"]
    job.call("sbatch", *other)
    job.wait_until(lambda: "Restarts=1" in state() and "JobState=RUNNING" in state(), 120)
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    job.wait_until(lambda: console.read_text().count("ready\n") == 4, 60)
    job.call("scancel", "--signal=TERM", job.number)
    job.wait_until(lambda: "JobState=FAILED" in state(), 60)
    assert "ExitCode=143:0" in state()
    assert "Restarts=1" in state()


@pytest.mark.slow
def test_a_job_ends_with_the_status_of_the_task_that_failed(slurm: dict[str, str], tmp_path: Path) -> None:
    resources = ["--ntasks=2", "--nodes=2", "--cpus-per-task=1", f"--output={tmp_path / 'console.txt'}"]
    command = [ROOT / "train_slurm.sh", "--inside-job", tmp_path, sys.executable, "-Sc", TASK, "75,gone", "75,2"]
    job = SlurmJob(slurm, "sbatch", *resources, *command)
    job.wait_until(lambda: "JobState=FAILED" in job.call("scontrol", "show", "job", job.number), 60)
    assert "ExitCode=2:0" in job.call("scontrol", "show", "job", job.number)
    assert (tmp_path / "console.txt").read_text().count("a process died; restart 1 of 3") == 1
    assert not list(tmp_path.glob(f"{job.number}.*"))


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

    def count(words: str) -> int:
        log = trial.folder / "log.txt"
        return log.read_text(encoding="utf-8").count(words) if log.exists() else 0

    def snapshots(folder: Path) -> set[str]:
        return {path.name for path in folder.glob("epoch_*.pth")}

    try:
        job.wait_until(lambda: trial.rows() > 3)
        job.call("scontrol", "requeue", job.number)
        job.wait_until(lambda: count("stopped on request") == 1 and count("continuing from") == 1)
        assert "DUE TO JOB REQUEUE" in console.read_text()

        job.wait_until(lambda: count("stopped on request") == 2)  # a little before the minute is over
        job.wait_until(lambda: count("continuing from") == 2)
        assert f"Exited with exit code {128 + signal.SIGUSR1}" in console.read_text()

        before = trial.rows()
        job.wait_until(lambda: trial.rows() > before)
        for pid in job.tasks(1):
            os.kill(pid, signal.SIGKILL)
        job.wait_until(lambda: count("continuing from") == 3)
        assert "a process died; restart 1 of 3" in console.read_text()

        before = snapshots(trial.folder)
        job.wait_until(lambda: len(snapshots(trial.folder)) > len(before))
        job.call("scancel", job.number)
        job.wait_until(lambda: count("stopped on request") == 3)
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
