"""Tasks: each provides data, loss and metrics to the trainer through one small interface."""

from __future__ import annotations

import difflib
from typing import Any

from config import OPTIONS
from utils import World

from .base import Evaluation, Meter, Score, Task
from .classification import Classification
from .detection import Detection
from .segmentation import Segmentation

__all__ = ["TASKS", "Evaluation", "Meter", "Score", "Task", "build_task"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
}


def build_task(config: Any, world: World, *, training: bool) -> Task:
    """Return the task ``config.TASK`` with its data set opened.

    Args:
        config: options of the run.
        world: the processes of the run.
        training: whether the training images are needed, or only the held-out ones.

    Raises:
        ValueError: the task is unknown, its data set is missing or has a wrong layout, or an option is only supported
            for classification.
    """
    if config.TASK not in TASKS:
        near = difflib.get_close_matches(config.TASK, TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"TASK must be one of {', '.join(TASKS)}, not {config.TASK!r}{hint}")
    if not issubclass(TASKS[config.TASK], Classification):
        _check_options(config)
    return TASKS[config.TASK](config, world, training=training)


def _check_options(config: Any) -> None:
    for name in ("BALANCE", "CACHE", "MULTI_LABEL"):
        if config.DATA[name] != (default := OPTIONS[f"DATA.{name}"].default):
            raise ValueError(f"DATA.{name} is only for TASK classification; leave it at {default} for {config.TASK}")
