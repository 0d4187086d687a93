"""What a data set is, whatever format it is stored in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


class ImageSource(ABC):
    """Labelled images, as they are stored.

    Attributes:
        labels: class of every image, `[n]`, int64.
    """

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        """Return the class of an image."""
        return int(self.labels[index])

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Return an image as RGB.

        Raises:
            UnreadableImage: where it cannot be decoded.
        """


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a format: the data options of a run.

    Attributes:
        path: where the data set lies; empty where none was given.
        path_by_variable: the same by the environment, for formats that need a path and were given none.
        needs: the parts to open, of "train" and "val".
    """

    path: str = ""
    path_by_variable: str = ""
    needs: Sequence[str] = ("train", "val")

    def root(self, layout: str) -> Path:
        """Return the folder of the data set.

        Args:
            layout: what the format expects to find, for the message.

        Raises:
            ValueError: where no path was given, or it names an unknown user.
        """
        path = self.path or self.path_by_variable
        if not path:
            raise ValueError(f"no data set given; pass --data-path FOLDER or set the variable DATA_PATH; {layout}")
        try:
            return Path(path).expanduser()
        except RuntimeError:
            raise ValueError(f"data path {path}: there is no such user; write the folder in full") from None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set with its classes.

    Attributes:
        classes: names by label.
        train: images to train on; None where they were not asked for.
        held_out: images to evaluate on; None where they were not asked for.
        remarks: what the format found suspicious.
    """

    classes: list[str]
    train: ImageSource | None = None
    held_out: ImageSource | None = None
    remarks: Sequence[str] = ()

    def doubts(self) -> list[str]:
        """Return what about the data set may not be as intended, one line each."""
        found = list(self.remarks)
        if self.held_out is not None:
            present = set(np.unique(self.held_out.labels).tolist())
            absent = [name for label, name in enumerate(self.classes) if label not in present]
            if absent:
                found.append(
                    f"{len(absent)} of {len(self.classes)} classes have no held-out images: {shorten(absent, 3)}"
                )
        return found


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Return the first `most` names and how many there are beside them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
