"""Output of a run: console, `log.txt`, `metrics.jsonl`, `speed.jsonl`, and the recorders of LOG.TO."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image
from termcolor import colored
from tqdm import tqdm
from yacs.config import CfgNode

from config import flatten
from utils import write_atomically

_LINE = "%(asctime)s %(levelname)s %(message)s"
_TIME = "%Y-%m-%d %H:%M:%S"


class _Console(logging.Handler):
    """Writes above the progress bar, in colour on a terminal. An unwritable console does not stop the run."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if sys.stdout.isatty() and record.levelno >= logging.WARNING:
            line = colored(line, "yellow" if record.levelno == logging.WARNING else "red")
        encoding = sys.stdout.encoding or "utf-8"
        try:
            tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # a full disk or a closed pipe: drop the line, or its flush would fail again at exit
            sys.stdout = open(sys.stdout.fileno(), "w", encoding=encoding, closefd=False)  # noqa: SIM115


class RunLog:
    """The log of a run, written by rank 0; other ranks log only what rank 0 cannot know.

    Args:
        folder: folder of the files, or None for no files.
        config: the run's options.
        is_main: whether this is the main process.
        updates_done: number of updates done so far.
    """

    def __init__(self, folder: Path | None, config: CfgNode, *, is_main: bool, updates_done: int = 0) -> None:
        self._logger = logging.getLogger("dat")
        self._logger.propagate = False
        self._logger.handlers.clear()
        self._logger.setLevel(logging.DEBUG)
        self._is_main = is_main
        self._bars = is_main and sys.stderr.isatty()
        console = _Console(logging.INFO if is_main else logging.WARNING)
        console.setFormatter(logging.Formatter("%(message)s"))
        self._logger.addHandler(console)
        logging.raiseExceptions = False  # if the disk is full, lines stay in the file's buffer
        self._files: dict[str, _Lines] = {}
        self._recorders: dict[str, Recorder] = {}
        self._folder = folder if is_main else None
        if folder is None or not is_main:
            return
        file = logging.FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace", delay=True)
        file.setFormatter(logging.Formatter(_LINE, _TIME))
        self._logger.addHandler(file)
        self._files = {name: _Lines(folder / f"{name}.jsonl", self.warning) for name in ("metrics", "speed")}
        for name in recorder_names(config):
            try:
                self._recorders[name] = RECORDERS[name](folder, config, updates_done)
            except Exception as error:  # the service is down, or requires an account
                self.warning(f"{name} does not record this run: {' '.join(str(error).split())}")

    def info(self, message: str) -> None:
        """Log to the console and the file."""
        self._logger.info(message)

    def warning(self, message: str, *, alone: bool = False) -> None:
        """Log a warning: from rank 0 only, or from any rank if only that rank knows it (`alone`)."""
        if self._is_main or alone:
            self._logger.warning(message)

    def error(self, message: str) -> None:
        """Log why the run ends, from any rank."""
        self._logger.error(message)

    def begin(self, notes: Sequence[str], warnings: Sequence[str]) -> None:
        """Log warnings and notes at the start."""
        for warning in warnings:
            self.warning(warning)
        for note in notes:
            self.info(note)

    def result(self, lines: Sequence[str], warnings: Sequence[str], prefix: str = "") -> None:
        """Log the results of an evaluation, each line after `prefix`."""
        for line in lines:
            self.info(f"{prefix}{line}")
        for warning in warnings:
            self.warning(warning)

    def step(self, message: str) -> None:
        """Log a line of the training loop to the file, and to the console unless a progress bar is shown."""
        self._logger.log(logging.DEBUG if self._bars else logging.INFO, message)

    def bar(self, total: int, initial: int, title: str) -> tqdm:
        """Return a progress bar, which is shown only on a terminal."""
        return tqdm(total=total, initial=initial, desc=title, disable=not self._bars, leave=False, dynamic_ncols=True)

    def metrics(self, kind: str, *, epoch: int, update: int, **values: float) -> None:
        """Append one line to `metrics.jsonl`. `update` counts updates from the start of the run.

        The file contains no times, so equal runs write equal files. Non-finite values are written as null. A line that
        could not be written because the disk is full is written before the next one.
        """
        if not self._files:
            return
        self._files["metrics"].add({"kind": kind, "epoch": epoch, "update": update, **values})
        self._record({f"{kind}/{name}": value for name, value in values.items()}, update)

    def speed(self, *, epoch: int, update: int, **values: float) -> None:
        """Append one line to `speed.jsonl`, which holds machine-dependent values: rates, memory, time of day."""
        if not self._files:
            return
        self._files["speed"].add({"epoch": epoch, "update": update, **values, "time": round(time.time(), 3)})
        self._record({f"speed/{name}": value for name, value in values.items()}, update)

    def pictures(self, kind: str, pictures: dict[str, np.ndarray], *, update: int) -> None:
        """Write `<name>.png`, replacing that of an earlier evaluation; `<name>_ema.png` for `eval_ema`.

        Args:
            kind: `eval` or `eval_ema`.
            pictures: `[H, W, 3]`, uint8, by name.
            update: counted from the start of the run.
        """
        for name, pixels in pictures.items() if self._folder else ():
            path = self._folder / f"{name}{kind.removeprefix('eval')}.png"
            try:
                Image.fromarray(pixels).save(path)
            except OSError as error:
                self.warning(f"{path} could not be written ({error.strerror})")
            title = f"{kind}/{name}"
            self._call_recorders(lambda recorder, title=title, pixels=pixels: recorder.picture(title, pixels, update))

    def _record(self, values: dict[str, float], update: int) -> None:
        self._call_recorders(lambda recorder: recorder.record(values, update))

    def _call_recorders(self, call: Callable[[Recorder], object]) -> None:
        for name, recorder in list(self._recorders.items()):
            try:
                call(recorder)
            except Exception as error:  # the run continues without it
                del self._recorders[name]
                self.warning(f"{name} stopped recording this run: {' '.join(str(error).split())}")

    def rewind(self, *, epoch: int, update: int) -> None:
        """Drop the lines of `metrics.jsonl` written after the checkpoint that the run resumes from.

        Args:
            epoch: epochs that were evaluated.
            update: updates that were done.
        """
        if self._files:
            self._files["metrics"].keep(lambda row: _is_before(row, epoch, update))

    def close(self, status: int) -> None:
        """Finish the recorders, given the exit status of the run: 0, 128 + n after signal n, or another one.

        Later calls have no effect.
        """
        self._call_recorders(lambda recorder: recorder.close(status))
        self._recorders.clear()


def _is_before(row: dict[str, Any], epoch: int, update: int) -> bool:
    """Return whether a line belongs to a finished epoch, or to an update already done in the next one."""
    if row["kind"] == "train":
        return row["epoch"] <= epoch or (row["epoch"] == epoch + 1 and row["update"] <= update)
    return row["epoch"] <= epoch


class _Lines:
    """A file of JSON lines; a full disk only delays writing."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._unwritten = ""

    def add(self, row: dict[str, Any]) -> None:
        """Append `row`; non-finite numbers become null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self._unwritten += json.dumps(finite) + "\n"
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._unwritten)
        except OSError as error:
            with suppress(OSError):  # where nothing can be written, nothing needs to be removed
                os.truncate(self._path, size)
            self._warn(f"{self._path} could not be written ({error.strerror}); its lines are kept until there is space")
        else:
            self._unwritten = ""

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows that are not `wanted`, and a truncated last line."""
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        kept = b"".join(line + b"\n" for line in content.splitlines() if _holds(wanted, line))
        if content.startswith(kept):  # only the last lines are dropped, which needs no space on the disk
            os.truncate(self._path, len(kept))
        else:
            write_atomically(self._path, kept.decode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, skipping incomplete lines; empty if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _holds(lambda row: isinstance(row, dict), line)]


def _holds(wanted: Callable[[dict[str, Any]], bool], line: str | bytes) -> bool:
    try:
        return wanted(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return False


class Recorder(Protocol):
    """An experiment tracker. Constructed with the run's folder, its options and the number of updates done."""

    def record(self, values: dict[str, float], update: int) -> None:
        """Record named numbers."""

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        """Record a picture, `[H, W, 3]`, uint8."""

    def close(self, status: int) -> None:
        """Finish the recording of a run that ends with an exit status."""


class TensorBoard:
    """Event files in `tensorboard/`. Events after the last completed update are dropped on resume."""

    def __init__(self, folder: Path, config: CfgNode, updates_done: int) -> None:  # noqa: ARG002
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=updates_done + 1)

    def record(self, values: dict[str, float], update: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        self._writer.add_image(name, pixels, update, dataformats="HWC")

    def close(self, status: int) -> None:  # noqa: ARG002
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE=offline records without an account, `wandb sync` sends it later."""

    def __init__(self, folder: Path, config: CfgNode, updates_done: int) -> None:  # noqa: ARG002
        import wandb

        self._run = wandb.init(
            project=config.LOG.PROJECT,
            name=_name(config),
            id=_remembered(folder / "wandb_id.txt", lambda: secrets.token_hex(4)),
            dir=str(folder),
            resume="allow",
            config=yaml.safe_load(config.dump()),
        )

    def record(self, values: dict[str, float], update: int) -> None:
        self._run.log(values, step=update)

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(pixels)}, step=update)

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)


class MLflow:
    """A run of MLflow, on the server or in the folder given by MLFLOW_TRACKING_URI.

    MLflow's own asynchronous logging sends values in any order, and tells of errors only in its log.
    """

    def __init__(self, folder: Path, config: CfgNode, updates_done: int) -> None:  # noqa: ARG002
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client, file = MlflowClient(), folder / "mlflow_id.txt"
        self._run = _remembered(file, lambda: self._begin(config))
        try:
            self._client.update_run(self._run, status="RUNNING")
        except MlflowException as error:
            hint = f"set MLFLOW_TRACKING_URI to the place of the run in {file}, or delete that file to begin another"
            raise ValueError(f"{error}; {hint}") from error
        # Training does not wait for the server. One thread, so that values arrive in their order.
        self._sender = ThreadPoolExecutor(1)
        self._requests: deque[Future] = deque()

    def _begin(self, config: CfgNode) -> str:
        known = self._client.get_experiment_by_name(config.LOG.PROJECT)
        experiment = known.experiment_id if known else self._client.create_experiment(config.LOG.PROJECT)
        run = self._client.create_run(experiment, run_name=_name(config)).info.run_id
        for key, value in flatten(config):
            self._client.log_param(run, key, value)
        return run

    def record(self, values: dict[str, float], update: int) -> None:
        from mlflow.entities import Metric

        while self._requests and self._requests[0].done():
            self._finish_request()
        now = round(1000 * time.time())
        metrics = [Metric(name, value, now, update) for name, value in values.items()]
        self._requests.append(self._sender.submit(self._client.log_batch, self._run, metrics))

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        self._client.log_image(self._run, pixels, key=name, step=update)

    def close(self, status: int) -> None:
        while self._requests:
            self._finish_request()
        self._sender.shutdown()
        ended = "FINISHED" if status == 0 else "KILLED" if status > 128 else "FAILED"
        self._client.set_terminated(self._run, status=ended)

    def _finish_request(self) -> None:
        """Wait for the oldest request and raise its error, if any."""
        try:
            self._requests.popleft().result()
        except Exception:
            self._sender.shutdown(wait=False, cancel_futures=True)  # each would be repeated for minutes
            raise


RECORDERS: dict[str, type[Recorder]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def _name(config: CfgNode) -> str:
    return config.LOG.NAME or f"{config.MODEL.NAME}-{config.TAG}"


def _remembered(file: Path, make: Callable[[], str]) -> str:
    """Return the text in `file`, which is created on the first call, so a resumed run keeps its id."""
    if not file.exists():
        write_atomically(file, make())
    return file.read_text(encoding="utf-8").strip()


def recorder_names(config: CfgNode) -> list[str]:
    """Return the recorders of a run, from LOG.TO and the older options TENSORBOARD and WANDB."""
    older = [name for name in ("tensorboard", "wandb") if config[name.upper()]]
    return list(dict.fromkeys([*config.LOG.TO, *older]))


def check_recorders(config: CfgNode) -> None:
    """Check that the packages of the recorders are installed.

    Raises:
        ValueError: one is missing.
    """
    for name in recorder_names(config):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"recording with {name} needs its package: pip install {name}, or remove it from LOG.TO")
