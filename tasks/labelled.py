"""Base class of tasks with named classes, which network and checkpoint must match."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from yacs.config import CfgNode

from data.build import loader_warnings
from data.sources import compose
from data.wording import counted
from models.build import num_classes, set_num_classes
from tasks.base import Task
from utils import World

# Options that only classification implements, each with the values that are allowed besides its default: the default of
# an augmentation is that of classification, so a config may well turn it off.
CLASSIFICATION_ONLY: Mapping[str, Sequence[Any]] = {
    "DATA.BALANCE": (),
    "DATA.CACHE": (),
    "DATA.CLASS_ORDER": (),
    "DATA.INTERPOLATION": ("bilinear",),
    "DATA.MULTI_LABEL": (),
    "MODEL.LABEL_SMOOTHING": (0,),
    "AUG.CROP": (),
    "AUG.CROP_PADDING": (0,),
    "AUG.COLOR_JITTER": (0,),
    "AUG.AUTO_AUGMENT": ("",),
    "AUG.REPROB": (0,),
    "AUG.REMODE": (),
    "AUG.RECOUNT": (0,),
    "AUG.MIXUP": (0,),
    "AUG.CUTMIX": (0,),
    "AUG.MIXUP_PROB": (0,),
    "AUG.MIXUP_SWITCH_PROB": (0,),
    "AUG.MIXUP_MODE": (),
    "AUG.MIXUP_OFF_EPOCHS": (),
    "TEST.CLASSES": (),
    "TEST.CROP": (False,),
    "TEST.CROP_RATIO": (1,),
    "TEST.LABELS": (),
    "TEST.RESIZE": ("shorter",),
}


class LabelledTask(Task):
    """A task on images of a data set whose classes have names.

    Attributes:
        classes: names by label.
    """

    def __init__(self, config: CfgNode, world: World, *, training: bool) -> None:
        super().__init__(config, world, training=training)
        self._dataset = self.open_dataset(("train", "val") if training else ("val",))
        self._rank = {"rank": world.rank, "world_size": world.size}  # loader arguments of this rank
        self.classes: list[str] = self._dataset.classes
        meant_for = num_classes(config)
        set_num_classes(config, len(self.classes))
        if len(self.classes) != meant_for:
            own = counted(len(self.classes), "class", "classes")
            self.notes.append(f"{own} as in the data set, instead of {meant_for} in the config")

    @abstractmethod
    def open_dataset(self, needs: Sequence[str]) -> Any:
        """Open the splits of the data set in `needs`, of "train" and "val".

        Raises:
            ValueError: it is missing or has a wrong layout.
        """

    def unreadable(self, batch: Any) -> list[str]:
        return batch.unreadable

    def describe(self) -> dict[str, Any]:
        return {"classes": list(self.classes)}

    def changes(self, checkpoint: dict[str, Any]) -> list[str]:
        return class_changes(checkpoint, self.classes)

    def largest_image(self) -> tuple[int, int]:
        """Return the largest height and width of the images of a batch."""
        return self.config.image_size

    def warnings(self) -> list[str]:
        return [*self._dataset.format_warnings, *loader_warnings(self.config, self.largest_image())]


def class_changes(checkpoint: dict[str, Any], classes: list[str]) -> list[str]:
    """Return a message about the first class with a different name in `checkpoint`, if it has class names."""
    known = checkpoint.get("classes")
    known = [compose(name) for name in known] if isinstance(known, list) else classes
    changed = [label for label, (before, now) in enumerate(zip(known, classes, strict=False)) if before != now]
    return [f"class {label}: {known[label]!r} in the checkpoint, {classes[label]!r} now" for label in changed[:1]]
