"""Signals, hung and dead processes, full disks, damaged files and non-finite numbers: no progress is lost."""

from __future__ import annotations

import io
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import pytest

from config import default_config
from logger import RunLog
from tests.launched import (
    UPDATES,
    Job,
    Trial,
    Uninterrupted,
    first_difference,
    is_running,
    start_launcher,
    wait_until,
)
from tests.runs import ROOT, read_metrics
from training.checkpoint import load_checkpoint
from utils import StopSignal

pytestmark = pytest.mark.xdist_group("serial")

LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of a launcher in /proc")


def start_and_wait_for_rows(trial: Trial, rows: int, *flags: str | Path) -> Job:
    """Start the command with more flags, and return after it has logged this number of further lines."""
    before = trial.rows()
    job = trial.start(*flags)
    job.wait_until(lambda: trial.rows() >= before + rows)
    return job


def test_a_signal_to_one_rank_stops_all_and_the_command_continues(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 2, 0)
    for number, rank in ((signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGUSR1, 1), (signal.SIGHUP, 0)):
        job = start_and_wait_for_rows(trial, 1)
        job.signal(number, rank)
        assert job.wait() == [128 + number, 128 + number], job.console()
    assert job.console().count("stopped on request in epoch") == 4
    assert job.console().count("SIGINT: stopping after this update; Ctrl-C again ends at once") == 1
    assert "Traceback" not in job.console()
    assert first_difference(uninterrupted.of(2)[0], trial.finish()) is None


def _interrupt_evaluation() -> None:
    from tasks.classification import Accuracy

    add, listen, stops = Accuracy.add, StopSignal.listen, []

    def note(stop: StopSignal) -> None:
        stops.append(stop)
        listen(stop)

    def add_and_signal(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stops[-1].received is not None)
        add(*args)

    Accuracy.add, StopSignal.listen = add_and_signal, note


def test_a_signal_during_evaluation_repeats_the_evaluation_alone(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 1, 0)
    assert trial.start(prepare=_interrupt_evaluation).wait() == [128 + signal.SIGTERM]
    state = load_checkpoint(trial.folder / "last.pth")
    assert (state["epoch"], state["update"]) == (0, UPDATES)
    assert read_metrics(trial.folder, "eval") == []
    assert first_difference(uninterrupted.of(1)[0], trial.finish()) is None


def test_a_second_interrupt_ends_even_a_process_that_hangs(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 2, 0, TRAIN={"EPOCHS": 1000})  # which does not end before the signals
    job = start_and_wait_for_rows(trial, 1)
    job.signal(signal.SIGSTOP, 1)
    job.signal(signal.SIGINT, 0)
    wait_until(lambda: "SIGINT: stopping after this update; Ctrl-C again ends at once" in job.console())

    def interrupt() -> bool:
        job.signal(signal.SIGINT, 0)
        return not job.ranks[0].is_alive()

    wait_until(interrupt, 20)  # at first, for the same Ctrl-C that torchrun passes on
    assert job.ranks[0].exitcode == 128 + signal.SIGINT
    job.signal(signal.SIGKILL, 1)
    job.wait()


def test_an_interrupt_that_torchrun_passes_on_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, (numbers, written), ended = StopSignal(), socket.socketpair(), []
    monkeypatch.setattr("utils.os._exit", ended.append)
    threading.Thread(target=stop._listen, args=(numbers,), daemon=True).start()
    # After the interrupts, another signal tells that they were handled.
    for seconds, last, statuses in ((1000.0, signal.SIGTERM, []), (0.0, signal.SIGHUP, [128 + signal.SIGINT])):
        monkeypatch.setattr(StopSignal, "_SAME_CTRL_C", seconds)
        written.send(bytes([signal.SIGINT, signal.SIGINT, last] if seconds else [signal.SIGINT, last]))
        wait_until(lambda last=last: stop.received == last)
        assert ended == statuses


def test_hung_process_is_reported_in_one_line(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 2, 0, TRAIN={"EPOCHS": 1000})  # which does not end before the signal
    job = trial.start(DAT_TIMEOUT_MINUTES="0.1")
    job.wait_until(lambda: trial.rows() > 0)
    job.signal(signal.SIGSTOP, 1)
    job.ranks[0].join(60)
    job.signal(signal.SIGKILL, 1)
    assert job.wait() == [75, -signal.SIGKILL]
    last = job.console().splitlines()[-1]
    assert last.startswith("rank 0: another process did not answer within DAT_TIMEOUT_MINUTES = 0.1")
    assert last.endswith("the same command continues from the last checkpoint")
    assert last in (trial.folder / "log.txt").read_text(encoding="utf-8")
    assert "Traceback" not in job.console()


@LINUX
def test_the_launcher_continues_after_a_worker_died_and_stops_when_asked(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    trial = Trial(tmp_path / "trial", 2, 0)
    console = tmp_path / "launcher.txt"
    launcher = start_launcher(trial.words, console)

    def wait_for_rows(rows: int) -> None:
        end = time.monotonic() + 90
        while trial.rows() < rows:
            assert launcher.is_alive(), console.read_text()
            assert time.monotonic() < end, console.read_text()
            time.sleep(0.02)

    wait_for_rows(2)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    wait_for_rows(1 + trial.rows())
    os.kill(launcher.pid, signal.SIGTERM)
    launcher.join(60)
    assert launcher.exitcode == 128 + signal.SIGTERM, console.read_text()
    for words in ("launch.py: a process died; restart 1 of 3", "continuing from", "stopped on request"):
        assert words in console.read_text()
    assert first_difference(uninterrupted.of(2)[0], trial.finish()) is None


@LINUX
@pytest.mark.slow
def test_processes_stop_when_their_launcher_is_killed(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 2, 0)
    launcher = start_launcher(trial.words, tmp_path / "launcher.txt")
    end = time.monotonic() + 90
    while trial.rows() < 2:
        assert time.monotonic() < end, (tmp_path / "launcher.txt").read_text()
        time.sleep(0.02)
    launcher.kill()
    assert first_difference(uninterrupted.of(2)[0], trial.finish()) is None  # which waits for the folder
    assert "stopped on request" in (tmp_path / "launcher.txt").read_text()


def is_importing(process: int) -> bool:
    """Return whether a process has begun to import PyTorch, which takes seconds."""
    return "libtorch" in Path("/proc", str(process), "maps").read_text()


@LINUX
def test_importing_processes_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 2, 0)
    launcher = start_launcher(trial.words, tmp_path / "launcher.txt")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    wait_until(lambda: len(children.read_text().split()) == 2)
    started = list(map(int, children.read_text().split()))
    wait_until(lambda: all(map(is_importing, started)))
    assert not trial.folder.exists()
    launcher.kill()
    wait_until(lambda: not any(map(is_running, started)), 30)


@pytest.mark.parametrize("moment", [pytest.param("while importing", marks=LINUX), "before the first update"])
def test_an_interrupt_before_the_training_ends_the_process_without_a_traceback(tmp_path: Path, moment: str) -> None:
    trial = Trial(tmp_path / "trial", 1, 0)
    words = [sys.executable, str(ROOT / "main.py"), *map(str, trial.words)]
    with subprocess.Popen(words, stdout=PIPE, stderr=subprocess.STDOUT, text=True) as process:
        if moment == "while importing":
            wait_until(lambda: is_importing(process.pid))
        else:
            wait_until(lambda: (trial.folder / ".lock").exists())
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert "Traceback" not in printed
    assert process.returncode in ((-signal.SIGINT,) if moment == "while importing" else (-signal.SIGINT, 130))


@LINUX
def test_killed_loader_worker_is_reported_in_one_line(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 1, 2)
    job = start_and_wait_for_rows(trial, 1)
    process = job.ranks[0].pid
    workers = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    assert job.wait() == [75]
    last = job.console().splitlines()[-1]
    assert re.fullmatch(r"rank 0: DataLoader worker .*; the same command continues from the last checkpoint", last)
    assert "Traceback" not in job.console()
    assert first_difference(uninterrupted.of(1)[0], trial.finish()) is None


def _cannot_read(*_: object) -> None:
    raise ValueError("cannot read folder photos")


def _hide_data_from_rank_1() -> None:
    from tasks import classification

    if os.environ["RANK"] == "1":
        classification.open_dataset = _cannot_read


def test_unreadable_input_of_one_process_is_rejected_by_all_in_one_line(tmp_path: Path) -> None:
    job = Trial(tmp_path / "trial", 2, 0).start(prepare=_hide_data_from_rank_1)
    assert job.wait() == [2, 2]
    assert job.console().splitlines() == ["main.py: cannot read folder photos"]


def test_locked_folder_is_rejected_by_all_processes_in_one_line(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 2, 0, TRAIN={"EPOCHS": 1000})  # which does not end while the other one waits
    other = start_and_wait_for_rows(trial, 1)
    job = trial.start(DAT_TIMEOUT_MINUTES="0.1")
    assert job.wait() == [2, 2], job.console()
    assert len([line for line in job.console().splitlines() if "another run is using" in line]) == 2
    assert "another process died" not in job.console()
    other.signal(signal.SIGKILL)
    other.wait()


@pytest.mark.parametrize("console", ["full", "closed"])
def test_unwritable_console_does_not_end_a_run(tmp_path: Path, console: str) -> None:
    trial = Trial(tmp_path / "trial", 1, 0, TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0})
    read, write = os.pipe() if console == "closed" else (None, os.open("/dev/full", os.O_WRONLY))
    if read is not None:
        os.close(read)
    done = subprocess.run([sys.executable, "main.py", *map(str, trial.words)], cwd=ROOT, stdout=write, stderr=PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "finished: best accuracy" in (trial.folder / "log.txt").read_text()


def test_file_name_that_is_not_utf8_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", console)
    RunLog(tmp_path, default_config(), is_main=True).warning("caf\udce9.jpg cannot be read")
    for printed in (console.buffer.getvalue(), (tmp_path / "log.txt").read_bytes()):
        assert b"caf\\udce9.jpg cannot be read" in printed


def _limit_file_sizes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_run_continues_if_checkpoints_cannot_be_written(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 1, 0)
    job = start_and_wait_for_rows(trial, 1)
    job.signal(signal.SIGTERM)
    assert job.wait() == [143]
    before = {path.name: path.read_bytes() for path in trial.folder.glob("*.pth")}
    job = trial.start(prepare=_limit_file_sizes)
    assert job.wait() == [1]
    assert "finished: best accuracy" in job.console()
    last = trial.folder / "last.pth"
    best, files = job.console().partition("finished: ")[2].splitlines()[0].split("; ")
    assert re.search(", without a best.pth in this folder$|, while best.pth is of epoch [0-9]+$", best), best
    assert all(
        (trial.folder / name).is_file() for name in re.findall(r"[a-z]+\.[a-z]+", files.partition(" are in ")[0])
    )
    told = [line for line in job.console().splitlines() if line.endswith(f"the previous one, {last}, stays in use")]
    assert len(told) >= 8
    assert all("last.tmp, the checkpoint of epoch" in line and "(File too large)" in line for line in told)
    assert {path.name: path.read_bytes() for path in trial.folder.glob("*.pth")} == before
    assert first_difference(uninterrupted.of(1)[0], trial.finish()) is None


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a file system of a few megabytes."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root alone; the test with a limit of file sizes stands in")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write to `path` until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_run_survives_a_disk_that_is_full_to_the_last_byte(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 1, 0)
    with small_disk(trial.folder):
        job = start_and_wait_for_rows(trial, 2)
        fill(trial.folder / "filler")
        assert job.wait() == [1]
        assert "stays in use" in job.console()
        assert "finished: best accuracy" in job.console()
        assert "Traceback" not in job.console()
        (trial.folder / "filler").unlink()
        assert first_difference(uninterrupted.of(1)[0], trial.finish()) is None


def test_truncated_checkpoint_falls_back_to_the_previous_one(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 1, 0)
    job = start_and_wait_for_rows(trial, 2)
    job.signal(signal.SIGTERM)
    assert job.wait() == [143]
    last = trial.folder / "last.pth"
    os.truncate(last, last.stat().st_size // 2)
    assert first_difference(uninterrupted.of(1)[0], trial.finish()) is None
    told = [line for line in job.console().splitlines() if line.startswith(str(last)) and "truncated" in line]
    assert len(told) == 1
    assert told[0].endswith(f"continuing from {trial.folder / 'previous.pth'} instead")


def _finish_slowly() -> None:
    """Print when rank 0 has written its report and closed its recorders, and when a rank leaves."""
    import main
    from training import finish, loop

    leave, close, stopped = main.close_world, RunLog.close, "STOPPED" in os.environ

    def report(_: loop.Run) -> None:
        time.sleep(0.3)
        os.write(1, b"the report is written\n")

    def close_slowly(log: RunLog, status: int) -> None:
        if os.environ["RANK"] == "0" and not closed:
            closed.append(status)
            time.sleep(0.3)
            os.write(1, b"the recorders are closed\n")
        close(log, status)

    def leave_with_a_line() -> None:
        os.write(1, b"a rank leaves\n")
        leave()

    closed: list[int] = []
    loop.train_epochs = lambda _: 143 if stopped else 0
    finish.write_html_report, RunLog.close, main.close_world = report, close_slowly, leave_with_a_line


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_stay_until_the_report_is_written_and_the_recorders_are_closed(stopped: bool, tmp_path: Path) -> None:
    job = Trial(tmp_path / "trial", 2, 0).start(prepare=_finish_slowly, **({"STOPPED": "1"} if stopped else {}))
    assert job.wait() == [143 if stopped else 0] * 2, job.console()
    assert ("curves.png could not be written (" in job.console()) != stopped  # nothing was trained
    lines = [line for line in job.console().splitlines() if line.endswith(("is written", "are closed", "leaves"))]
    assert lines == [
        *([] if stopped else ["the report is written"]),
        "the recorders are closed",
        "a rank leaves",
        "a rank leaves",
    ]


def test_run_started_from_a_file_resumes_its_own_checkpoint(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 1, 0)
    job = start_and_wait_for_rows(trial, 1)
    job.signal(signal.SIGTERM)
    assert job.wait() == [143]
    begin = shutil.copy(trial.folder / "last.pth", tmp_path / "begin.pth")
    shutil.rmtree(trial.folder)
    for source in (begin, trial.folder / "last.pth"):
        job = start_and_wait_for_rows(trial, 1, "--resume", begin)
        assert f"continuing from {source}: epoch 1, update " in job.console()
        job.signal(signal.SIGTERM)
        assert job.wait() == [143], job.console()


def test_restart_resumes_a_run_without_auto_resume(tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial", 1, 0)
    trial.finish()
    afresh = ("--opts", "TRAIN.AUTO_RESUME", "False")
    job = trial.start(*afresh)
    job.wait_until(lambda: trial.rows() == 1)
    job.signal(signal.SIGKILL)
    job.wait()
    job = trial.start(*afresh, SLURM_RESTART_COUNT="1")
    job.wait_until(lambda: "continuing from" in job.console())
    assert f"continuing from {trial.folder / 'last.pth'}: epoch 1," in job.console()
    job.signal(signal.SIGKILL)
    job.wait()


def _break_losses_of_rank_1() -> None:
    """Make update 2 and all from 4 on non-finite; check that they change nothing."""
    from training import loop

    take_update = loop.take_update

    def break_and_compare(run: loop.Run, batches: Iterator) -> loop.Update:
        state, task, update = run.state, run.task, run.state.position.update
        states = state.optimizer.state_dict()["state"]
        before = (
            [p.clone() for p in run.model.parameters()],
            {i: {name: value.clone() for name, value in held.items()} for i, held in states.items()},
        )
        breaks = run.world.rank == run.world.size - 1 and (update == 1 or update >= 3)
        task.loss = lambda model, batch: type(task).loss(task, model, batch) * (float("inf") if breaks else 1)
        taken = take_update(run, batches)
        after = list(run.model.parameters()), state.optimizer.state_dict()["state"]
        same = first_difference(list(before[0]), after[0]) is None and first_difference(before[1], after[1]) is None
        os.write(1, f"rank {run.world.rank} update {update + 1}: same {same}\n".encode())
        return taken

    loop.take_update = break_and_compare


@pytest.mark.parametrize(("processes", "amp"), [(2, "off"), (1, "fp16")])
def test_nonfinite_updates_change_nothing_and_end_the_run(tmp_path: Path, processes: int, amp: str) -> None:
    trial = Trial(tmp_path / "trial", processes, 0, TRAIN={"ACCUMULATION_STEPS": 2, "MAX_NONFINITE": 3}, AMP=amp)
    job = trial.start("--opts", "TRAIN.ANOMALY_REPORT", "True", prepare=_break_losses_of_rank_1)
    assert job.wait() == [1] * processes, job.console()
    console = job.console()
    for rank in range(processes):
        told = [line.partition("same ")[2] for line in console.splitlines() if line.startswith(f"rank {rank} update ")]
        assert told[:6] == ["False", "True", "False", "True", "True", "True"]
    assert "epoch 1, update 2: loss or gradient is not finite; update skipped (1 so far)" in console
    assert "epoch 1, update 5: loss or gradient is not finite; update skipped (3 so far)" in console
    stop = "epoch 1, update 6: 3 updates in a row were not finite; the last good checkpoint is kept"
    assert console.count(stop) == processes
    assert f"Rank {processes - 1}: every module's output is finite, the loss is not" in console
    assert "Traceback" not in console
    state = load_checkpoint(trial.folder / "last.pth")
    assert state["update"] == 4  # skipped, so the weights are those after update 3
    assert state["nonfinite_in_row"] == 1
    assert all(row["loss"] is None or row["loss"] > 0 for row in read_metrics(trial.folder, "train"))
