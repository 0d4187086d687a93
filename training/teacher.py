"""Load the teacher for knowledge distillation from the options DISTILL.*."""

from __future__ import annotations

import timm
from timm.data import resolve_data_config
from yacs.config import CfgNode

from config import check_unsupported
from data.wording import counted
from tasks import Task
from tasks.distillation import Teacher
from training.trained_model import load_trained


def add_teacher(config: CfgNode, task: Task) -> list[str]:
    """Set the teacher of a task from the config, if any; return notes for the log.

    Raises:
        ValueError: it cannot be loaded, or its classes differ from those of the task.
    """
    settings = config.DISTILL
    if settings.TEACHER and settings.TIMM:
        raise ValueError("DISTILL.TEACHER and DISTILL.TIMM both name a teacher; remove one of them")
    if not settings.TEACHER and not settings.TIMM:
        check_unsupported(config, [f"DISTILL.{name}" for name in settings], by="a run without a teacher")
        return []
    if settings.TIMM:
        check_unsupported(config, ["DISTILL.CONFIG"], by="DISTILL.TIMM")
    ours = task.describe().get("classes", [])
    if settings.TEACHER:
        trained = load_trained(settings.TEACHER, cfg=settings.CONFIG or None)
        teacher, classes, words = Teacher(trained.network, trained.config.image_size), trained.classes, trained.words()
    else:
        teacher, classes = _of_timm(settings.TIMM)
        words = settings.TIMM
    are_named = settings.TEACHER and not settings.CONFIG  # only checkpoints of this trainer have comparable names
    if len(classes) != len(ours) or (are_named and classes != ours):
        differs = f"{counted(len(classes), 'class', 'classes')}, but the data set has {len(ours)}"
        if len(classes) == len(ours):
            label = next(label for label, name in enumerate(ours) if classes[label] != name)
            differs = f"class {label} as {classes[label]!r}, but the data set has {ours[label]!r}"
        raise ValueError(f"the teacher {settings.TEACHER or settings.TIMM} has {differs}; train it on the same classes")
    task.learn_from(teacher.to(task.world.device))
    return [f"distilling from {words}"]


def _of_timm(name: str) -> tuple[Teacher, list[str]]:
    """Return a pretrained timm model and its classes, without names."""
    try:
        network = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError, ValueError) as error:  # an unknown name, or no network connection
        raise ValueError(f"DISTILL.TIMM: timm cannot load a pretrained {name!r}: {error}") from None
    data = resolve_data_config(model=network)
    return Teacher(network, data["input_size"][1:], data["mean"], data["std"]), [""] * network.num_classes
