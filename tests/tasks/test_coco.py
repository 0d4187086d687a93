"""Average precision agrees with pycocotools and does not depend on the order of images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.detection.coco import open_coco
from data.detection.sources import Objects
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
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        guesses = [one for index, detections in found.items() for one in _rows(index, detections, kind)]
        theirs = COCOeval(truth, truth.loadRes(guesses), kind)
        theirs.evaluate(), theirs.accumulate(), theirs.summarize()
        assert [ours[f"{prefix}{name}"] for name in METRICS] == pytest.approx(theirs.stats[:6].tolist(), abs=1e-6)
        assert 0.05 < ours[f"{prefix}AP"] < 0.95
    capsys.readouterr()


def test_the_size_of_a_mask_is_its_own_area() -> None:
    masks = np.zeros((2, 100, 100), dtype=np.uint8)
    masks[0, :40, :40] = 1  # medium
    masks[1, 50:90, 50:90] = 1
    masks[1, 55:85, 55:85] = 0  # a frame of 700 pixels, small, in a box of medium size
    encoded = rle.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
    boxes = np.array([[0.0, 0, 40, 40], [50, 50, 90, 90]], dtype=np.float32)
    first = {"boxes": boxes[:1], "labels": np.array([0]), "masks": encoded[:1]}
    objects = Objects(**first, areas=np.array([1600.0]), crowd=np.array([False]))
    source = SimpleNamespace(size=lambda index: (100, 100), objects=lambda index: objects)
    found = Detections(boxes=boxes, labels=np.array([0, 0]), scores=np.array([0.5, 0.9]), masks=encoded)
    metrics = average_precision(source, {0: found}, ["frame"])
    assert metrics["mask_AP_medium"] == pytest.approx(1.0)  # the frame is not counted among medium ones
    assert metrics["AP_medium"] == pytest.approx(0.5)
    assert metrics["mask_AP"] == pytest.approx(0.5)


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
