"""COCO's average precision, computed by faster-coco-eval, and masks in its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import Tensor

from data.detection.sources import DetectionSource

# Names of the first of COCO's twelve numbers.
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_PASTED = 16  # masks pasted at a time


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Objects detected in an image.

    Attributes:
        boxes: `[n, 4]`: x1, y1, x2, y2 in pixels of the stored image.
        labels: `[n]`.
        scores: `[n]`.
        masks: run-length encoded, one per object; None if the detector predicts no masks.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: Sequence[dict[str, Any]] | None = None

    def above(self, score: float) -> Detections:
        """Return those with at least this score."""
        chosen = np.flatnonzero(self.scores >= score)
        masks = None if self.masks is None else [self.masks[i] for i in chosen]
        return Detections(boxes=self.boxes[chosen], labels=self.labels[chosen], scores=self.scores[chosen], masks=masks)


def average_precision(
    source: DetectionSource, found: Mapping[int, Detections], classes: Sequence[str]
) -> dict[str, float]:
    """Return COCO's average precisions, see `METRICS`; those of masks have the prefix `mask_`.

    Args:
        source: images with their annotations.
        found: detections of the evaluated images, by index.
        classes: names by label.

    Returns:
        Numbers from 0 to 1, or -1 if there is no object to evaluate.
    """
    indices = sorted(found)  # independent of the order of evaluation
    truth = COCO(ground_truth(source, indices, classes))
    kinds = {"bbox": ""} | ({"segm": "mask_"} if all(found[index].masks is not None for index in indices) else {})
    metrics = {}
    for kind, prefix in kinds.items():
        values = _evaluate(truth, [row for index in indices for row in _rows(index, found[index], kind)], kind)
        metrics |= {f"{prefix}{name}": value for name, value in zip(METRICS, values, strict=False)}
    return metrics


def _evaluate(truth: COCO, guesses: list[dict[str, Any]], kind: str) -> list[float]:
    if not guesses:  # not supported by faster-coco-eval
        return [0.0] * len(METRICS)
    evaluator = COCOeval_faster(truth, truth.loadRes(guesses), kind, print_function=lambda *_: None)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return [float(value) for value in evaluator.stats]


def ground_truth(source: DetectionSource, indices: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
    """Return images, objects and classes in the format of a COCO annotation file; class ids start at 1."""
    images, annotations = [], []
    for index in indices:
        height, width = source.size(index)
        images.append({"id": index, "height": height, "width": width})
        objects = source.objects(index)
        for i, (x1, y1, x2, y2) in enumerate(objects.boxes.astype(np.float64).tolist()):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": index,
                "category_id": int(objects.labels[i]) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(objects.areas[i]),
                "iscrowd": int(objects.crowd[i]),
            }
            annotations.append(annotation | ({"segmentation": objects.masks[i]} if objects.masks else {}))
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _rows(index: int, found: Detections, kind: str) -> list[dict[str, Any]]:
    """Return the boxes (`bbox`) or masks (`segm`) detected in an image in the format of a COCO result file.

    Rows of masks have no box: COCO's evaluation would take the area of the box for that of the mask.
    """
    rows = []
    for i, (x1, y1, x2, y2) in enumerate(found.boxes.astype(np.float64).tolist()):
        row = {"image_id": index, "category_id": int(found.labels[i]) + 1, "score": float(found.scores[i])}
        place = {"bbox": [x1, y1, x2 - x1, y2 - y1]} if kind == "bbox" else {"segmentation": found.masks[i]}
        rows.append(row | place)
    return rows


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Paste masks into their boxes in an image and return them run-length encoded.

    Args:
        masks: `[n, m, m]`, probabilities on a grid over each box.
        boxes: `[n, 4]`: x1, y1, x2, y2 in pixels.
        size: height and width of the image.
    """
    height, width = size
    encoded: list[dict[str, Any]] = []
    rows, columns = torch.arange(height, device=boxes.device) + 0.5, torch.arange(width, device=boxes.device) + 0.5
    for some, at in zip(masks.split(_PASTED), boxes.split(_PASTED), strict=True):
        left, top, right, bottom = (side[:, None] for side in at.unbind(1))
        # Pixel centres relative to the box, from -1 to 1.
        x = 2 * (columns - left) / (right - left).clamp(min=1e-6) - 1
        y = 2 * (rows - top) / (bottom - top).clamp(min=1e-6) - 1
        grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
        pasted = F.grid_sample(some[:, None], grid, align_corners=False)[:, 0] >= 0.5
        encoded += rle.encode(np.asfortranarray(pasted.permute(1, 2, 0).to(torch.uint8).cpu().numpy()))
    return encoded
