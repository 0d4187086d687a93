"""The teacher of knowledge distillation, as DISTILL.* names it."""

from __future__ import annotations

import timm
from timm.data import resolve_data_config
from yacs.config import CfgNode

from tasks import Task
from tasks.distillation import Teacher
from training.trained_model import load_trained


def give_teacher(config: CfgNode, task: Task) -> list[str]:
    """Let a task learn from the network that the config names, if any; return what the log says of it.

    Raises:
        ValueError: it cannot be loaded, or has other classes than the task.
    """
    settings = config.DISTILL
    if settings.TEACHER and settings.TIMM:
        raise ValueError("DISTILL.TEACHER and DISTILL.TIMM name a teacher each; remove one of them")
    if not settings.TEACHER and not settings.TIMM:
        return []
    ours = task.describe().get("classes", [])
    if settings.TEACHER:
        trained = load_trained(settings.TEACHER, cfg=settings.CONFIG or None)
        teacher, classes, words = Teacher(trained.network, trained.config.image_size), trained.classes, trained.words()
    else:
        teacher, classes = _of_timm(settings.TIMM)
        words = settings.TIMM
    are_named = settings.TEACHER and not settings.CONFIG  # only a checkpoint of ours tells them as the data set does
    if len(classes) != len(ours) or (are_named and classes != ours):
        differs = f"{len(classes)} classes and the data set {len(ours)}"
        if len(classes) == len(ours):
            label = next(label for label, name in enumerate(ours) if classes[label] != name)
            differs = f"class {label} as {classes[label]!r} and the data set as {ours[label]!r}"
        raise ValueError(f"the teacher {settings.TEACHER or settings.TIMM} has {differs}; train it on the same classes")
    task.learn_from(teacher.to(task.world.device))
    return [f"learning from {words}"]


def _of_timm(name: str) -> tuple[Teacher, list[str]]:
    """Return a pretrained model of timm and its classes, without names."""
    try:
        network = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError, ValueError) as error:  # of an unknown name, or of no network
        raise ValueError(f"DISTILL.TIMM: timm gives no pretrained {name!r}: {error}") from None
    data = resolve_data_config(model=network)
    return Teacher(network, data["input_size"][1:], data["mean"], data["std"]), [""] * network.num_classes
