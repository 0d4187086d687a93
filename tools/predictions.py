"""Predictions for image files: classes, shares of the pixels, or objects, depending on the task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import UnreadableImage
from data.segmentation.transforms import EvalTransform
from data.transforms import normalize
from tasks.classification import Mirrored
from tasks.coco import Detections
from tasks.detection import detect
from tasks.pictures import draw_objects, paint, with_legend
from tasks.segmentation import predict as predict_pixels
from training.run import AUTOCAST
from training.trained_model import TrainedModel


@dataclass(frozen=True)
class Prediction:
    """The prediction for an image.

    Attributes:
        path: the file.
        top: names and probabilities, the most probable first; of a segmenter, names and shares of the pixels.
        objects: of a detector: those that `top` names, in the same order.
        labels: of a segmenter: the class of each pixel, `[height, width]`, uint8.
        classes: of a segmenter: names by label.
    """

    path: str
    top: list[tuple[str, float]]
    objects: Detections | None = None
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()

    def drawn(self, image: Image.Image) -> Image.Image:
        """Return the image with its objects, or its class map and a legend, drawn over it, if any."""
        pixels = np.asarray(image)
        if self.objects is not None:
            words = [f"{name} {score:.2f}" for name, score in self.top]
            found = self.objects
            pixels = draw_objects(pixels, found.boxes, found.labels, words, found.masks)
        if self.labels is not None:
            pixels = with_legend(paint(pixels, self.labels), self.labels, self.classes)
        return Image.fromarray(pixels)


@dataclass(frozen=True)
class Predictor:
    """A network and its inference options.

    Attributes:
        model: the network and its classes.
        top: classes per image, at most the number of classes.
        threshold: minimum score of an object.
        batch_size: images per batch, for classifiers.
        amp: `off`, `fp16` or `bf16`.
        on_unreadable: called with the reason why a file cannot be read.
    """

    model: TrainedModel
    top: int
    threshold: float
    batch_size: int
    amp: str
    on_unreadable: Callable[[str], object]

    def predict(self, files: Sequence[str]) -> Iterator[Prediction]:
        """Yield predictions for the readable files, in order.

        Raises:
            ValueError: the network is of a task without predictions.
        """
        kinds = {"classification": self._classify, "detection": self._detect, "segmentation": self._segment}
        task = self.model.config.TASK
        if task not in kinds:
            raise ValueError(f"predictions of TASK {task} cannot be shown, only those of {', '.join(kinds)}")
        return kinds[task](self._read(files))

    def _read(self, files: Sequence[str]) -> Iterator[tuple[str, Image.Image]]:
        for path in files:
            try:
                yield path, self.model.read(path)
            except UnreadableImage as error:
                self.on_unreadable(str(error))

    def _classify(self, images: Iterator[tuple[str, Image.Image]]) -> Iterator[Prediction]:
        transform, network = self.model.transform(), self.model.network
        network = Mirrored(network) if self.model.config.TEST.FLIP else network
        while batch := list(islice(images, self.batch_size)):
            pixels = torch.stack([transform(image) for _, image in batch])
            with self._running():
                logits = network(pixels.to(self._device, memory_format=torch.channels_last)).float()
            several = self.model.config.DATA.MULTI_LABEL  # each label then has its own probability
            rows = (logits.sigmoid() if several else logits.softmax(dim=1)).cpu()
            for (path, _), row in zip(batch, rows, strict=True):
                yield Prediction(path, self._largest(row))

    def _segment(self, images: Iterator[tuple[str, Image.Image]]) -> Iterator[Prediction]:
        config = self.model.config
        transform = EvalTransform(config.image_size)
        for path, image in images:
            with self._running():
                scales = config.SEGMENTATION.TEST_SCALES
                views = [normalize(transform.apply(image, scale)).to(self._device) for scale in scales]
                size = image.height, image.width
                labels = predict_pixels(self.model.network, views, size, flip=config.TEST.FLIP).cpu()
            shares = torch.bincount(labels.flatten(), minlength=len(self.model.classes)) / labels.numel()
            yield Prediction(path, self._largest(shares), labels=labels.byte().numpy(), classes=self.model.classes)

    def _detect(self, images: Iterator[tuple[str, Image.Image]]) -> Iterator[Prediction]:
        transform = self.model.transform()
        for path, image in images:
            with self._running():
                pixels = transform(image).to(self._device)
                found = detect(self.model.network, pixels, (image.height, image.width))
            found = found.above(self.threshold)
            names = [self.model.classes[label] for label in found.labels]
            yield Prediction(path, list(zip(names, found.scores.tolist(), strict=True)), objects=found)

    def _largest(self, values: Tensor) -> list[tuple[str, float]]:
        best, labels = values.topk(min(self.top, len(values)))
        return [(self.model.classes[label], value) for label, value in zip(labels, best.tolist(), strict=True)]

    @property
    def _device(self) -> torch.device:
        return next(self.model.network.parameters()).device

    @contextmanager
    def _running(self) -> Iterator[None]:
        precision = torch.autocast(self._device.type, dtype=AUTOCAST[self.amp], enabled=self.amp != "off")
        with torch.inference_mode(), precision:
            yield
