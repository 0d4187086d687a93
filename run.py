"""What a training run consists of, how far it has come, and what its checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from checkpoint import FORMAT, CheckpointFolder, load_strictly, model_weights
from logger import RunLog
from output_folder import STAGED
from utils import StopSignal, World, agree_on


@dataclass
class Position:
    """How far a run has come."""

    epoch: int = 0
    # Updates done within the epoch.
    update: int = 0
    # Losses and gradient norms since the last line of the log.
    unlogged: list[list[float]] = field(default_factory=list)
    # Updates skipped in a row because they were not finite, and in all.
    nonfinite_in_row: int = 0
    nonfinite: int = 0
    # Unreadable images met in this epoch, over all ranks.
    unreadable: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0

    def finish_epoch(self, accuracy: float) -> None:
        """Move on to the next epoch, given the top-1 accuracy at the end of this one in percent."""
        self.epoch += 1
        self.update = self.unreadable = 0
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_epoch = accuracy, self.epoch


class BadImages:
    """The file that lists every image that could not be read; each process adds those that it meets."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # File names need not be UTF-8; Python hands such bytes through as surrogates.
        self._file = {"encoding": "utf-8", "errors": "surrogateescape"}
        self._known: set[str] = set()

    def add(self, paths: list[str], warn: Callable[[str], None]) -> None:
        """Add those of `paths` that are not in the file yet."""
        if paths and self._path.exists():
            self._known.update(self._path.read_text(**self._file).splitlines())
        for path in paths:
            if path not in self._known:
                self._known.add(path)
                warn(f"{path} cannot be read; another image takes its place (listed in {self._path})")
                with suppress(OSError), self._path.open("a", **self._file) as file:  # the warning is the better word
                    file.write(f"{path}\n")


@dataclass
class Run:
    """Everything a training run consists of; `position` is what its checkpoints restore."""

    config: CfgNode
    world: World
    log: RunLog
    folder: Path
    classes: list[str]
    model: nn.Module
    train_loader: DataLoader
    eval_loader: DataLoader
    mixup: Mixup | None
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    stop: StopSignal
    bad_images: BadImages
    checkpoints: CheckpointFolder
    position: Position = field(default_factory=Position)
    continued_from: Path | None = None
    # Of the main process: keeps other runs out of the folder.
    hold: TextIO | None = None

    @property
    def updates_per_epoch(self) -> int:
        """Updates of a whole epoch."""
        return self.train_loader.sampler.updates_per_epoch

    @property
    def images_per_update(self) -> int:
        """Images that one update sees, over all ranks and micro-batches."""
        return self.config.DATA.BATCH_SIZE * self.world.size * self.config.TRAIN.ACCUMULATION_STEPS

    @property
    def updates_done(self) -> int:
        """Updates since the start of the run."""
        return self.position.epoch * self.updates_per_epoch + self.position.update

    def network(self) -> nn.Module:
        """Return the model without the wrapper of distributed training."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def state(self) -> dict[str, Any]:
        """Return all that a continuation needs, as a checkpoint holds it."""
        return {
            "format": FORMAT,
            "model": self.network().state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "images_per_update": self.images_per_update,
            "training_images": len(self.train_loader.dataset),
            "classes": list(self.classes),
            "config": self.config.dump(),
            **vars(self.position),
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Continue where `state`, read from `path`, was saved; the weights are in the network already.

        Raises:
            ValueError: where averaged weights are asked for and it has none, or its optimizer's state does not fit.
        """
        if self.ema:
            load_strictly(self.ema.module, model_weights(state, path, ema=True), path)
        configured = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            fits = all(a.keys() <= b.keys() for a, b in zip(configured, self.optimizer.param_groups, strict=True))
            fits = fits and self._has_optimizer_state(started=state["epoch"] + state["update"] > 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(f"{path} holds the state of another optimizer; start from its weights by --pretrained")
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)  # where the run continues under other options, these hold
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.continued_from = path
        self.position = Position(**{name: state[name] for name in vars(self.position)})
        # Another size of updates continues at the same image.
        self.position.update = self.position.update * state["images_per_update"] // self.images_per_update
        if self.position.update > self.updates_per_epoch:
            raise ValueError(
                f"{path} was saved after {self.position.update} updates of an epoch, which has "
                f"{self.updates_per_epoch} now; continue with the data set that the run began with"
            )
        if self.updates_done:
            self.scheduler.step_update(self.updates_done - 1)

    def _has_optimizer_state(self, *, started: bool) -> bool:
        """Return whether what the optimizer holds of the weights has their shapes; kernels would not ask."""
        held = self.optimizer.state
        fit = (
            isinstance(value, torch.Tensor) and value.shape in ((), weight.shape)
            for weight, values in held.items()
            for value in values.values()
        )
        return bool(held or not started) and all(fit)

    def check_agreement(self) -> None:
        """Check that all processes begin at the same update.

        Raises:
            ValueError: where they do not.
        """
        if not all([agree_on(self.position.epoch), agree_on(self.position.update)]):
            raise ValueError(
                f"the processes do not see the same checkpoints in {self.folder}; it must be a shared folder"
            )

    def save(self, *, best: bool = False, epoch: int | None = None) -> bool:
        """Write a checkpoint and return whether there is one now; otherwise the one before stays in use.

        Nothing is written while updates are not finite.

        Args:
            best: also as `best.pth`.
            epoch: also as `epoch_N.pth` of this epoch.
        """
        if self.position.nonfinite_in_row:  # these weights may be what is broken
            self.log.info("not saved: the last update was not finite")
            return False
        if not self.world.is_main:
            return True
        try:
            self.checkpoints.save(self.state(), best=best, epoch=epoch)
        except OSError as error:
            self.log.warning(
                f"{self.folder / f'last{STAGED}'}, the checkpoint of epoch {self.position.epoch + 1}, update "
                f"{self.position.update}, could not be written ({error.strerror}); the one before it, "
                f"{self.folder / 'last.pth'}, stays in use"
            )
            return False
        return True
