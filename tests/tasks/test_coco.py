"""Average precision agrees with pycocotools and does not depend on the order of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.detection.coco import open_coco
from data.sources import Request
from tasks.coco import METRICS, Detections, _rows, average_precision, ground_truth, paste_masks
from tests.data.detection.samples import write_coco


def test_pycocotools_agrees(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = open_coco(Request(path=str(write_coco(tmp_path, val=30))))
    source, rng, found = dataset.held_out, np.random.default_rng(0), {}
    for index in range(len(source)):
        objects = source.objects(index)
        chosen = rng.integers(0, len(objects.labels), 6)
        boxes = (objects.boxes[chosen] + rng.normal(0, 1.5, (6, 4))).clip(0, 32).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        masks = paste_masks(torch.ones(6, 4, 4), torch.from_numpy(boxes), (32, 40))
        labels = np.where(rng.random(6) < 0.8, objects.labels[chosen], rng.integers(0, 2, 6))
        found[index] = Detections(boxes=boxes, labels=labels, scores=rng.random(6), masks=masks)
    ours = average_precision(source, found, dataset.classes)
    assert average_precision(source, dict(reversed(found.items())), dataset.classes) == ours
    truth = COCO()
    truth.dataset = ground_truth(source, range(len(source)), dataset.classes)
    truth.createIndex()
    guesses = [one for index, detections in found.items() for one in _rows(index, detections)]
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        theirs = COCOeval(truth, truth.loadRes(guesses), kind)
        theirs.evaluate(), theirs.accumulate(), theirs.summarize()
        assert [ours[f"{prefix}{name}"] for name in METRICS] == pytest.approx(theirs.stats[:6].tolist(), abs=1e-6)
        assert 0.05 < ours[f"{prefix}AP"] < 0.95
    capsys.readouterr()


def test_masks_fill_their_boxes() -> None:
    (full, half) = paste_masks(
        torch.stack([torch.ones(2, 2), torch.tensor([[1.0, 0], [1, 0]])]),
        torch.tensor([[2.0, 3, 8, 9], [2, 3, 8, 9]]),
        (12, 10),
    )
    full, half = rle.decode(full), rle.decode(half)
    assert full[4:8, 2:8].all()
    assert full.sum() == full[3:9, 2:8].sum()
    assert half[4:8, 2:5].all()
    assert half.sum() == half[3:9, 2:5].sum()
