"""What a run says: console, `log.txt`, `metrics.jsonl`, and TensorBoard or Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from termcolor import colored
from tqdm import tqdm
from yacs.config import CfgNode

from utils import write_whole

_LINE = "%(asctime)s %(levelname)s %(message)s"
_TIME = "%Y-%m-%d %H:%M:%S"


class _Console(logging.Handler):
    """Writes above the progress bar, in colour on a terminal. A console that takes no lines does not end the run."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if sys.stdout.isatty() and record.levelno >= logging.WARNING:
            line = colored(line, "yellow" if record.levelno == logging.WARNING else "red")
        encoding = sys.stdout.encoding or "utf-8"
        try:
            tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
            sys.stdout.flush()
        except (
            OSError
        ):  # a full disk, or nobody reads any more: forget the line, whose flush would fail again at the end
            sys.stdout = open(sys.stdout.fileno(), "w", encoding=encoding, closefd=False)  # noqa: SIM115


class RunLog:
    """The voice of a run. Only the main process writes; the others are silent but for warnings."""

    def __init__(self, folder: Path | None, config: CfgNode, *, is_main: bool, updates_done: int = 0) -> None:
        """Args:
        folder: where `log.txt` and `metrics.jsonl` go; None writes no files.
        config: the run's options.
        is_main: whether this is the main process.
        updates_done: how far the run has come; what TensorBoard holds beyond that is dropped.
        """
        self._logger = logging.getLogger("dat")
        self._logger.propagate = False
        self._logger.handlers.clear()
        self._logger.setLevel(logging.DEBUG)
        self._bars = is_main and sys.stderr.isatty()
        console = _Console(logging.INFO if is_main else logging.WARNING)
        console.setFormatter(logging.Formatter("%(message)s"))
        self._logger.addHandler(console)
        logging.raiseExceptions = False  # lines that a full disk does not take wait in the file's buffer
        self._metrics: Path | None = None
        self._unwritten = ""
        self._tensorboard = self._wandb = None
        if folder is None or not is_main:
            return
        file = logging.FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace", delay=True)
        file.setFormatter(logging.Formatter(_LINE, _TIME))
        self._logger.addHandler(file)
        self._metrics = folder / "metrics.jsonl"
        if config.TENSORBOARD:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=updates_done + 1)
        if config.WANDB:
            import wandb

            known = folder / "wandb_id.txt"  # so that a continued run stays one run
            if not known.exists():
                known.write_text(secrets.token_hex(4), encoding="utf-8")
            self._wandb = wandb.init(
                project="dat",
                config=yaml.safe_load(config.dump()),
                name=f"{config.MODEL.NAME}-{config.TAG}",
                id=known.read_text(encoding="utf-8"),
                dir=str(folder),
                resume="allow",
            )

    def info(self, message: str) -> None:
        """Say `message` on the console and in the file."""
        self._logger.info(message)

    def warning(self, message: str) -> None:
        """Say `message` so that it stands out."""
        self._logger.warning(message)

    def error(self, message: str) -> None:
        """Say why the run ends, from any rank."""
        self._logger.error(message)

    def result(self, lines: Sequence[str], warnings: Sequence[str], prefix: str = "") -> None:
        """Say what an evaluation found, each line after `prefix`."""
        for line in lines:
            self.info(f"{prefix}{line}")
        for warning in warnings:
            self.warning(warning)

    def step(self, message: str) -> None:
        """Say a line of the training loop: to the file, and to the console where no progress bar shows the same."""
        self._logger.log(logging.DEBUG if self._bars else logging.INFO, message)

    def bar(self, total: int, initial: int, title: str) -> tqdm:
        """Return a progress bar, which draws on a terminal only."""
        return tqdm(total=total, initial=initial, desc=title, disable=not self._bars, leave=False, dynamic_ncols=True)

    def metrics(self, kind: str, *, epoch: int, update: int, **values: float) -> None:
        """Append one line to `metrics.jsonl`. `update` counts updates from the start of the run.

        The file holds no clock readings, so that equal runs write equal files. A value that is not finite is null. A
        line that a full disk does not take is written before the next one.
        """
        if self._metrics is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._unwritten += json.dumps({"kind": kind, "epoch": epoch, "update": update, **finite}) + "\n"
        self._append_unwritten(self._metrics)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, update)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=update)

    def rewind(self, *, epoch: int, update: int) -> None:
        """Drop what a lost process wrote to `metrics.jsonl` past its last checkpoint.

        Args:
            epoch: epochs that were evaluated.
            update: updates that were done.
        """
        if self._metrics is None or not self._metrics.exists():
            return
        lines = self._metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _is_before(line, epoch, update)]
        write_whole(self._metrics, "".join(f"{line}\n" for line in kept))

    def _append_unwritten(self, path: Path) -> None:
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(self._unwritten)
        except OSError as error:
            if path.exists():
                os.truncate(path, size)
            self.warning(f"{path} could not be written ({error.strerror}); its next lines wait until there is room")
        else:
            self._unwritten = ""

    def close(self) -> None:
        """Finish the files."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _is_before(line: str, epoch: int, update: int) -> bool:
    try:
        row = json.loads(line)
        return row["update"] <= update if row["kind"] == "train" else row["epoch"] <= epoch
    except (ValueError, KeyError, TypeError):  # the line that a kill cut off
        return False


def check_writers(config: CfgNode) -> None:
    """Check that the packages of TENSORBOARD and WANDB are there where they are asked for.

    Raises:
        ValueError: where one is not.
    """
    for option, package in (("TENSORBOARD", "tensorboard"), ("WANDB", "wandb")):
        if config[option] and importlib.util.find_spec(package) is None:
            raise ValueError(f"{option} needs the package {package}: pip install {package}, or set {option} to False")
