"""Detection data in the format of COCO: `instances_{train,val}.json` next to the folders `train` and `val`.

COCO's own names are understood as well: `annotations/instances_{train,val}2017.json` and `{train,val}2017`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.detection.annotated import AnnotatedImages, Annotation, Faults, split_warnings
from data.detection.sources import DetectionDataset
from data.sources import Request, join_classes
from data.wording import shorten

_LAYOUT = (
    "expected instances_train.json, instances_val.json, train/ and val/, or annotations/instances_train2017.json, "
    "annotations/instances_val2017.json, train2017/ and val2017/"
)
# Its lists, and the required keys of their entries with the types of their values.
_ID = {int: "a number", float: "a number", str: "text"}
_ENTRIES = {
    "images": {"id": _ID, "file_name": {str: "text"}, "height": {int: "an integer"}, "width": {int: "an integer"}},
    "annotations": {"id": {}, "image_id": _ID, "category_id": _ID, "bbox": {}},  # boxes have a message of their own
    "categories": {"id": _ID, "name": {str: "text"}},
}


def open_coco(request: Request, *, pixels: bool = False) -> DetectionDataset:
    """Open a data set in the layout of COCO. Labels follow the ids of the categories.

    Crowds are not learned; boxes without an area, outside of their image or of an unknown class are left out, and
    images without objects are not trained on. Each is counted and named in the warnings.

    Args:
        request: what to open.
        pixels: for the classes of pixels, see `AnnotatedImages`.

    Raises:
        ValueError: a file is missing, is not an annotation file, or has other classes than that of the training split.
    """
    root = request.existing_root(_LAYOUT)
    files = {split: _find(request, split, root) for split in request.needs}
    contents = {split: _read(path) for split, (path, _) in files.items()}
    where = {split: path for split, (path, _) in files.items()}
    names = {split: _names(content, where[split]) for split, content in contents.items()}
    if "train" not in names:  # the classes are those of training also if it is not needed
        with suppress(ValueError):  # it need not exist
            where["train"] = _find(request, "train", root)[0]
    if "train" in where.keys() - names.keys():
        names["train"] = _names(_read(where["train"]), where["train"])
    classes, labels = join_classes(names, where, _LAYOUT)
    sources, warnings = {}, []
    for split, (path, folder) in files.items():
        ids = [category["id"] for category in _categories(contents[split])]
        by_id = dict(zip(ids, labels[split].tolist(), strict=True))
        content = contents.pop(split)
        sources[split] = AnnotatedImages(exif=request.exif, pixels=pixels)
        warnings += _read_split(content, by_id, folder, path, sources[split], learned=split == "train")
    return DetectionDataset(
        classes=classes,
        masks=all(source.masks for source in sources.values()),
        without_masks=[f"{name} in {where[split]}" for split in sources for name in sources[split].without_outline],
        train=sources.get("train"),
        held_out=sources.get("val"),
        format_warnings=warnings,
    )


def _find(request: Request, split: str, root: Path) -> tuple[Path, Path]:
    """Return the annotation file of a split and the folder of its images."""
    given = getattr(request, split)
    for name in [given] if given else [split, f"{split}2017"]:
        for folder in (root, root / "annotations"):
            if (path := folder / f"instances_{name}.json").is_file():
                return path, root / name
    raise ValueError(f"no file instances_{given or split}.json in data path {root}; {_LAYOUT}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    lists = content if isinstance(content, dict) else {}
    if absent := [key for key in _ENTRIES if not isinstance(lists.get(key), list)]:
        raise ValueError(f"{path} is not a COCO annotation file: it has no list of {', '.join(absent)}")
    for key, needed in _ENTRIES.items():
        for entry in lists[key]:
            if not isinstance(entry, dict) or not needed.keys() <= entry.keys():
                names = ", ".join(sorted(needed))
                raise ValueError(f"{path}: each of its {key} needs {names}, unlike {str(entry)[:80]}")
            _check_types(entry, needed, f"{path}: {{}} of its {key} must be {{}}, unlike {{!r}} in {{}}")
        if len({isinstance(entry["id"], str) for entry in lists[key]}) > 1:
            raise ValueError(f"{path}: some ids of its {key} are numbers and others text; use one of them")
    for key in ("images", "categories"):
        ids = Counter(entry["id"] for entry in lists[key])
        if twice := [str(number) for number, count in ids.items() if count > 1]:
            raise ValueError(f"{path}: two {key} have the id {shorten(twice)}; give each its own")
    broken = next((one for one in lists["annotations"] if not _is_box(one["bbox"])), None)
    if broken:
        raise ValueError(
            f"{path}: a bbox is [x, y, width, height], four numbers, unlike {str(broken['bbox'])[:80]} of annotation "
            f"{broken['id']}"
        )
    return content


def _check_types(entry: dict[str, Any], needed: Mapping[str, Mapping[type, str]], message: str) -> None:
    for name, types in needed.items():
        if types and type(entry[name]) not in types:
            allowed = " or ".join(dict.fromkeys(types.values()))
            raise ValueError(message.format(name, allowed, entry[name], str(entry)[:80]))


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)


def _categories(content: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(content["categories"], key=lambda category: category["id"])


def _names(content: dict[str, Any], path: Path) -> list[str]:
    """Return the names of the categories by id."""
    names = [category["name"] for category in _categories(content)]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{path} has two categories of the name {shorten(twice)}; give each name once")
    return names


def _read_split(
    content: dict[str, Any], labels: dict[int, int], folder: Path, path: Path, source: AnnotatedImages, *, learned: bool
) -> list[str]:
    """Add the images of an annotation file to a source, and return warnings about them."""
    faults, without = Faults(), []
    by_image = defaultdict(list)
    for annotation in content.pop("annotations"):
        by_image[annotation["image_id"]].append(annotation)
    for image in sorted(content["images"], key=lambda image: image["id"]):
        objects = [_annotation(one, labels) for one in by_image.pop(image["id"], ())]
        size = image["height"], image["width"]
        if not source.add(folder / image["file_name"], size, objects, faults, empty=not learned):
            without.append(image["file_name"])
    if by_image:
        strays = [f"annotation {one['id']}" for annotations in by_image.values() for one in annotations]
        faults.names["of images that are not listed"] += strays
    return split_warnings(source, path, faults, without)


def _annotation(one: dict[str, Any], labels: dict[int, int]) -> Annotation:
    x, y, width, height = one["bbox"]
    outline = one.get("segmentation")
    return Annotation(
        name=f"annotation {one['id']}",
        box=(x, y, x + width, y + height),
        label=labels.get(one["category_id"]),
        area=one.get("area"),
        crowd=bool(one.get("iscrowd", 0)),
        outline=outline if outline and outline != [[]] else None,  # some programs write these for boxes alone
    )
