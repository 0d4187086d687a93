"""Class maps from objects in the layout of COCO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.segmentation.coco import open_coco
from data.segmentation.sources import Labels
from data.sources import Request
from tests.data.detection.samples import row, write_coco, write_instances


def test_a_pixel_has_the_class_of_the_smallest_object_over_it(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    outlines = {1: (3, [0, 0, 20, 10]), 2: (7, [5, 2, 4, 4]), 3: (3, [30, 20, 5, 5])}
    objects = [
        row(number, 10, category, box, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
        for number, (category, box) in outlines.items()
        for x, y, w, h in [box]
    ]
    write_instances(root, "val", [{"id": 10, "file_name": "0.png", "height": 32, "width": 40}], objects)
    data = open_coco(Request(path=str(root)), Labels())
    assert (data.classes, len(data.train), len(data.held_out)) == (["background", "dog", "cat"], 8, 1)
    image, mask = data.held_out.pair(0)
    expected = np.zeros((image.height, image.width), dtype=np.uint8)
    expected[0:10, 0:20] = expected[20:25, 30:35] = 1
    expected[2:6, 5:9] = 2
    assert np.array_equal(mask, expected)
    assert (data.train.mask(0)[:, 2:4] == 2).any()  # a crowd has a class, too


def test_data_set_without_masks_is_rejected(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    write_instances(
        root, "val", [{"id": 10, "file_name": "0.png", "height": 32, "width": 40}], [row(1, 10, 3, [0, 0, 5, 5])]
    )
    with pytest.raises(ValueError, match="some objects have only a box"):
        open_coco(Request(path=str(root)), Labels())
