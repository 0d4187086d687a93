"""Image classification: cross-entropy with mixup and label smoothing, top-1 and top-5 accuracy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.build import build_eval_loader, build_mixup, build_train_loader, open_dataset
from data.datasets import Batch
from tasks.base import Evaluation, Meter, Score, Task
from utils import World, sum_over_ranks


class LabelledImages(NamedTuple):
    """A batch on the device.

    Attributes:
        images: `[b, 3, H, W]`, normalised, channels last in memory.
        targets: classes `[b]`, -1 for an image that is left out, or shares of the classes `[b, classes]`.
    """

    images: Tensor
    targets: Tensor


class Classification(Task):
    """One class for each image.

    Attributes:
        classes: names by label.
    """

    score = Score("top1", "accuracy", "%")

    def __init__(self, config: CfgNode, world: World, *, training: bool) -> None:
        super().__init__(config, world, training=training)
        self._dataset = open_dataset(config, ("train", "val") if training else ("val",))
        self.classes = self._dataset.classes
        meant_for, config.MODEL.DAT.num_classes = config.MODEL.DAT.num_classes, len(self.classes)
        if len(self.classes) != meant_for:
            self.notes.append(
                f"{len(self.classes)} classes as in the data set, instead of the {meant_for} of the config"
            )
        self._mixup = build_mixup(config, len(self.classes)) if training else None
        self._criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if self._mixup else config.MODEL.LABEL_SMOOTHING)

    def train_loader(self) -> DataLoader:
        return build_train_loader(self.config, self._dataset, rank=self.world.rank, world_size=self.world.size)

    def eval_loader(self) -> DataLoader:
        return build_eval_loader(self.config, self._dataset, rank=self.world.rank, world_size=self.world.size)

    def prepare(self, batch: Batch, device: torch.device) -> LabelledImages:
        images, targets = self.to_device(batch, device)
        return LabelledImages(*self._mixup(images, targets)) if self._mixup else LabelledImages(images, targets)

    def to_device(self, batch: Batch, device: torch.device) -> LabelledImages:
        # Without waiting for the copy.
        images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
        return LabelledImages(images, batch.targets.to(device, non_blocking=True))

    def loss(self, model: nn.Module, batch: LabelledImages) -> Tensor:
        return self._criterion(model(batch.images), batch.targets)

    def meter(self, samples: int, device: torch.device) -> Accuracy:
        return Accuracy(samples, device)

    def unreadable(self, batch: Batch) -> list[str]:
        return batch.unreadable

    def describe(self) -> dict[str, Any]:
        return {"classes": list(self.classes)}

    def changes(self, checkpoint: dict[str, Any]) -> list[str]:
        return class_changes(checkpoint, self.classes)

    def summary(self) -> str:
        return f"{len(self.classes)} classes"

    def doubts(self) -> list[str]:
        return self._dataset.doubts()

    def best_line(self, score: float) -> str:
        return f"Max accuracy: {score:.2f}%"


def class_changes(checkpoint: dict[str, Any], classes: list[str]) -> list[str]:
    """Return the first class that has another name in `checkpoint`, which may not know them, as one message."""
    known = checkpoint.get("classes")
    known = known if isinstance(known, list) else classes
    changed = [label for label, (before, now) in enumerate(zip(known, classes, strict=False)) if before != now]
    return [f"class {label}: {known[label]!r} in the checkpoint, {classes[label]!r} now" for label in changed[:1]]


class Accuracy(Meter):
    """Top-1 and top-5 accuracy in percent and mean cross-entropy; sums over all images divided by their number."""

    def __init__(self, samples: int, device: torch.device) -> None:
        self._samples = samples
        # [correct, correct among five, sum of losses, images, images left out]
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have
        self._sums = torch.zeros(5, dtype=dtype, device=device)

    def add(self, model: nn.Module, batch: LabelledImages) -> None:
        logits, targets = model(batch.images).float(), batch.targets
        read = targets >= 0
        losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (ranked == targets[:, None]) & read[:, None]
        self._sums += torch.stack([x.to(self._sums.dtype).sum() for x in (hits[:, 0], hits, losses, read, ~read)])

    def result(self) -> Evaluation:
        correct1, correct5, loss, images, skipped = sum_over_ranks(self._sums).tolist()
        if images + skipped != self._samples or not images:
            raise RuntimeError(f"evaluated {images + skipped:.0f} images of a data set of {self._samples}")
        metrics = {"top1": 100 * correct1 / images, "top5": 100 * correct5 / images, "loss": loss / images}
        lines = [
            f" * Acc@1 {metrics['top1']:.3f} Acc@5 {metrics['top5']:.3f}",
            f" * Loss {metrics['loss']:.4f}",
            f"Accuracy of the network on the {images:.0f} test images: {metrics['top1']:.1f}%",
        ]
        warnings = [f"{skipped:.0f} images could not be read and are not counted"] if skipped else []
        return Evaluation(metrics, lines, warnings)
