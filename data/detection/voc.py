"""Detection data in the format of Pascal VOC: one XML file per image, and lists of the images of each split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from data.detection.annotated import AnnotatedImages, Annotation, Faults, split_warnings
from data.detection.sources import DetectionDataset
from data.formats.folders import select_images
from data.sources import Request, compose, read_class_list, read_lines
from data.wording import shorten

_LAYOUT = "expected Annotations/*.xml, JPEGImages/ and ImageSets/Main/{train,val}.txt"

Named = tuple[str, ElementTree.Element]  # an annotation, with its name in the list of the split


def open_voc(request: Request) -> DetectionDataset:
    """Open a data set in the layout of Pascal VOC.

    Classes are those of `classes.txt`, one a line, or else all names in the annotations, sorted. An image is the file
    of `JPEGImages` whose name without extension is in the list; if there is none, that of `<filename>`. Pixels count
    from 1 in these files. Objects marked as difficult are treated as crowds: training leaves them out, and evaluation
    ignores detections that mostly lie in one. VOC ignores only those with an IoU above 0.5, not those of its parts.

    Raises:
        ValueError: a file is missing or cannot be read, or a list has an image twice.
    """
    root = request.existing_root(_LAYOUT)
    lists = {split: _list(request, root, split) for split in request.needs}
    trees = {split: _trees(root, path) for split, path in lists.items()}
    classes = read_class_list(root) or _named(request, root, trees)
    stored, sources, warnings = _by_stem(root / "JPEGImages"), {}, []
    for split, of_split in trees.items():
        source, faults, without = AnnotatedImages(exif=request.exif), Faults(), []
        paths = [_image(root / "JPEGImages", name, tree, stored) for name, tree in of_split]
        if twice := [path.name for path, count in Counter(paths).items() if count > 1]:
            raise ValueError(f"{lists[split]} has the image {shorten(twice)} more than once; list each image once")
        for path, (_, tree) in zip(paths, of_split, strict=True):
            size = tuple(int(_number(tree, f"size/{side}", "0", path.name)) for side in ("height", "width"))
            objects = [_annotation(one, path.name, classes) for one in tree.iter("object")]
            if not source.add(path, size, objects, faults, empty=split != "train"):
                without.append(path.name)
        sources[split] = source
        warnings += split_warnings(source, lists[split], faults, without)
    return DetectionDataset(
        classes=classes, masks=False, train=sources.get("train"), held_out=sources.get("val"), format_warnings=warnings
    )


def _list(request: Request, root: Path, split: str) -> Path:
    return root / "ImageSets" / "Main" / f"{getattr(request, split) or split}.txt"


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found = defaultdict(list)
    for path in select_images(folder, below=False)[0] if folder.is_dir() else ():
        found[compose(path.stem)].append(path)
    return found


def _image(folder: Path, name: str, tree: ElementTree.Element, stored: Mapping[str, Sequence[Path]]) -> Path:
    """Return the image of an annotation; `<filename>` decides if the folder has several of its name, or none."""
    given = folder / (tree.findtext("filename", "").strip() or f"{name}.jpg")
    files = stored.get(compose(name), [given])
    return given if given in files else files[0]


def _named(request: Request, root: Path, trees: Mapping[str, Sequence[Named]]) -> list[str]:
    """Return the names in the annotations; those of training also if only held-out images are needed."""
    listed = _list(request, root, "train")
    more = _trees(root, listed) if "train" not in trees and listed.is_file() else []
    return sorted(
        {_name(one) for of_split in [*trees.values(), more] for _, tree in of_split for one in tree.iter("object")}
    )


def _trees(root: Path, listed: Path) -> list[Named]:
    if not listed.is_file():
        raise ValueError(f"no file {listed} in data path {root}; {_LAYOUT}")
    found = []
    for name in read_lines(listed):
        path = root / "Annotations" / f"{name}.xml"
        try:
            found.append((name, ElementTree.parse(path).getroot()))
        except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: of the encoding
            raise ValueError(f"{path} cannot be read as XML: {error}") from None
    return found


def _name(one: ElementTree.Element) -> str:
    return compose(one.findtext("name", "").strip())


def _annotation(one: ElementTree.Element, image: str, classes: list[str]) -> Annotation:
    name = _name(one)
    x1, y1, x2, y2 = (_number(one, f"bndbox/{side}", "nan", image) for side in ("xmin", "ymin", "xmax", "ymax"))
    return Annotation(
        name=f"{name} in {image}",
        box=(x1 - 1, y1 - 1, x2, y2),
        label=classes.index(name) if name in classes else None,
        crowd=one.findtext("difficult", "0").strip() == "1",
    )


def _number(element: ElementTree.Element, name: str, missing: str, image: str) -> float:
    text = element.findtext(name, missing)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the annotation of {image}: {name} must be a number, not {text!r}") from None
