"""Images in folders with annotations: shared code of the readers of COCO, Pascal VOC and YOLO files."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from data.detection.sources import DetectionSource, Objects
from data.images import StoredImage, read_file
from data.sources import other_form
from data.wording import counted, shorten

UNKNOWN = -1  # label of invalid annotations
_NAMED = 3  # objects in a message


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One object of an annotation file.

    Attributes:
        name: its name in messages.
        box: x1, y1, x2, y2 in pixels.
        label: counted from 0; None for an unknown class.
        area: in pixels; None for the area of the box.
        crowd: whether it is a group of objects.
        outline: polygons or run lengths in COCO's format; None if it has only a box.
    """

    name: str
    box: tuple[float, float, float, float]
    label: int | None
    area: float | None = None
    crowd: bool = False
    outline: Any = None


@dataclass
class Faults:
    """Annotations that were left out, by kind of fault."""

    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def keep(self, annotation: Annotation, size: tuple[int, int]) -> tuple[float, ...] | None:
        """Return the box clipped to an image of this height and width; record it and return None if it is invalid."""
        x1, y1, x2, y2 = annotation.box
        inside = _clipped(annotation.box, size)
        if annotation.label is None:
            self.names["of an unknown class"].append(annotation.name)
        elif not all(map(math.isfinite, annotation.box)):
            self.names["with coordinates that are not finite"].append(annotation.name)
        elif x2 <= x1 or y2 <= y1:
            self.names["without an area"].append(annotation.name)
        elif inside[2] <= inside[0] or inside[3] <= inside[1]:
            self.names["outside of the image"].append(annotation.name)
        elif annotation.outline is not None and not _is_outline(annotation.outline, size):
            self.names["whose outline is neither polygons nor run lengths of the image's [height, width]"].append(
                annotation.name
            )
        else:
            return inside
        return None

    def warnings(self, where: object) -> list[str]:
        """Return warnings about what was left out of a file or folder."""
        return [
            f"{where}: left out {counted(len(names), 'box', 'boxes')} {what}: {shorten(names)}"
            for what, names in self.names.items()
        ]


class _Texts:
    """Texts in one array, which forked workers share.

    Strings, and Python objects for a million annotations, would be copied into each worker, as reading them changes
    their reference counts.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._bytes[self._ends[index] : self._ends[index + 1]])

    def append(self, text: bytes) -> None:
        """Add a text at the end."""
        self._bytes += text
        self._ends.append(len(self._bytes))


class AnnotatedImages(DetectionSource):
    """Image files and their annotations.

    Args:
        exif: whether to apply the EXIF orientation.
        pixels: for the classes of pixels: images without objects are kept, crowds count as objects, and invalid
            annotations are objects with the label `UNKNOWN`, with the outline of their box if their own is invalid.

    Attributes:
        without_outline: names of the first objects that have only a box.
        empty: whether no image so far has an object, crowds aside unless `pixels`.
    """

    def __init__(self, *, exif: bool, pixels: bool = False) -> None:
        self._exif = exif
        self._pixels = pixels
        self._paths = _Texts()
        self._sizes = array("q")  # height and width of each image
        self._objects = _Texts()
        self.without_outline: list[str] = []
        self.empty = True

    @property
    def masks(self) -> bool:
        """Whether every object so far has an outline."""
        return not self.without_outline

    def add(
        self, path: Path, size: tuple[int, int], annotations: Sequence[Annotation], faults: Faults, *, empty: bool
    ) -> bool:
        """Add an image of this height and width; return whether it was kept.

        Args:
            path: its file.
            size: its height and width.
            annotations: its objects.
            faults: collects invalid annotations.
            empty: whether to keep an image without objects for training.
        """
        boxes = [(annotation, faults.keep(annotation, size)) for annotation in annotations]
        rows = [
            [box, one.label, _area(box) if one.area is None else one.area, one.crowd, one.outline]
            for one, box in boxes
            if box is not None
        ]
        bare = not rows if self._pixels else all(row[3] for row in rows)
        if bare and not (empty or self._pixels):
            return False
        self.empty &= bare
        if self._pixels:
            left_out = [(one, _region(one, size)) for one, box in boxes if box is None]
            rows += [
                [one.box, UNKNOWN, int(rle.area(_encoded(region, size))), one.crowd, region]
                for one, region in left_out
                if region
            ]
        bare_boxes = [one.name for one, box in boxes if box is not None and not one.outline]
        self.without_outline += bare_boxes[: _NAMED - len(self.without_outline)]
        self._paths.append(str(path).encode(errors="surrogatepass"))
        self._sizes.extend(size)
        self._objects.append(json.dumps(rows).encode())
        return True

    def missing(self) -> list[str]:
        """Return the missing files, listing each folder once."""
        paths = [self._path(index) for index in range(len(self))]
        folders = {Path(path).parent for path in paths}
        there = {entry.path for folder in folders if folder.is_dir() for entry in os.scandir(folder)}
        return [path for path in paths if path not in there]

    def __len__(self) -> int:
        return len(self._paths)

    def get(self, index: int) -> StoredImage:
        path = self._path(index)
        return StoredImage(read_file(path), path, exif=self._exif)

    def _path(self, index: int) -> str:
        return self._paths[index].decode(errors="surrogatepass")

    def size(self, index: int) -> tuple[int, int]:
        return self._sizes[2 * index], self._sizes[2 * index + 1]

    def objects(self, index: int) -> Objects:
        rows = json.loads(self._objects[index])
        boxes, labels, areas, crowd, outlines = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        return Objects(
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            labels=np.array(labels, dtype=np.int64),
            areas=np.array(areas, dtype=np.float64),
            crowd=np.array(crowd, dtype=bool),
            masks=[_encoded(outline, self.size(index)) for outline in outlines] if self.masks else None,
        )


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _clipped(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of a box inside of an image of this height and width."""
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size[1])), min(box[3], float(size[0]))


def _region(annotation: Annotation, size: tuple[int, int]) -> Any:
    """Return the outline of an annotation, or of its box if that is invalid; None if the box has no area, either."""
    if annotation.outline is not None and _is_outline(annotation.outline, size):
        return annotation.outline
    x1, y1, x2, y2 = _clipped(annotation.box, size)
    return [[x1, y1, x2, y1, x2, y2, x1, y2]] if x1 < x2 and y1 < y2 else None  # None for NaN, too


def _is_outline(outline: Any, size: tuple[int, int]) -> bool:
    """Return whether it is polygons of at least three points, or run lengths of an image of this height and width."""
    if isinstance(outline, list):
        return bool(outline) and all(map(_is_polygon, outline))
    if not isinstance(outline, dict) or outline.get("size") != list(size):
        return False
    counts = outline.get("counts")
    return isinstance(counts, str) or (
        isinstance(counts, list)
        and set(map(type, counts)) == {int}
        and min(counts) >= 0
        and sum(counts) == math.prod(size)
    )


def _is_polygon(points: Any) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= 6  # four numbers would be taken for a box
        and len(points) % 2 == 0
        and set(map(type, points)) <= {int, float}
        and math.isfinite(sum(points))
    )


def _encoded(outline: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Convert polygons or run lengths to compressed run lengths."""
    if isinstance(outline, list):
        return rle.merge(rle.frPyObjects(outline, *size))
    if isinstance(outline["counts"], list):
        return rle.frPyObjects(outline, *outline["size"])
    return outline


def split_warnings(source: AnnotatedImages, where: object, faults: Faults, without: Sequence[str] = ()) -> list[str]:
    """Return warnings about a split of a data set.

    Args:
        source: the split.
        where: its annotation file or folder.
        faults: annotations that were left out.
        without: images that were left out because they have no objects.

    Raises:
        ValueError: the split has no image with an object, or none of its files exists.
    """
    found = faults.warnings(where)
    if source.empty:
        raise ValueError("; ".join([f"{where} has no image with an object", *found]))
    if without:
        found.append(f"{where}: not trained on {counted(len(without), 'image')} without objects: {shorten(without)}")
    missing = source.missing()
    hint = other_form(Path(missing[0])) if missing else ""
    if len(missing) == len(source):
        hint = hint or "; check the data path"
        raise ValueError(f"none of the {len(source)} images of {where} exists: {shorten(missing)}{hint}")
    if missing:
        names = shorten(missing) + hint
        found.append(f"{where}: {counted(len(missing), 'image')} missing, see DATA.BAD_IMAGES: {names}")
    return found
