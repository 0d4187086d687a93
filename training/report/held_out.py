"""Predictions of a classifier for all held-out images, and statistics such as the confusion matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tasks import Task
from tasks.classes import describe_labels
from training.checkpoint import load_checkpoint


def check_classes(task: Task, path: str) -> None:
    """Check that the data of a task have the classes that a checkpoint was trained on, in their order.

    A checkpoint that does not name its classes is not checked.

    Raises:
        ValueError: they differ.
    """
    known, classes = load_checkpoint(path).get("classes") if path else None, getattr(task, "classes", None)
    if classes is not None and isinstance(known, list) and list(classes) != known:
        raise ValueError(
            f"the classes of the data ({describe_labels(classes)}) are not those of {path} ({describe_labels(known)}); "
            f"give the data set of that run, or one of the same classes"
        )


class NotWanted(Exception):
    """The caller no longer wants the result."""


@dataclass(frozen=True)
class HeldOutPredictions:
    """True and predicted labels of all readable held-out images, arrays ``[n]`` in the order of the data set.

    Attributes:
        classes: names by label.
        index: which image of the data set.
        target: its label.
        predicted: the most probable label.
        confidence: the probability of that.
        truth: the probability of the true label.
    """

    classes: list[str]
    index: NDArray[np.int64]
    target: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    truth: NDArray[np.float32]

    def is_right(self) -> NDArray[np.bool_]:
        """Return which predictions are correct."""
        return self.target == self.predicted

    def accuracy(self) -> float:
        """Return the share of correct predictions."""
        return float(self.is_right().mean())

    def images_by_class(self) -> NDArray[np.int64]:
        """Return the number of images of each class."""
        return np.bincount(self.target, minlength=len(self.classes))

    def accuracy_by_class(self) -> NDArray[np.float64]:
        """Return the accuracy of each class; NaN for a class without images."""
        right = np.bincount(self.target[self.is_right()], minlength=len(self.classes))
        images = self.images_by_class()
        return np.divide(right, images, out=np.full(len(images), np.nan), where=images > 0)

    def matrix(self) -> NDArray[np.int64]:
        """Return the confusion matrix: true classes by row, predicted ones by column."""
        size = len(self.classes)
        return np.bincount(self.target * size + self.predicted, minlength=size**2).reshape(size, size)

    def confusions(self) -> list[tuple[int, int, int]]:
        """Return ``(true label, predicted label, count)`` of all mistakes, the most frequent first."""
        wrong = ~self.is_right()
        pairs, counts = np.unique(self.target[wrong] * len(self.classes) + self.predicted[wrong], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(*divmod(int(pairs[place]), len(self.classes)), int(counts[place])) for place in order]

    def worst(self, most: int) -> list[int]:
        """Return the indices of at most `most` mistakes, those with the lowest probability of the true label first."""
        wrong = np.flatnonzero(~self.is_right())
        return wrong[np.lexsort((-self.confidence[wrong], self.truth[wrong]))][:most].tolist()


@torch.inference_mode()
def predict_held_out(
    network: nn.Module, task: Task, loader: DataLoader, classes: list[str], *, wanted: Callable[[], bool]
) -> HeldOutPredictions:
    """Run a classifier over a loader of held-out images, in this process.

    Args:
        network: in evaluation mode, on the device of `task`.
        task: puts batches onto that device.
        loader: all held-out images, in order.
        classes: names by label.
        wanted: called before each batch; returns whether to continue.

    Raises:
        NotWanted: the result is not wanted any more.
    """
    columns: list[NDArray] = []
    for batch in tqdm(loader, desc="predicting", unit="batch", disable=None, leave=False):
        if not wanted():
            raise NotWanted
        images, targets = task.to_device(batch, task.world.device)
        probabilities = network(images).float().softmax(1)
        confidence, predicted = probabilities.max(1)
        truth = probabilities.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        columns.append(torch.stack([column.cpu().double() for column in (targets, predicted, confidence, truth)]))
    target, predicted, confidence, truth = np.concatenate(columns, axis=1)
    read = target >= 0
    return HeldOutPredictions(
        classes,
        np.flatnonzero(read),
        target[read].astype(np.int64),
        predicted[read].astype(np.int64),
        confidence[read].astype(np.float32),
        truth[read].astype(np.float32),
    )
