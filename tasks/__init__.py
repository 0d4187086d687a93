"""Tasks: each provides data, loss and metrics to the trainer through one small interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from config import check_unsupported, flatten
from models.options import did_you_mean
from utils import World

from .base import Evaluation, Meter, Score, Task
from .classification import Classification
from .detection import Detection
from .segmentation import Segmentation

__all__ = ["TASKS", "Evaluation", "Meter", "Score", "Task", "build_task", "check_task"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
}


def check_task(config: Any) -> None:
    """Raise a ValueError if there is no task ``config.TASK``."""
    if config.TASK not in TASKS:
        hint = did_you_mean(config.TASK, TASKS)
        raise ValueError(f"TASK must be one of {', '.join(TASKS)}, not {config.TASK!r}{hint}")


def build_task(config: Any, world: World, *, training: bool) -> Task:
    """Return the task ``config.TASK`` with its data set opened.

    Args:
        config: options of the run.
        world: the processes of the run.
        training: whether the training images are needed, or only the held-out ones.

    Raises:
        ValueError: the task is unknown or does not support an option, or its data set is missing or has a wrong layout.
    """
    check_task(config)
    task = TASKS[config.TASK]
    check_unsupported(config, _without_effect(config, task.unsupported), by=f"TASK {config.TASK}")
    return task(config, world, training=training)


def _without_effect(config: Any, unsupported: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Yield the options of `Task.unsupported` whose values are not among those allowed besides the defaults."""
    for key, value in flatten(config):
        for name, allowed in unsupported.items():
            if (key == name or (name.endswith(".") and key.startswith(name))) and value not in allowed:
                yield key
