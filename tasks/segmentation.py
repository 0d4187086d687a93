"""Semantic segmentation: segmenter losses, and mean intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from config import check_unsupported
from data.segmentation.build import build_eval_loader, build_train_loader, largest_sample, open_dataset
from data.segmentation.datasets import Batch
from data.segmentation.sources import IGNORED, MaskedDataset
from data.transforms import as_pixels, normalize
from data.wording import counted
from models.segmentation.parts import Segmenter, resize
from tasks.base import Evaluation, Meter, Score, check_counts
from tasks.labelled import CLASSIFICATION_ONLY, LabelledTask
from tasks.pictures import SAMPLES, paint, stack_rows
from utils import World, sum_over_ranks


class LabelledPixels(NamedTuple):
    """A batch on the device.

    Attributes:
        images: normalised; `[b, 3, H, W]` in training, otherwise `[3, h, w]` of each image and scale.
        labels: classes of the pixels, int64, `IGNORED` where unknown; `[b, H, W]` in training, otherwise `[H, W]` each,
            empty for an image that is left out.
    """

    images: Tensor | Sequence[Sequence[Tensor]]
    labels: Tensor | Sequence[Tensor]


class Segmentation(LabelledTask):
    """One class for each pixel."""

    score = Score("miou", "mIoU", digits=3)
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {
        **CLASSIFICATION_ONLY,
        "DETECTION.": (),
        "MODEL.DETECTOR.": (),
    }

    def __init__(self, config: CfgNode, world: World, *, training: bool) -> None:
        if not training:
            check_unsupported(config, ["MODEL.CLASS_MAP"], by=f"the evaluation of TASK {config.TASK}")
        super().__init__(config, world, training=training)

    def open_dataset(self, needs: Sequence[str]) -> MaskedDataset:
        return open_dataset(self.config, needs)

    def largest_image(self) -> tuple[int, int]:
        return largest_sample(self.config)

    def build_model(self) -> nn.Module:
        model, batch_size, processes = super().build_model(), self.config.DATA.BATCH_SIZE, self.world.size
        if self.training and batch_size * processes < model.smallest_batch:
            raise ValueError(
                f"DATA.BATCH_SIZE {batch_size} on {counted(processes, 'process', 'processes')} is too small for "
                f"{self.config.MODEL.SEGMENTER.NAME}, whose batch norms need {model.smallest_batch} images"
            )
        return model

    def train_loader(self) -> DataLoader:
        return build_train_loader(self.config, self._dataset, **self._rank)

    def eval_loader(self) -> DataLoader:
        return build_eval_loader(self.config, self._dataset, **self._rank)

    def prepare(self, batch: Batch, device: torch.device) -> LabelledPixels:
        images = batch.images.to(device, non_blocking=True)
        images = normalize(images).contiguous(memory_format=torch.channels_last)
        return LabelledPixels(images, batch.labels.to(device, non_blocking=True).long())

    def to_device(self, batch: Batch, device: torch.device) -> LabelledPixels:
        images = [[normalize(view.to(device, non_blocking=True)) for view in views] for views in batch.images]
        return LabelledPixels(images, [labels.to(device, non_blocking=True).long() for labels in batch.labels])

    def loss(self, model: nn.Module, batch: LabelledPixels) -> dict[str, Tensor]:
        return model(batch.images, batch.labels)

    def meter(self, samples: int, device: torch.device) -> Meter:
        return MeanIoU(self.classes, samples, device, flip=self.config.TEST.FLIP)

    def summary(self) -> str:
        return f"{self.config.MODEL.SEGMENTER.NAME}, {counted(len(self.classes), 'class', 'classes')}"


class MeanIoU(Meter):
    """Intersection over union of each class, and their mean, from one confusion matrix over all pixels of all images.

    The picture has a row for each of the first images: image, true classes, predicted classes.

    Args:
        classes: names by label.
        samples: number of images, over all ranks.
        device: the network's device.
        flip: whether to average over mirrored images, too.
    """

    def __init__(self, classes: Sequence[str], samples: int, device: torch.device, *, flip: bool) -> None:
        self._classes = classes
        self._samples = samples
        self._flip = flip
        self._rows: list[list[np.ndarray]] = []
        # Pixels by true and predicted class; then images, and images left out. Integers, so that the result does not
        # depend on the order of summation over processes.
        self._counts = torch.zeros(len(classes) ** 2 + 2, dtype=torch.int64, device=device)

    def add(self, model: nn.Module, batch: LabelledPixels) -> None:
        # One by one: images differ in size, and results must not depend on the rest of the batch.
        for views, labels in zip(batch.images, batch.labels, strict=True):
            self._counts[-2 if labels.numel() else -1] += 1
            if labels.numel():
                found = predict(model, views, labels.shape, flip=self._flip)
                self._counts[:-2] += confusion(found, labels, len(self._classes)).flatten()
                if len(self._rows) < SAMPLES:
                    pixels = as_pixels(max(views, key=Tensor.numel))
                    self._rows.append([pixels, *(paint(pixels, x.cpu().numpy()) for x in (labels, found))])

    def result(self) -> Evaluation:
        counts = sum_over_ranks(self._counts).cpu()
        images, skipped = counts[-2:].tolist()
        warnings = check_counts(images, skipped, self._samples)
        matrix = counts[:-2].view(len(self._classes), -1).double()
        hits, labelled, found = matrix.diag(), matrix.sum(1), matrix.sum(0)
        iou, recall = hits / (labelled + found - hits), hits / labelled  # NaN for absent classes
        metrics = {
            "miou": iou.nanmean().item(),
            "accuracy": (hits.sum() / labelled.sum()).item(),
            "class_accuracy": recall.nanmean().item(),
        }
        shares = (labelled / labelled.sum()).tolist()
        rows = zip(self._classes, iou.tolist(), recall.tolist(), shares, strict=True)
        width = max(map(len, self._classes))
        lines = [
            *(f"{name:{width}}  IoU {a:.3f}  accuracy {b:.3f}  {100 * c:6.2f} % of pixels" for name, a, b, c in rows),
            f" * mIoU {metrics['miou']:.3f} accuracy {metrics['accuracy']:.3f} "
            f"class accuracy {metrics['class_accuracy']:.3f}",
        ]
        pictures = {"samples": stack_rows(self._rows, ("image", "true", "predicted"))} if self._rows else {}
        return Evaluation(metrics, lines, warnings, pictures)


def predict(model: Segmenter, image: Tensor | Sequence[Tensor], size: Sequence[int], *, flip: bool = False) -> Tensor:
    """Return the classes `[height, width]` of an image.

    Args:
        model: a segmenter in evaluation mode.
        image: `[3, h, w]`, normalised; or several of them, the image at several scales.
        size: height and width of the result.
        flip: whether to include the mirror image. Over several images, probabilities are averaged.
    """
    scales = [image] if isinstance(image, Tensor) else image
    views = [(view, mirrored) for view in scales for mirrored in ([False, True] if flip else [False])]
    total = torch.zeros((), device=scales[0].device)
    for view, mirrored in views:
        logits = model(view[None].flip(-1) if mirrored else view[None]).float()
        logits = resize(logits.flip(-1) if mirrored else logits, size)
        total = total + (logits.softmax(1) if len(views) > 1 and not model.gives_probabilities else logits)
    return total[0].argmax(0)


def confusion(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the confusion matrix `[classes, classes]` of pixels (true class, predicted class), without ignored ones.

    Args:
        found: predicted classes `[height, width]`.
        labels: true classes, `IGNORED` where unknown.
        classes: number of classes.
    """
    counted = labels != IGNORED
    places = labels[counted] * classes + found[counted]
    return torch.bincount(places, minlength=classes**2).view(classes, classes)
