"""Object detection: detector losses, and COCO's average precision of boxes and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize
from yacs.config import CfgNode

from data.detection.build import build_eval_loader, build_train_loader, largest_image, largest_sample, open_dataset
from data.detection.datasets import Batch, to_device
from data.detection.sources import DetectionDataset, DetectionSource
from data.transforms import as_pixels, normalize
from data.wording import counted, shorten
from models.detection import DETECTORS
from tasks.base import Evaluation, Meter, Score, check_counts
from tasks.coco import Detections, average_precision, paste_masks
from tasks.labelled import CLASSIFICATION_ONLY, LabelledTask
from tasks.pictures import SAMPLES, SHOWN, draw_objects, stack_rows
from utils import EvaluationFailed, World


class Images(NamedTuple):
    """A batch on the device.

    Attributes:
        images: `[3, h, w]` each, normalised.
        targets: as in `data.detection.datasets.Batch`.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]


class Detection(LabelledTask):
    """Boxes and classes of objects, and masks if the detector predicts them."""

    score = Score("AP", "AP", digits=3)
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {
        **CLASSIFICATION_ONLY,
        "MODEL.CLASS_MAP": (),
        "MODEL.SEGMENTER.": (),
        "SEGMENTATION.": (),
        "TEST.FLIP": (),
    }

    def __init__(self, config: CfgNode, world: World, *, training: bool) -> None:
        super().__init__(config, world, training=training)
        self._masks = DETECTORS[config.MODEL.DETECTOR.NAME].masks
        if self._masks and not self._dataset.masks:
            lacking = f" (objects without masks: {shorten(self._dataset.without_masks)})"
            raise ValueError(
                f"MODEL.DETECTOR.NAME {config.MODEL.DETECTOR.NAME} needs masks, but the data set has only boxes"
                f"{lacking if self._dataset.without_masks else ''}; use a box detector, such as retinanet"
            )

    def open_dataset(self, needs: Sequence[str]) -> DetectionDataset:
        return open_dataset(self.config, needs)

    def largest_image(self) -> tuple[int, int]:
        if self._masks and self.training:
            return largest_sample(self.config, self._dataset.train)
        return largest_image(self.config)

    def train_loader(self) -> DataLoader:
        return build_train_loader(self.config, self._dataset, masks=self._masks, **self._rank)

    def eval_loader(self) -> DataLoader:
        return build_eval_loader(self.config, self._dataset, **self._rank)

    def prepare(self, batch: Batch, device: torch.device) -> Images:
        moved = to_device(batch, device)
        return Images([normalize(image) for image in moved.images], moved.targets)

    def to_device(self, batch: Batch, device: torch.device) -> Images:
        images = [normalize(image.to(device, non_blocking=True)) for image in batch.images]
        return Images(images, batch.targets)  # the meter needs indices and sizes on the CPU

    def loss(self, model: nn.Module, batch: Images) -> dict[str, Tensor]:
        return model(batch.images, batch.targets)

    def meter(self, samples: int, device: torch.device) -> Meter:  # noqa: ARG002 - the source knows its images
        return AveragePrecision(self._dataset.held_out, self.classes, self.world)

    def summary(self) -> str:
        return f"{self.config.MODEL.DETECTOR.NAME}, {counted(len(self.classes), 'class', 'classes')}"


class AveragePrecision(Meter):
    """COCO's average precision over all held-out images.

    The picture has a row for each of the first images: true objects and detected objects.

    Args:
        source: the held-out images with their annotations.
        classes: names by label.
        world: the processes that share the images.
    """

    def __init__(self, source: DetectionSource, classes: list[str], world: World) -> None:
        self._source = source
        self._classes = classes
        self._world = world
        self._found: dict[int, Detections] = {}
        self._left_out: set[int] = set()
        self._rows: list[list[np.ndarray]] = []

    def add(self, model: nn.Module, batch: Images) -> None:
        # One by one: a batch is padded to its largest image, and results must not depend on the rest of the batch.
        for image, target in zip(batch.images, batch.targets, strict=True):
            index, size = int(target["index"]), tuple(target["size"].tolist())
            if not all(size):
                self._left_out.add(index)
                continue
            self._found[index] = detect(model, image, size)
            if len(self._rows) < SAMPLES:
                self._rows.append(self._drawn(index, as_pixels(resize(image, size))))

    def _drawn(self, index: int, pixels: np.ndarray) -> list[np.ndarray]:
        """Return an image with its true objects, and with its detected objects."""
        truth, found = self._source.objects(index), self._found[index].above(SHOWN)
        names = [self._classes[label] for label in truth.labels]
        guesses = [
            f"{self._classes[label]} {score:.2f}" for label, score in zip(found.labels, found.scores, strict=True)
        ]
        return [
            draw_objects(pixels, truth.boxes, truth.labels, names, truth.masks),
            draw_objects(pixels, found.boxes, found.labels, guesses, found.masks),
        ]

    def result(self) -> Evaluation:
        metrics, warnings = self._metrics()
        kinds = {"": "", "mask_": " of masks"} if "mask_AP" in metrics else {"": ""}
        lines = [
            f" * AP {metrics[f'{kind}AP']:.3f} AP50 {metrics[f'{kind}AP50']:.3f} AP75 {metrics[f'{kind}AP75']:.3f}"
            f"{words}"
            for kind, words in kinds.items()
        ]
        pictures = {"samples": stack_rows(self._rows, ("true", "detected"))} if self._rows else {}
        return Evaluation(metrics, lines, warnings, pictures)

    def _metrics(self) -> tuple[dict[str, float], list[str]]:
        """Return the average precisions over all ranks, and warnings. Rank 0 computes them for all."""
        own = self._found, self._left_out
        if self._world.size == 1:
            return self._metrics_of([own])
        shares = [None] * self._world.size if self._world.is_main else None
        dist.gather_object(own, shares)
        outcome: list[Any] = [None]
        if self._world.is_main:
            try:
                outcome = [self._metrics_of(shares)]
            except EvaluationFailed as error:
                outcome = [error]  # all ranks raise it
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], EvaluationFailed):
            raise outcome[0]
        return outcome[0]

    def _metrics_of(
        self, shares: Sequence[tuple[dict[int, Detections], set[int]]]
    ) -> tuple[dict[str, float], list[str]]:
        """Return the average precisions of detections and images left out, of each rank, and warnings."""
        met = [index for found, left_out in shares for index in (*found, *left_out)]
        assert len(set(met)) == len(met), "an image was evaluated twice"
        found = {index: detections for one, _ in shares for index, detections in one.items()}
        warnings = check_counts(len(found), len(met) - len(found), len(self._source))
        return average_precision(self._source, found, self._classes), warnings


def detect(model: nn.Module, image: Tensor, size: tuple[int, int]) -> Detections:
    """Detect the objects of an image.

    Args:
        model: a detector in evaluation mode.
        image: `[3, h, w]`, normalised.
        size: height and width of the original image, to which boxes and masks are scaled.
    """
    (found,) = model([image])
    scale = torch.tensor([size[1] / image.shape[-1], size[0] / image.shape[-2]] * 2, device=image.device)
    boxes = found["boxes"].float() * scale
    return Detections(
        boxes=boxes.cpu().numpy(),
        labels=found["labels"].cpu().numpy(),
        scores=found["scores"].float().cpu().numpy(),
        masks=paste_masks(found["masks"].float(), boxes, size) if "masks" in found else None,
    )
