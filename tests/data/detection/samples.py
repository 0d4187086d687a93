"""A small data set in the layout of COCO, with all kinds of invalid annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def write_coco(root: Path, *, train: int = 8, val: int = 5, published: bool = False) -> Path:
    """Write images of 40 x 32 pixels, each with a dog, a cat and a crowd; `published` under COCO's names."""
    rng = np.random.default_rng(0)
    for part, number in (("train", train), ("val", val)):
        name = f"{part}2017" if published else part
        folder = root / name
        folder.mkdir(parents=True)
        images, annotations = [], []
        for i in range(number):
            Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            images.append({"id": 10 + i, "file_name": f"{i}.png", "height": 32, "width": 40})
            x, y = (int(v) for v in rng.integers(0, 15, 2))
            polygon = [[x, y, x + 12, y, x + 12, y + 10, x, y + 10]]
            runs = {"size": [32, 40], "counts": [64, 64, 32 * 40 - 128]}  # the third and fourth column
            annotations += [
                row(3 * i, 10 + i, 3, [x, y, 12, 10], segmentation=polygon),
                row(3 * i + 1, 10 + i, 7, [20, 4, 15, 20], segmentation=[[20, 4, 35, 4, 35, 24, 20, 24]]),
                row(3 * i + 2, 10 + i, 7, [2, 0, 2, 32], segmentation=runs, iscrowd=1),
            ]
        write_instances(root, name, images, annotations, folder="annotations" if published else "")
    return root


def row(number: int, image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    """Return an annotation."""
    common = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
    return {**common, "iscrowd": 0, **more}


def write_instances(
    root: Path, name: str, images: list[dict[str, Any]], annotations: list[dict[str, Any]], folder: str = ""
) -> None:
    """Write an annotation file."""
    path = root / folder / f"instances_{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    path.write_text(json.dumps(content), encoding="utf-8")
