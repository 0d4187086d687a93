"""Training jobs with one or several processes that tests start, signal and kill.

Each process is forked from a server that has imported everything, so that a start takes a fraction of a second and many
kills take minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.runs import ROOT, read_metrics, write_config

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["main", "tools.launch", "tests.launched", "sklearn.datasets"])
# Images of ten classes: few, so that runs are short, but enough for eleven updates per epoch and a remainder.
TRAINING_IMAGES, HELD_OUT_IMAGES, UPDATES = 270, 40, 11


class Job:
    """`python main.py <words>` in one process, or in several over gloo as torchrun would start them.

    Args:
        words: the command line.
        console: file to which the processes append what they print.
        processes: how many.
        prepare: a function of a module, called in each process before.
        env: environment variables.
    """

    def __init__(
        self,
        words: Sequence[str | Path | int],
        console: Path,
        *,
        processes: int = 1,
        prepare: Callable[[], None] | None = None,
        **env: str,
    ) -> None:
        self._console = console
        env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
        if processes > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))  # for the server, which starts with the first job
        self.ranks = []
        for rank in range(processes):
            if processes > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            arguments = ([str(word) for word in words], dict(env), str(console), prepare)
            self.ranks.append(CONTEXT.Process(target=_run, args=arguments))
        for process in self.ranks:
            process.start()

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to the given ranks, by default to all."""
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank].is_alive():
                os.kill(self.ranks[rank].pid, number)

    def wait(self, seconds: float = 120) -> list[int]:
        """Return the exit statuses, below 0 for processes that a signal ended; kill what still runs after `seconds`."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        statuses = [process.exitcode for process in self.ranks]
        self.signal(signal.SIGKILL)
        assert None not in statuses, f"still running after {seconds} s: {statuses}\n{self.console()}"
        return statuses

    def wait_until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        """Return as soon as `holds()`, or when the job ended."""
        end = time.monotonic() + seconds
        while not holds() and any(process.is_alive() for process in self.ranks):
            assert time.monotonic() < end, f"nothing happened for {seconds} s\n{self.console()}"
            time.sleep(0.002)

    def console(self) -> str:
        """Return what the processes printed so far, and those of jobs before that wrote to the same file."""
        return self._console.read_text(encoding="utf-8") if self._console.exists() else ""


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Return as soon as `holds()`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not after {seconds} s"
        time.sleep(0.01)


def is_running(process: int) -> bool:
    """Return whether a process runs, on Linux: it exists, and is not a zombie whose status nobody has read."""
    stat = Path("/proc", str(process), "stat")
    with suppress(FileNotFoundError, ProcessLookupError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def run_forked(*words: str | Path | int, processes: int = 1) -> str:
    """Run `python main.py <words>`, which must succeed, and return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(words, Path(folder, "console.txt"), processes=processes)
        assert job.wait(240) == [0] * processes, job.console()
        return job.console()


def start_launcher(words: Sequence[str | Path | int], console: Path) -> ForkServerProcess:
    """Start `python tools/launch.py 2 <words>`, which appends to `console` what it and its processes print."""
    launcher = CONTEXT.Process(target=_launch, args=([str(word) for word in words], str(console)))
    launcher.start()
    return launcher


class Trial:
    """A command in a separate folder, whose jobs can be killed and started again."""

    def __init__(self, folder: Path, processes: int, workers: int, **sections: Any) -> None:
        folder.mkdir()
        self.images = _write_images(folder / "images")
        sections = {
            "DATA": {
                "DATASET": "imagenet",
                "DATA_PATH": str(self.images),
                "BATCH_SIZE": 12 // processes,
                "NUM_WORKERS": workers,
            },
            "TRAIN": {"ACCUMULATION_STEPS": 2, "EMA": {"ENABLED": True}},
            "AUG": {"MIXUP": 0.8, "REPROB": 0.25},
            "PRINT_FREQ": 3,
            "SAVE_EVERY_UPDATES": 2,
            "SAVE_FREQ": 1,
            "KEEP_CHECKPOINTS": 1,
        } | sections
        self.folder = folder / "output" / "tiny" / "default"
        self._processes = processes
        self.words = ["--cfg", write_config(folder, **sections), "--output", folder / "output"]
        self._console = folder / "console.txt"

    def start(self, *flags: str | Path | int, prepare: Callable[[], None] | None = None, **env: str) -> Job:
        """Run the command, with more flags, in processes that call `prepare` first."""
        env = {"DAT_TIMEOUT_MINUTES": "0.5", **env}
        return Job([*self.words, *flags], self._console, processes=self._processes, prepare=prepare, **env)

    def finish(self, *, prepare: Callable[[], None] | None = None, **env: str) -> dict[str, Any]:
        """Run the command to its end and return its outcome."""
        job = self.start(prepare=prepare, **env)
        statuses = job.wait(240)
        assert statuses == [0] * self._processes, job.console()
        return outcome(self.folder)

    def finish_killed(self, *, rows: int = 1, prepare: Callable[[], None] | None = None, **env: str) -> dict[str, Any]:
        """Kill the command in mid-epoch, after it has logged `rows` lines, continue it, and return its outcome."""
        job = self.start(prepare=prepare, **env)
        job.wait_until(lambda: self.rows() >= rows)
        job.signal(signal.SIGKILL)
        assert -signal.SIGKILL in job.wait(), job.console()
        left = self.finish(prepare=prepare, **env)
        assert re.search("continuing from .*, update [1-9]", job.console())
        return left

    def rows(self) -> int:
        """Return how many lines `metrics.jsonl` has."""
        try:
            return len((self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        except FileNotFoundError:  # not written yet, or just moved aside by a run that starts from scratch
            return 0


def whole_and_killed(
    folder: Path, processes: int, *, rows: int = 1, prepare: Callable[[], None] | None = None, **sections: Any
) -> Trial:
    """Run a command to its end, and once more killed in mid-epoch and continued; both must end the same.

    Returns:
        The trial that was killed, in `folder / "killed"`.
    """
    whole, killed = (Trial(folder / name, processes, 0, **sections) for name in ("whole", "killed"))
    expected = whole.finish(prepare=prepare)
    assert first_difference(expected, killed.finish_killed(rows=rows, prepare=prepare)) is None
    return killed


def resumed_equals_whole(command: list[str], folder: Path) -> Path:
    """Run a command of several epochs, and once more from its checkpoint of the first; both must end the same.

    Args:
        command: the command line, without a tag; it keeps the checkpoint of each epoch.
        folder: of its output.

    Returns:
        The folder of the first run.
    """
    from main import main

    whole, resumed = (folder / "tiny" / tag for tag in ("whole", "resumed"))
    assert main([*command, "--tag", "whole"]) == 0
    assert main([*command, "--tag", "resumed", "--resume", str(whole / "epoch_1.pth")]) == 0
    left = [torch.load(run / "last.pth", weights_only=True) for run in (whole, resumed)]
    assert first_difference(*({part: state[part] for part in ("model", "ema")} for state in left)) is None
    for kind in ("train", "eval", "eval_ema"):
        rows = [[row for row in read_metrics(run, kind) if row["epoch"] > 1] for run in (whole, resumed)]
        assert rows[0] == rows[1]
    return whole


class Uninterrupted:
    """Outcomes of uninterrupted runs, and their seconds; each number of processes runs once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, tuple[dict[str, Any], float]] = {}

    def of(self, processes: int) -> tuple[dict[str, Any], float]:
        """Return the outcome with this number of processes; it does not depend on loader workers."""
        if processes not in self._known:
            _start_server()
            begin = time.monotonic()
            left = Trial(self._folder / f"uninterrupted-{processes}", processes, 0).finish()
            self._known[processes] = left, time.monotonic() - begin
        return self._known[processes]


def _run(words: list[str], env: dict[str, str], console: str, prepare: Callable[[], None] | None) -> None:
    os.environ.update(env)
    _print_to(console)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of loaders, as in a process of its own
    from main import main

    torch.set_num_threads(1)
    if prepare:
        prepare()
    sys.exit(main(words))


def _launch(words: list[str], console: str) -> None:
    _print_to(console)
    from tools import launch

    sys.exit(launch.main(["2", *words]))


def _print_to(console: str) -> None:
    descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _start_server() -> None:
    """Return when the server has imported everything."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()


def _write_images(root: Path) -> Path:
    """Write images whose colours depend on their class, so that a run learns, and return `root`."""
    for split, count in (("train", TRAINING_IMAGES), ("val", HELD_OUT_IMAGES)):
        for number in range(count):
            path = root / split / str(number % 10) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = np.random.default_rng(number % 10).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(np.roll(colours, number, axis=0)).resize((32, 32)).save(path)
    return root


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_in_processes(function: Callable[..., None], size: int, *arguments: object) -> None:
    """Call `function(rank, port, *arguments)` in `size` processes, which may meet at a free port."""
    port = free_port()
    processes = [CONTEXT.Process(target=function, args=(rank, port, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * size


def outcome(folder: Path) -> dict[str, Any]:
    """Return the results of a run that must be equal after an interruption."""
    checkpoints = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))}
    del checkpoints["previous.pth"]  # is of another moment after a run that was killed
    for state in checkpoints.values():
        del state["config"]  # names the folder
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"metrics": metrics, "files": sorted(path.name for path in folder.iterdir()), **checkpoints}


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """Return the first difference of two outcomes, compared bit for bit, or None."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return None if torch.equal(one, other) else where
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(one.get(key, "missing"), other.get(key, "missing"), f"{where}/{key}") for key in one | other]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else f"{where}: {one!r} is not {other!r}"
    return next((found for pair in pairs if (found := first_difference(*pair))), None)
