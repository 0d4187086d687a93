"""Common parts of the segmenters, with the parameter names of mmsegmentation 0, as in published weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from ..backbone import DATBackbone, TimmBackbone
from ..dense import DenseModel

IGNORED = 255  # label of pixels that losses and metrics ignore; that of `data.segmentation`


class Segmenter(DenseModel):
    """Base class of segmenters: a backbone with four feature maps, and a head that computes logits.

    Args:
        backbone: maps images to four feature maps, each half as large as the previous one.

    Attributes:
        smallest_batch: smallest number of images per micro-batch in training, over all processes.
        gives_probabilities: whether the outputs are not logits, but already in the scale of probabilities.

    Raises:
        ValueError: the backbone has maps of other strides.
    """

    smallest_batch = 1
    gives_probabilities = False

    def __init__(self, backbone: DATBackbone | TimmBackbone) -> None:
        super().__init__(backbone)
        first = backbone.strides[0]
        if backbone.strides != [first << level for level in range(4)]:
            raise ValueError(
                f"a segmenter needs maps of four strides, such as 4, 8, 16 and 32; the backbone gives "
                f"{', '.join(map(str, backbone.strides))}"
            )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return logits, or losses if labels are given.

        Args:
            images: normalised images ``[B, 3, H, W]`` of any size.
            labels: labels ``[B, H, W]``, `IGNORED` where unknown.

        Returns:
            Logits ``[B, classes, H, W]``; with labels, named losses, whose sum is minimised.
        """
        height, width = images.shape[-2:]
        maps = self.backbone(pad_to(images, self.divisor))
        padded = [size * self.backbone.strides[0] for size in maps[0].shape[-2:]]
        if labels is None:
            return resize(self.logits(maps), padded)[..., :height, :width]
        labels = F.pad(labels, (0, padded[1] - width, 0, padded[0] - height), value=IGNORED)
        return self.losses(maps, labels)

    def logits(self, maps: list[Tensor]) -> Tensor:
        """Return logits ``[B, classes, h, w]`` of any size for the maps of the padded images."""
        raise NotImplementedError

    def losses(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return named losses for the maps and labels ``[B, H, W]`` of the padded images."""
        return {"ce": cross_entropy(self.logits(maps), labels)}


class ConvModule(nn.Module):
    """A convolution, a batch norm and a ReLU, from ``[B, channels, H, W]`` to ``[B, out_channels, H, W]``."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of ``[B, C, H, W]`` whose statistics are computed over the micro-batches of all processes.

    All processes have the same running statistics, and results do not depend on the number of processes. Works on any
    device; `torch.nn.SyncBatchNorm` supports only GPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            count = values.numel() / values.shape[1] * dist.get_world_size()
            mean = all_reduce(values.sum((0, 2, 3))) / count
            centred = values - mean[:, None, None]
            variance = all_reduce(centred.square().sum((0, 2, 3))) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            scale = self.weight * (variance + self.eps).rsqrt()
            return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def pad_to(images: Tensor, stride: int) -> Tensor:
    """Pad images ``[B, 3, H, W]`` at the bottom and right with zeros, the mean colour, to multiples of ``stride``."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % stride, 0, -height % stride))


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps ``[B, C, h, w]`` resized bilinearly to ``[B, C, *size]``."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits ``[B, classes, h, w]``, resized to the size of labels ``[B, H, W]``.

    As in mmsegmentation 0, this is the mean over all pixels, to which ignored ones contribute 0. The mean over
    processes therefore does not depend on how the ignored pixels are distributed.
    """
    logits = resize(logits.float(), labels.shape[-2:])
    # Summed here: PyTorch's sum of this loss has no deterministic kernel on a GPU.
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").sum() / labels.numel()


def classifier_layer(channels: int, num_classes: int) -> nn.Conv2d:
    """Return the 1x1 convolution from maps ``[B, channels, H, W]`` to logits ``[B, num_classes, H, W]``."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv
