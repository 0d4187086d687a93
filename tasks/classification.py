"""Image classification: cross-entropy with mixup and label smoothing, top-1 and top-5 accuracy.

Images that may have several labels (DATA.MULTI_LABEL) are learned by binary cross-entropy and evaluated by F1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from config import check_unsupported
from data.build import build_erasing, build_eval_loader, build_mixup, build_train_loader, loader_warnings, open_dataset
from data.datasets import Batch
from data.images import StoredImage
from data.sources import Dataset, ImageSource
from data.streams import Loader
from data.transforms import normalize
from data.wording import counted
from logger import RunLog
from models.build import set_num_classes
from tasks.base import Evaluation, Meter, Score, check_counts, zeros
from tasks.classes import describe_labels, labels_of, order_warning, read_label_sets
from tasks.distillation import Distillation
from tasks.labelled import LabelledTask
from utils import StopSignal, World, sum_over_ranks

# Options that suppose one label per image.
SINGLE_LABEL_ONLY = ("DATA.BALANCE", "MODEL.CLASS_MAP", "TEST.CLASSES", "TEST.LABELS")


class LabelledImages(NamedTuple):
    """A batch on the device.

    Attributes:
        images: `[b, 3, H, W]`, normalised, channels last in memory.
        targets: classes `[b]`; with mixup their weights, `[b, classes]`; with several labels per image 0 and 1,
            `[b, classes]`. Values of -1 mark an image that is left out.
    """

    images: Tensor
    targets: Tensor


class Mirrored(nn.Module):
    """A classifier that gives the mean of the logits of an image and its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[b, classes]` of images `[b, 3, H, W]`."""
        return (self.network(images) + self.network(images.flip(-1))) / 2


class Classification(LabelledTask):
    """One class for each image."""

    score = Score("top1", "accuracy", "%")

    def __init__(self, config: CfgNode, world: World, *, training: bool) -> None:
        if config.DATA.MULTI_LABEL:
            check_unsupported(config, SINGLE_LABEL_ONLY, by="DATA.MULTI_LABEL")
        super().__init__(config, world, training=training)
        if training and config.TEST.LABELS:
            raise ValueError("TEST.LABELS is only for --eval; remove it from the options of a run")
        if training:
            self.notes.append(f"classes by label: {describe_labels(self.classes)}")
        self._erase = build_erasing(config)
        self._mixup = build_mixup(config, len(self.classes)) if training else None
        self._warnings: list[str] = []
        self._present: list[int] | None = None
        self._distillation: Distillation | None = None
        self.score = self.score_of(config)
        self._criterion = self._build_criterion()

    @classmethod
    def score_of(cls, config: CfgNode) -> Score:
        return Score("f1", "F1", "%") if config.DATA.MULTI_LABEL else cls.score

    def open_dataset(self, needs: Sequence[str]) -> Dataset:
        return open_dataset(self.config, needs)

    def _build_criterion(self) -> nn.Module:
        config = self.config
        if config.DATA.MULTI_LABEL:
            return nn.BCEWithLogitsLoss()
        smoothing = 0.0 if self._mixup else config.MODEL.LABEL_SMOOTHING
        if config.DATA.BALANCE == "loss" and self.training:
            weights = balancing_weights(self._dataset.counts(self._dataset.train)).to(self.world.device)
            # PyTorch's mean divides by the weights of the micro-batch, so the loss would depend on its size.
            return nn.CrossEntropyLoss(weights, label_smoothing=smoothing, reduction="none")
        return nn.CrossEntropyLoss(label_smoothing=smoothing)

    def train_loader(self) -> Loader:
        return self._build_loader(build_train_loader)

    def eval_loader(self) -> Loader:
        return self._build_loader(build_eval_loader)

    def _build_loader(self, build: Callable[..., Loader]) -> Loader:
        """Return this rank's loader, and collect the warnings about it."""
        loader = build(self.config, self._dataset, **self._rank)
        self._warnings += loader.dataset.warnings
        return loader

    def set_epoch(self, epoch: int) -> None:
        if self._mixup:
            self._mixup.mixup_enabled = epoch < self.config.TRAIN.EPOCHS - self.config.AUG.MIXUP_OFF_EPOCHS

    def learn_from(self, teacher: nn.Module) -> None:
        if self.config.DATA.MULTI_LABEL:
            raise ValueError("a teacher needs single labels; remove DISTILL.* from the options for DATA.MULTI_LABEL")
        options = self.config.DISTILL
        self._distillation = Distillation(
            teacher=teacher, kind=options.KIND, share=options.SHARE, temperature=options.TEMPERATURE
        )

    def prepare(self, batch: Batch, device: torch.device) -> LabelledImages:
        images, targets = self.to_device(batch, device)
        images = self._erase(images) if self._erase else images
        return LabelledImages(*self._mixup(images, targets)) if self._mixup else LabelledImages(images, targets)

    def to_device(self, batch: Batch, device: torch.device) -> LabelledImages:
        # Images are copied as bytes, a quarter of the size of floats, and asynchronously.
        images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
        return LabelledImages(normalize(images), batch.targets.to(device, non_blocking=True))

    def loss(self, model: nn.Module, batch: LabelledImages) -> Tensor | dict[str, Tensor]:
        logits = model(batch.images)
        loss = self._criterion(logits, batch.targets).mean()
        return self._distillation.losses(loss, logits, batch.images) if self._distillation else loss

    def as_evaluated(self, model: nn.Module) -> nn.Module:
        """Return the module whose logits are evaluated."""
        return Mirrored(model) if self.config.TEST.FLIP else model

    def evaluate(
        self, model: nn.Module, loader: Loader, log: RunLog, stop: StopSignal | None = None
    ) -> Evaluation | None:
        return super().evaluate(self.as_evaluated(model), loader, log, stop)

    def meter(self, samples: int, device: torch.device) -> Meter:
        return F1(samples, device) if self.config.DATA.MULTI_LABEL else Accuracy(samples, device, self._present)

    def held_out(self, index: int) -> StoredImage:
        """Return a stored held-out image; raises `UnreadableImage`."""
        return self._dataset.held_out.get(index)

    def take_classes(self, checkpoint: dict[str, Any], number: int) -> list[str]:
        if self.config.DATA.MULTI_LABEL:
            return []
        given = checkpoint.get("classes")
        known = given if isinstance(given, list) and len(given) == number else []
        if self.config.TEST.LABELS:
            return self._take_label_sets(known, number)
        labels, how = labels_of(self.classes, known, number, self.config.MODEL.CLASS_MAP)
        self._present = sorted(labels) if labels and self.config.TEST.CLASSES == "present" else None
        if not labels:
            trust = "" if known else ", assumed to be those of the weights in this order"
            if not known and (warning := order_warning(self.classes)):
                self._warnings.append(warning)
            return [f"classes by label{trust}: {describe_labels(self.classes)}"]
        if self._present and len(self._present) == 1:
            self._warnings.append("only one class can be predicted (TEST.CLASSES present), so every image is correct")
        found, among = f"classes by label, found {how}: {describe_labels(self.classes, labels)}", len(labels)
        names = known or [f"class {label}" for label in range(number)]
        for label, name in () if known else zip(labels, self.classes, strict=True):
            names[label] = name
        self._relabel(names, self._dataset.held_out.relabelled(np.array(labels, dtype=np.int32)))
        space = f"the {among} present" if self._present else f"all {number}"
        return [f"{found}; scored over {space}" if among < number else found]

    def _take_label_sets(self, known: list[str], number: int) -> list[str]:
        images, path = self._dataset.held_out, self.config.TEST.LABELS
        sets = read_label_sets(Path(path), [images.file_name(index) for index in range(len(images))], number)
        present = np.flatnonzero(sets.any(0)).tolist()
        self._present = present if self.config.TEST.CLASSES == "present" else None
        self._relabel(known or [f"class {label}" for label in range(number)], images.with_labels(sets))
        return [
            f"{path} has labels for {sets.any(1).sum()} of {counted(len(images), 'image')}, {sets.sum()} of "
            f"{counted(len(present), 'class', 'classes')}; any label of an image counts as correct"
        ]

    def _relabel(self, names: list[str], held_out: ImageSource) -> None:
        """Replace the classes by those of the weights."""
        self._dataset = replace(self._dataset, classes=names, held_out=held_out)
        self.classes = names
        set_num_classes(self.config, len(names))

    def summary(self) -> str:
        return counted(len(self.classes), "class", "classes")

    def warnings(self) -> list[str]:
        return [*self._dataset.warnings(), *self._warnings, *loader_warnings(self.config, self.largest_image())]

    def best_line(self, score: float) -> str:
        return f"Max {self.score.title}: {score:.2f}%"


def balancing_weights(counts: Sequence[int]) -> Tensor:
    """Return class weights inversely proportional to the number of images, with a mean of 1 over all images."""
    sizes = torch.tensor(counts, dtype=torch.float64)
    present = sizes > 0
    return torch.where(present, sizes.sum() / (present.sum() * sizes.clamp(min=1)), 0.0).float()


class Accuracy(Meter):
    """Top-1 and top-5 accuracy in percent and mean cross-entropy; sums over all images divided by their number.

    Args:
        samples: number of samples over all ranks.
        device: the network's device.
        present: labels that can be predicted; None for all.
    """

    def __init__(self, samples: int, device: torch.device, present: list[int] | None = None) -> None:
        self._samples = samples
        self._present = present
        # [correct, correct among five, sum of losses, images, images left out, images without labels]
        self._sums = zeros(6, device)

    def add(self, model: nn.Module, batch: LabelledImages) -> None:
        logits, targets = model(batch.images).float(), batch.targets
        if self._present is not None:
            absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            absent[self._present] = False
            logits = logits.masked_fill(absent, -torch.inf)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        if targets.ndim == 1:
            read = counted = targets >= 0
            losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
            hits = ranked == targets[:, None]
        else:
            read, right = targets[:, 0] >= 0, targets > 0
            counted = right.any(1)
            losses = logits.logsumexp(1) - logits.masked_fill(~right, -torch.inf).logsumexp(1)  # any correct label
            losses = losses.where(counted, 0.0)
            hits = right.gather(1, ranked)
        hits = hits & counted[:, None]
        sums = hits[:, 0], hits.any(1), losses, counted, ~read, read & ~counted
        self._sums += torch.stack([x.to(self._sums.dtype).sum() for x in sums])

    def result(self) -> Evaluation:
        correct1, correct5, loss, images, skipped, unlabelled = sum_over_ranks(self._sums).tolist()
        warnings = check_counts(images, skipped, self._samples - int(unlabelled))
        metrics = {"top1": 100 * correct1 / images, "top5": 100 * correct5 / images, "loss": loss / images}
        lines = [
            f" * Acc@1 {metrics['top1']:.3f} Acc@5 {metrics['top5']:.3f}",
            f" * Loss {metrics['loss']:.4f}",
            f"Accuracy of the network on the {images:.0f} test images: {metrics['top1']:.1f}%",
        ]
        if unlabelled:
            without = counted(int(unlabelled), "image has no label and is", "images have no label and are")
            warnings.append(f"{without} not counted")
        return Evaluation(metrics, lines, warnings)


class F1(Meter):
    """F1 of labels with a probability above 0.5, over all images and classes, and mean binary cross-entropy.

    Args:
        samples: number of samples over all ranks.
        device: the network's device.
    """

    def __init__(self, samples: int, device: torch.device) -> None:
        self._samples = samples
        # [correct labels, predicted labels, true labels, sum of losses, images, images left out]
        self._sums = zeros(6, device)

    def add(self, model: nn.Module, batch: LabelledImages) -> None:
        logits, targets = model(batch.images).float(), batch.targets
        read = targets[:, 0] >= 0
        predicted, true = (logits > 0) & read[:, None], targets > 0.5
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1) * read
        sums = predicted & true, predicted, true, losses, read, ~read
        self._sums += torch.stack([x.to(self._sums.dtype).sum() for x in sums])

    def result(self) -> Evaluation:
        correct, predicted, true, loss, images, skipped = sum_over_ranks(self._sums).tolist()
        warnings = check_counts(images, skipped, self._samples)
        precision, recall = correct / max(predicted, 1), correct / max(true, 1)
        metrics = {"f1": 100 * 2 * correct / max(predicted + true, 1), "loss": loss / images}
        lines = [
            f" * F1 {metrics['f1']:.3f} precision {100 * precision:.3f} recall {100 * recall:.3f}",
            f" * Loss {metrics['loss']:.4f}",
        ]
        return Evaluation(metrics, lines, warnings)
