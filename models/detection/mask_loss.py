"""The loss of predicted masks (Mask R-CNN, arXiv 1703.06870), with the targets of mmdetection 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align


def mask_targets(masks: Tensor, regions: Tensor, objects: Tensor, size: int) -> Tensor:
    """Crop the mask of an object for each region of an image.

    Args:
        masks: masks of the objects, ``[m, h, w]``, 0 or 1.
        regions: ``[n, 4]`` (x1, y1, x2, y2) in pixels.
        objects: index of the object of each region, ``[n]``.
        size: side of the result.

    Returns:
        0 or 1 on a grid over each region, ``[n, size, size]``, float.
    """
    indexed = torch.cat([objects[:, None].to(regions), regions], dim=1)
    # Aligned, since features are pooled and masks are pasted with pixel centres at multiples of 1 plus 0.5.
    return (roi_align(masks[:, None].to(regions), indexed, size, aligned=True)[:, 0] >= 0.5).to(regions)


def mask_loss(
    logits: Tensor, regions: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], objects: Sequence[Tensor]
) -> Tensor:
    """Return the mean binary cross-entropy of the masks of the true classes, 0 without regions.

    Args:
        logits: ``[n, classes, size, size]`` for the positive regions of all images.
        regions: boxes ``[n, 4]`` of the positive regions of each image.
        targets: ``masks`` and ``labels`` of the objects of each image.
        objects: index of the object of each region of each image.
    """
    labels = torch.cat([target["labels"][index] for target, index in zip(targets, objects, strict=True)])
    if not len(labels):  # a mean over nothing would be NaN
        return logits.sum() * 0
    wanted = [
        mask_targets(target["masks"], boxes, index, logits.shape[-1])
        for target, boxes, index in zip(targets, regions, objects, strict=True)
    ]
    of_label = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(of_label.float(), torch.cat(wanted))
