"""The parts of a training run, its position, and the state saved in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

from data.streams import Loader
from data.wording import counted
from logger import RunLog
from lr_scheduler import Continued
from optimizer import keeps_state, skips_on_device
from tasks import Task
from training.checkpoint import FORMAT, CheckpointFolder, load_strictly
from training.running_statistics import RunningStatistics
from training.weight_sets import EMA, RAW, pick_weights
from utils import STAGED, StopSignal, World

AUTOCAST = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Position:
    """Position of a run. Checkpoints contain every field under its name."""

    epoch: int = 0
    # Updates done within the epoch.
    update: int = 0
    # Loss, gradient norm and named losses of the updates since the last log line.
    unlogged: list[list[float]] = field(default_factory=list)
    # Non-finite updates skipped in a row, and in total.
    nonfinite_in_row: int = 0
    nonfinite: int = 0
    # Unreadable files found in this epoch, over all ranks.
    unreadable: int = 0
    # The task's score, larger is better; named after that of classification.
    best_accuracy: float = -1.0
    best_epoch: int = 0

    def lacks_progress(self, patience: int) -> bool:
        """Return whether the score has not improved for `patience` epochs; always false for 0."""
        return 0 < patience <= self.epoch - self.best_epoch

    def finish_epoch(self, score: float) -> None:
        """Move on to the next epoch, given the score at the end of this one."""
        self.epoch += 1
        self.update = self.unreadable = 0
        if score > self.best_accuracy or (not self.best_epoch and math.isfinite(score)):
            self.best_accuracy, self.best_epoch = score, self.epoch


class BadImages:
    """The file that lists unreadable images; each process appends those it finds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # File names need not be UTF-8; Python represents such bytes as surrogates.
        self._file = {"encoding": "utf-8", "errors": "surrogateescape"}
        self._known: set[str] = set()

    def add(self, paths: Sequence[str], warn: Callable[[str], None]) -> None:
        """Append those of `paths` that are not in the file yet."""
        if paths and self._path.exists():
            self._known.update(self._path.read_text(**self._file).splitlines())
        for path in paths:
            if path not in self._known:
                self._known.add(path)
                warn(f"{path} cannot be read; it is replaced by another image (listed in {self._path})")
                with suppress(OSError), self._path.open("a", **self._file) as file:  # the warning matters more
                    file.write(f"{path}\n")


@dataclass
class TrainingState:
    """Everything that is saved in a checkpoint and restored from it.

    Attributes:
        network: the model, without the wrapper of distributed training.
        ema: averaged weights.
        optimizer: the optimizer of the trained parameters of `network`.
        scheduler: learning rate schedule, stepped per update.
        scaler: loss scaler for fp16.
        images_per_update: over all ranks and micro-batches.
        updates_per_epoch: number of updates in a full epoch.
        position: position of the run.
        updates_logged: updates since the start of the run, as the run that wrote the checkpoint has counted them; with
            another number of images per update, not those that this run counts.
    """

    network: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | Continued
    scaler: torch.amp.GradScaler
    images_per_update: int
    updates_per_epoch: int
    position: Position = field(default_factory=Position)
    updates_logged: int = 0

    @property
    def updates_done(self) -> int:
        """Updates since the start of the run."""
        return self.position.epoch * self.updates_per_epoch + self.position.update

    def is_finite(self) -> bool:
        """Return whether all weights and their averages are finite."""
        networks = [self.network, *([self.ema.module] if self.ema else [])]
        entries = [value for network in networks for value in network.state_dict().values()]
        finite = [value.isfinite().all() for value in entries if value.is_floating_point()]
        return bool(torch.stack(finite).all())

    def to_dict(self) -> dict[str, Any]:
        """Return the state in the layout of a checkpoint."""
        averaged = self.ema.module.state_dict() if self.ema else None
        return {
            "format": FORMAT,
            "model": self.network.state_dict(),
            "ema": averaged,
            "model_ema": averaged,  # where timm looks for them; the tensors are stored once
            "chosen": EMA if self.ema else RAW,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "images_per_update": self.images_per_update,
            **vars(self.position),
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Restore everything but the weights, which are already loaded, from `state`, which was read from `path`.

        Raises:
            ValueError: averaged weights are needed but missing, or the optimizer state does not match.
        """
        if self.ema and state["ema"] is None:
            raise ValueError(
                f"{path} holds no averaged weights to continue; leave out --ema, or start from its weights by "
                "--pretrained"
            )
        if self.ema:
            averaged = pick_weights(state, path, self.ema.module, kind=EMA)
            load_strictly(self.ema.module, averaged.weights, path)
        configured = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            groups = zip(configured, self.optimizer.param_groups, strict=True)
            fits = all(a.keys() <= b.keys() for a, b in groups) and self._has_optimizer_state(
                started=state["epoch"] + state["update"] > 0
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(f"{path} has the state of another optimizer; start from its weights with --pretrained")
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)  # the current options take precedence over those of the checkpoint
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.position = Position(**{name: state[name] for name in vars(self.position)})
        images = state.get("training_images", self.updates_per_epoch * self.images_per_update)
        self.updates_logged = self.position.epoch * (images // state["images_per_update"]) + self.position.update
        # With a different number of images per update, resume at the same image.
        self.position.update = self.position.update * state["images_per_update"] // self.images_per_update
        if self.position.update > self.updates_per_epoch:
            raise ValueError(
                f"{path} was saved after {counted(self.position.update, 'update')} of an epoch, which has "
                f"{self.updates_per_epoch} now; continue with the data set that the run started with"
            )
        if self.updates_done:
            self.scheduler.step_update(self.updates_done - 1)

    def _has_optimizer_state(self, *, started: bool) -> bool:
        """Return whether the restored optimizer state is complete; fused kernels do not check shapes themselves."""
        held = self.optimizer.state
        fit = (
            isinstance(value, torch.Tensor) and value.shape in ((), weight.shape)
            for weight, values in held.items()
            for value in values.values()
        )
        if skips_on_device(self.optimizer) and not all(fit):
            return False
        return bool(held or not started or not keeps_state(self.optimizer))


@dataclass(frozen=True)
class Run:
    """A complete training run, built by `training.build`. Only `state` changes."""

    config: CfgNode
    world: World
    task: Task
    train_loader: Loader
    eval_loader: Loader
    state: TrainingState
    statistics: RunningStatistics
    # The network, wrapped for distributed training if there are several processes.
    model: nn.Module
    folder: Path
    log: RunLog
    stop: StopSignal
    bad_images: BadImages
    checkpoints: CheckpointFolder
    # Lock of the output folder, on rank 0.
    lock: TextIO | None

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context of the forward pass."""
        amp = self.config.AMP
        return torch.autocast(self.world.device.type, dtype=AUTOCAST[amp], enabled=amp != "off")

    def gradient_sync(self, *, enabled: bool) -> AbstractContextManager:
        """Return the context of a micro-batch: gradients are averaged over ranks only in the last one of an update."""
        return nullcontext() if enabled or self.world.size == 1 else self.model.no_sync()

    @contextmanager
    def fastest_convolutions(self) -> Iterator[None]:
        """Let cuDNN try its algorithms once for each size of its inputs: images of detection have too many sizes."""
        torch.backends.cudnn.benchmark = self.config.TASK != "detection" and not self.config.DETERMINISTIC
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = False

    def early_stop_reason(self) -> str:
        """Return why the run ends before its last epoch; empty if it continues."""
        patience = self.config.TRAIN.PATIENCE
        if self.state.position.lacks_progress(patience):
            return f"no better {self.task.score.title} for {counted(patience, 'epoch')} (TRAIN.PATIENCE)"
        return ""

    def save(self, *, best: bool = False, epoch: int | None = None) -> bool:
        """Write a checkpoint and return whether it succeeded; otherwise the previous one stays in use.

        Weights that are not finite are not written.

        Args:
            best: also write `best.pth`.
            epoch: also write `epoch_N.pth` of this epoch.
        """
        position = self.state.position
        if not self.state.is_finite():
            self.log.info("not saved: the weights are not finite")
            return False
        if not self.world.is_main:
            return True
        images = {"training_images": len(self.train_loader.dataset), "config": self.config.dump()}
        try:
            self.checkpoints.save(self.state.to_dict() | images | self.task.describe(), best=best, epoch=epoch)
        except OSError as error:
            self.log.warning(
                f"{self.folder / f'last{STAGED}'}, the checkpoint of epoch {position.epoch + 1}, update "
                f"{position.update}, could not be written ({error.strerror}); the previous one, "
                f"{self.folder / 'last.pth'}, stays in use"
            )
            return False
        return True
