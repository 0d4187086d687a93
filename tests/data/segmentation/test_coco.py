"""Class maps from objects in the layout of COCO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.segmentation.coco import open_coco
from data.segmentation.scenes import open_scenes
from data.segmentation.sources import IGNORED, Labels
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


IMAGE = {"id": 10, "file_name": "0.png", "height": 32, "width": 40}
SQUARE = [[4, 4, 12, 4, 12, 12, 4, 12]]


@pytest.mark.parametrize(
    ("faulty", "place"),
    [
        (row(1, 10, 99, [4, 4, 8, 8], segmentation=SQUARE), (slice(4, 12), slice(4, 12))),  # an unknown category
        (row(1, 10, 99, [4, 4, 8, 6]), (slice(4, 10), slice(4, 12))),
        (row(1, 10, 3, [4, 4, 0, 8], segmentation=SQUARE), (slice(4, 12), slice(4, 12))),
        (row(1, 10, 3, [float("nan"), 4, 8, 8], segmentation=SQUARE), (slice(4, 12), slice(4, 12))),
        (row(1, 10, 3, [-6, 4, 8, 8], segmentation=[[4, 4, 12, 4]]), (slice(4, 12), slice(0, 2))),
        (row(1, 10, 3, [4, 4, 0, 8], segmentation=[[4, 4, 12, 4]]), (slice(0), slice(0))),
        (row(1, 10, 3, [50, 4, 8, 8], segmentation=[[50, 4, 58, 4, 58, 12, 50, 12]]), (slice(0), slice(0))),
    ],
)
def test_pixels_of_invalid_annotations_are_ignored(tmp_path: Path, faulty: dict, place: tuple[slice, slice]) -> None:
    root = write_coco(tmp_path)
    small = row(2, 10, 7, [6, 6, 2, 2], segmentation=[[6, 6, 8, 6, 8, 8, 6, 8]])
    write_instances(root, "val", [IMAGE], [faulty, small])
    data = open_coco(Request(path=str(root)), Labels())
    expected = np.zeros((32, 40), dtype=np.uint8)
    expected[place] = IGNORED
    expected[6:8, 6:8] = 2
    assert np.array_equal(data.held_out.mask(0), expected)
    assert "left out 1 box" in data.format_warnings[0]


def test_training_images_without_objects_are_background(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    crowd = row(2, 11, 7, [4, 4, 8, 8], segmentation={"size": [32, 40], "counts": [64, 64, 1152]}, iscrowd=1)
    images = [{**IMAGE, "id": 10 + i, "file_name": f"{i}.png"} for i in range(3)]
    write_instances(root, "train", images, [row(1, 10, 3, [4, 4, 8, 8], segmentation=SQUARE), crowd])
    data = open_coco(Request(path=str(root)), Labels())
    assert [np.unique(data.train.mask(index)).tolist() for index in range(len(data.train))] == [[0, 1], [0, 2], [0]]
    assert data.format_warnings == []


def test_data_set_without_masks_is_rejected(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    write_instances(
        root, "val", [{"id": 10, "file_name": "0.png", "height": 32, "width": 40}], [row(1, 10, 3, [0, 0, 5, 5])]
    )
    with pytest.raises(ValueError, match=r"only a box, such as annotation 1 in .*instances_val\.json; "):
        open_coco(Request(path=str(root)), Labels())


@pytest.mark.parametrize(
    ("labels", "option"),
    [
        (Labels(mapping={3: 0}), "LABEL_MAP"),
        (Labels(reduce_zero=True), "REDUCE_ZERO_LABEL"),
        (Labels(ignored=0), "IGNORE_LABEL"),
    ],
)
def test_options_of_mask_files_are_refused(tmp_path: Path, labels: Labels, option: str) -> None:
    write_coco(tmp_path)
    for open_data, path in ((open_coco, str(tmp_path)), (open_scenes, str(tmp_path)), (open_scenes, "")):
        with pytest.raises(ValueError, match=rf"^DATA\.{option} is not supported by \w.*; leave it at "):
            open_data(Request(path=path), labels)
