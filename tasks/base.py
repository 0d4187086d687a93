"""The interface between the trainer and a task.

The trainer accesses batches, losses and metrics only through it: the contents of a batch, the outputs of a network and
the computation of metrics are internal to the task.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.streams import Loader
from data.wording import counted
from logger import RunLog
from models.build import build_model
from utils import EvaluationFailed, LateReader, StopSignal, World, sum_over_ranks


@dataclass(frozen=True)
class Score:
    """The metric that decides which epoch is the best.

    Attributes:
        key: its name in the metrics of an evaluation.
        title: its name in the log.
        unit: unit of its values, such as "%".
        higher_is_better: False for errors.
        digits: decimal places shown.
    """

    key: str
    title: str
    unit: str = ""
    higher_is_better: bool = True
    digits: int = 2

    def of(self, metrics: dict[str, float]) -> float:
        """Return the score of `metrics`, larger is better; minus infinity if a metric is not finite."""
        if not all(math.isfinite(value) for value in metrics.values()):
            return -math.inf
        return metrics[self.key] if self.higher_is_better else -metrics[self.key]

    def show(self, score: float) -> str:
        """Return a score as text."""
        value = score if self.higher_is_better else -score
        return f"{value:.{self.digits}f} {self.unit}".rstrip()


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation over all ranks.

    Attributes:
        metrics: named numbers, for `metrics.jsonl` and to select the best epoch.
        lines: the results as lines for the log.
        warnings: warnings for the log.
        pictures: samples with predictions and ground truth, `[H, W, 3]`, uint8, by name; on rank 0.
    """

    metrics: dict[str, float]
    lines: list[str]
    warnings: list[str] = field(default_factory=list)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class Meter(ABC):
    """Collects the results of one evaluation."""

    @abstractmethod
    def add(self, model: nn.Module, batch: Any) -> None:
        """Run the network on a batch, which is on its device, and add the result."""

    @abstractmethod
    def result(self) -> Evaluation:
        """Return the results over all ranks; a collective call.

        Sums use `utils.sum_over_ranks`; other results are gathered.

        Raises:
            EvaluationFailed: not every sample of the data set was counted once, see `check_counts`.
        """


def check_counts(evaluated: float, left_out: float, samples: int) -> list[str]:
    """Check that every sample was counted once, and return a warning about those left out.

    Raises:
        EvaluationFailed: the counts differ, or all samples were left out.
    """
    if evaluated + left_out != samples:
        raise EvaluationFailed(
            f"evaluated {counted(int(evaluated + left_out), 'image')} of a data set of {samples} "
            "(DATA.STREAM.VAL_IMAGES, if it is a stream)"
        )
    if not evaluated:
        raise EvaluationFailed(f"no validation image of {samples} can be evaluated; repair the files, or name others")
    if not left_out:
        return []
    unread = counted(int(left_out), "image could not be read and is", "images could not be read and are")
    return [f"{unread} not counted"]


def zeros(number: int, device: torch.device) -> Tensor:
    """Return `number` zeros to accumulate sums in, in the highest precision of the device."""
    return torch.zeros(number, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


class Task(ABC):
    """Data, network, loss and metrics of a kind of problem.

    Args:
        config: options of the run.
        world: the processes of the run.
        training: whether the training samples are needed, or only the held-out ones.

    Attributes:
        score: the metric that decides which epoch is the best.
        unsupported: options without effect, each with the values that are allowed besides its default; a name that ends
            with a dot stands for all options that it begins. Other values are errors.
        notes: lines about the data for the log at the start.

    Raises:
        ValueError: wrong input.
    """

    score: Score
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {}

    def __init__(self, config: CfgNode, world: World, *, training: bool) -> None:
        self.config = config
        self.world = world
        self.training = training
        self.notes: list[str] = []

    @classmethod
    def score_of(cls, config: CfgNode) -> Score:  # noqa: ARG003
        """Return the `score` of runs with these options."""
        return cls.score

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
        """Called when a training epoch, counted from 0, starts or resumes."""

    def learn_from(self, teacher: nn.Module) -> None:  # noqa: ARG002
        """Add distillation from another network, see `tasks.distillation`.

        Raises:
            ValueError: the task does not support it.
        """
        raise ValueError(f"the task {self.config.TASK} does not support a teacher; remove DISTILL.* from the options")

    @abstractmethod
    def to_device(self, batch: Any, device: torch.device) -> Any:
        """Return a held-out batch on the device."""

    def prepare(self, batch: Any, device: torch.device) -> Any:
        """Return a training batch on the device, with the augmentation that runs there."""
        return self.to_device(batch, device)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor | dict[str, Tensor]:
        """Return the mean loss of a prepared batch, or named losses, whose sum is minimised."""

    @abstractmethod
    def meter(self, samples: int, device: torch.device) -> Meter:
        """Return the meter for an evaluation on `samples` samples over all ranks."""

    def unreadable(self, batch: Any) -> Sequence[str]:  # noqa: ARG002
        """Return the files of a batch from the loader that could not be read."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Return the properties of the training data saved in checkpoints: plain values, compared by `changes`."""
        return {}

    def changes(self, checkpoint: dict[str, Any]) -> list[str]:  # noqa: ARG002
        """Return the differences from the data of the run that wrote `checkpoint`."""
        return []

    def take_classes(self, checkpoint: dict[str, Any], number: int) -> list[str]:  # noqa: ARG002
        """Relabel the held-out samples to match the weights of a checkpoint, which have `number` classes.

        Returns:
            Lines for the log.
        """
        return []

    def summary(self) -> str:
        """Return a short description of the data."""
        return self.config.TASK

    def warnings(self) -> list[str]:
        """Return warnings about the data."""
        return []

    def best_line(self, score: float) -> str:
        """Return the log line with the best score so far, logged after an evaluation."""
        return f"Best {self.score.title}: {self.score.show(score)}"

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, loader: Loader, log: RunLog, stop: StopSignal | None = None
    ) -> Evaluation | None:
        """Evaluate in float32.

        The result does not depend on the number of processes.

        Args:
            model: the network.
            loader: this rank's held-out batches.
            log: shows progress and unreadable files.
            stop: ends the evaluation early if any rank was asked to stop.

        Returns:
            The results; None if it was stopped.
        """
        device, total = self.world.device, len(loader.dataset)
        batches, reader, meter = iter(loader), LateReader(), self.meter(total, device)
        was_training, stopped, going = model.training, False, True
        model.eval()
        with log.bar(math.ceil(total / self.world.size / loader.batch_size), 0, "evaluating") as bar:
            while going and not stopped:  # ranks may have different numbers of batches; all join every exchange
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
