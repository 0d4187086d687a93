"""The interface between the trainer and a task.

The trainer knows batches, losses and metrics only through it: what a batch holds, what a network returns and how
results are counted is the task's own affair.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.streams import Loader
from logger import RunLog
from models import build_model
from utils import LateReader, StopSignal, World, sum_over_ranks


@dataclass(frozen=True)
class Score:
    """The metric that decides which epoch is the best.

    Attributes:
        key: its name among the metrics of an evaluation.
        title: what people call it.
        unit: of its values, as in "%".
        higher_is_better: False for errors.
        digits: shown behind the point.
    """

    key: str
    title: str
    unit: str = ""
    higher_is_better: bool = True
    digits: int = 2

    def of(self, metrics: dict[str, float]) -> float:
        """Return the score of `metrics`, of which larger is better; minus infinity where a metric is not finite."""
        if not all(math.isfinite(value) for value in metrics.values()):
            return -math.inf
        return metrics[self.key] if self.higher_is_better else -metrics[self.key]

    def show(self, score: float) -> str:
        """Return a score in words."""
        value = score if self.higher_is_better else -score
        return f"{value:.{self.digits}f} {self.unit}".rstrip()


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found over all ranks.

    Attributes:
        metrics: named numbers, for `metrics.jsonl` and to choose the best epoch.
        lines: the result in words, for the log.
        warnings: what the reader of these lines should know.
        pictures: samples with what was found and what is true, `[H, W, 3]`, uint8, by name; of the main process.
    """

    metrics: dict[str, float]
    lines: list[str]
    warnings: list[str] = field(default_factory=list)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class Meter(ABC):
    """Collects the results of one evaluation."""

    @abstractmethod
    def add(self, model: nn.Module, batch: Any) -> None:
        """Run the network on a batch, which is on its device, and take in the result."""

    @abstractmethod
    def result(self) -> Evaluation:
        """Return what was found over all ranks, which all call this.

        Sums are added by `utils.sum_over_ranks`; what is no sum is gathered.

        Raises:
            RuntimeError: where not every sample of the data set was counted once, see `check_counts`.
        """


def check_counts(counted: float, left_out: float, samples: int) -> list[str]:
    """Check that every sample was counted once, and return a warning of those that were left out.

    Raises:
        RuntimeError: it was not, or all were left out.
    """
    if counted + left_out != samples or not counted:
        raise RuntimeError(f"evaluated {counted + left_out:.0f} images of a data set of {samples}")
    return [f"{left_out:.0f} images could not be read and are not counted"] if left_out else []


def zeros(number: int, device: torch.device) -> Tensor:
    """Return so many sums to add to, in the highest precision that the device has."""
    return torch.zeros(number, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


class Task(ABC):
    """Data, network, loss and metrics of a kind of problem.

    Args:
        config: options of the run.
        world: the processes of the run.
        training: whether the training samples are needed, or the held-out ones alone.

    Attributes:
        score: the metric that decides.
        notes: what the log says about the data at the start.

    Raises:
        ValueError: wrong input.
    """

    score: Score

    def __init__(self, config: CfgNode, world: World, *, training: bool) -> None:
        self.config = config
        self.world = world
        self.training = training
        self.notes: list[str] = []

    @abstractmethod
    def train_loader(self) -> Loader:
        """Return this rank's training batches; the loader's sampler is a `data.samplers.TrainSampler`."""

    @abstractmethod
    def eval_loader(self) -> Loader:
        """Return this rank's held-out batches; the loader's sampler is a `data.samplers.EvalSampler`."""

    def build_model(self) -> nn.Module:
        """Return the untrained network, on the CPU."""
        return build_model(self.config)

    def set_epoch(self, epoch: int) -> None:  # noqa: B027
        """Take note that an epoch of training, counted from 0, begins or goes on."""

    def learn_from(self, teacher: nn.Module) -> None:  # noqa: ARG002
        """Learn from another network, too, see `tasks.distillation`.

        Raises:
            ValueError: the task cannot.
        """
        raise ValueError(f"the task {self.config.TASK} learns from no teacher; remove DISTILL.* from the options")

    @abstractmethod
    def prepare(self, batch: Any, device: torch.device) -> Any:
        """Return a training batch on the device, with the augmentation that runs there."""

    def to_device(self, batch: Any, device: torch.device) -> Any:
        """Return a held-out batch on the device."""
        return self.prepare(batch, device)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor | dict[str, Tensor]:
        """Return the mean loss of a prepared batch, or named losses, whose sum is minimised."""

    @abstractmethod
    def meter(self, samples: int, device: torch.device) -> Meter:
        """Return what collects the results of an evaluation on so many samples of all ranks."""

    def unreadable(self, batch: Any) -> Sequence[str]:  # noqa: ARG002
        """Return the files of a batch, as it comes out of the loader, that could not be read."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the training data: plain values that `changes` compares."""
        return {}

    def changes(self, checkpoint: dict[str, Any]) -> list[str]:  # noqa: ARG002
        """Return how the data of the run that wrote `checkpoint` differ from these."""
        return []

    def take_classes(self, checkpoint: dict[str, Any], number: int) -> list[str]:  # noqa: ARG002
        """Label the held-out samples as the weights of a checkpoint do, which have so many classes.

        Returns:
            What the log says of it.
        """
        return []

    def summary(self) -> str:
        """Return the data in a few words."""
        return self.config.TASK

    def doubts(self) -> list[str]:
        """Return what is suspicious about the data."""
        return []

    def best_line(self, score: float) -> str:
        """Return the line of the log that follows an evaluation and names the best score so far."""
        return f"Best {self.score.title}: {self.score.show(score)}"

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, loader: Loader, log: RunLog, stop: StopSignal | None = None
    ) -> Evaluation | None:
        """Evaluate in float32.

        The result does not depend on how many processes share the samples.

        Args:
            model: the network.
            loader: this rank's held-out batches.
            log: shows progress and names the files that cannot be read.
            stop: ends the evaluation early when any rank was asked to stop.

        Returns:
            What was found; None where it was stopped.
        """
        device, total = self.world.device, len(loader.dataset)
        batches, reader, meter = iter(loader), LateReader(), self.meter(total, device)
        was_training, stopped, going = model.training, False, True
        model.eval()
        with log.bar(math.ceil(total / self.world.size / loader.batch_size), 0, "evaluating") as bar:
            while going and not stopped:  # a rank may have fewer batches than another; all take part in every exchange
                batch = next(batches, None)
                if batch is not None:
                    for path in self.unreadable(batch):
                        log.warning(f"{path} cannot be read; evaluated without it", alone=True)
                    meter.add(model, self.to_device(batch, device))
                    bar.update()
                asked = (stop is not None and stop.received is not None, batch is not None)
                flags = torch.stack([torch.full((), float(flag), device=device) for flag in asked])
                if earlier := reader.exchange(None, sum_over_ranks(flags)):
                    stopped, going = (bool(flag) for flag in earlier[1])
        model.train(was_training)
        return None if stopped and going else meter.result()
