"""Knowledge distillation: a network learns from the labels and from the predictions of another network.

Soft distillation is that of Hinton, Vinyals and Dean (arXiv 1503.02531, section 2), hard distillation that of DeiT
(arXiv 2012.12877, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn


class Teacher(nn.Module):
    """A trained classifier with its own image size and normalisation.

    Args:
        network: returns logits `[b, classes]`; it is not trained.
        size: height and width it was trained with; other images are resized to it.
        mean: channel means of its normalisation.
        std: channel standard deviations of its normalisation.
    """

    def __init__(
        self,
        network: nn.Module,
        size: tuple[int, int],
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._size = size
        ours, own = (
            torch.tensor(values).view(2, 3, 1, 1)
            for values in ((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), (mean, std))
        )
        self.register_buffer("scale", ours[1] / own[1])
        self.register_buffer("shift", (ours[0] - own[0]) / own[1])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return logits of images `[b, 3, H, W]` normalised for the student."""
        if images.shape[2:] != self._size:
            images = F.interpolate(images, size=self._size, mode="bilinear", antialias=True)
        return self.network(images * self.scale + self.shift)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The combination of the losses on labels and teacher.

    Attributes:
        teacher: the teacher.
        kind: `soft` or `hard`.
        share: weight of the teacher's loss.
        temperature: of `soft`.
    """

    teacher: nn.Module
    kind: str
    share: float
    temperature: float

    def losses(self, label_loss: Tensor, logits: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Return the two losses by name; their sum is minimised.

        Args:
            label_loss: mean loss on the labels.
            logits: `[b, classes]` of the student.
            images: `[b, 3, H, W]`, the normalised input of the student.
        """
        taught = self.teacher(images).float()
        if self.kind == "hard":
            loss = F.cross_entropy(logits, taught.argmax(1))
        else:
            # Compensates for gradients that decrease with the square of the temperature.
            student, target = ((x / self.temperature).log_softmax(1) for x in (logits.float(), taught))
            loss = self.temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)
        return {"label_loss": (1 - self.share) * label_loss, "teacher_loss": self.share * loss}
