"""Detection data in the format of YOLO: `images/{train,val}/*` and `labels/{train,val}/*.txt`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import ExifTags, Image

from data.detection.annotated import AnnotatedImages, Annotation, Faults, split_warnings
from data.detection.sources import DetectionDataset
from data.formats.folders import select_images, skipped_files
from data.sources import Request, read_class_list

_TURNED = range(5, 9)  # EXIF orientations that exchange height and width
_LAYOUT = "expected images/{train,val}/, labels/{train,val}/*.txt and classes.txt"


def open_yolo(request: Request) -> DetectionDataset:
    """Open a data set in the layout of YOLO; classes are those of `classes.txt`, one a line.

    A line of a label file is `class x y width height`, centre and size relative to the image.

    Raises:
        ValueError: a folder or the list of classes is missing, or a label file holds something else.
    """
    root = request.existing_root(_LAYOUT)
    classes = read_class_list(root)
    if not classes:
        raise ValueError(f"no file classes.txt in data path {root}; {_LAYOUT}")
    sources, warnings = {}, []
    for split in request.needs:
        folder = root / "images" / (getattr(request, split) or split)
        labelled = root / "labels" / folder.name
        for needed in (folder, labelled):
            if not needed.is_dir():
                raise ValueError(f"no folder {needed} in data path {root}; {_LAYOUT}")
        source, faults, without = AnnotatedImages(exif=request.exif), Faults(), []
        images, skipped = select_images(folder, below=False)
        with ThreadPoolExecutor() as pool:  # opening files takes most of the time, above all on network disks
            sizes = pool.map(partial(_size, exif=request.exif), images)
        for path, size in zip(images, sizes, strict=True):
            labels = labelled / f"{path.stem}.txt"
            objects = _annotations(labels, size, len(classes)) if labels.is_file() else []
            if not source.add(path, size, objects, faults, empty=split != "train"):
                without.append(path.name)
        sources[split] = source
        warnings += split_warnings(source, folder, faults, without)
        warnings += filter(None, [skipped_files(folder, skipped)])
    return DetectionDataset(
        classes=classes, masks=False, train=sources.get("train"), held_out=sources.get("val"), format_warnings=warnings
    )


def _size(path: Path, *, exif: bool) -> tuple[int, int]:
    """Return height and width of an image from its header, with its orientation if `exif`.

    They are 1 if it cannot be read, which is handled when it is used.
    """
    try:
        with Image.open(path) as image:
            # Pillow rotates TIFF files itself, and gives their size after that.
            turned = exif and image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # decoders can raise any exception on damaged files
        return 1, 1


def _annotations(path: Path, size: tuple[int, int], classes: int) -> list[Annotation]:
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors of Windows write a byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, x, y, width, height = (float(word) for word in line.split())
        except ValueError:
            raise ValueError(f"{path}, line {number}: {line!r} is not `class x y width height`") from None
        left, top = (x - width / 2) * size[1], (y - height / 2) * size[0]
        box = left, top, left + width * size[1], top + height * size[0]
        known = int(label) if 0 <= label < classes else None
        found.append(Annotation(name=f"line {number} of {path.name}", box=box, label=known))
    return found
