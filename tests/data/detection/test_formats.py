"""Readers of detection data: boxes, masks and crowds; invalid annotations are skipped and named."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import pytest
from PIL import ExifTags, Image

from data.detection.coco import open_coco
from data.detection.digit_scenes import open_digit_scenes
from data.detection.sources import DetectionSource
from data.detection.voc import open_voc
from data.detection.yolo import open_yolo
from data.formats.digit_scenes import DigitScenes
from data.images import UnreadableImage
from data.sources import Request
from tests.data.detection.samples import row, write_coco, write_instances


@pytest.mark.parametrize("published", [False, True])
def test_boxes_polygons_runs_and_crowds_are_read(tmp_path: Path, published: bool) -> None:
    dataset = open_coco(Request(path=str(write_coco(tmp_path, published=published))))
    assert (dataset.classes, dataset.masks, dataset.format_warnings) == (["dog", "cat"], True, [])
    assert (len(dataset.train), len(dataset.held_out)) == (8, 5)
    objects = dataset.held_out.objects(1)
    assert objects.labels.tolist() == [0, 1, 1]
    assert objects.crowd.tolist() == [False, False, True]
    assert objects.boxes[1].tolist() == [20, 4, 35, 24]
    masks = objects.decoded((32, 40))
    assert masks.sum((1, 2)).tolist() == [120, 300, 64]
    assert masks[2, :, 2:4].all()


def test_invalid_annotations_are_skipped_and_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    images = [{"id": i, "file_name": f"{i}.png", "height": 32, "width": 40} for i in (0, 1, 20)]
    boxes = [[5, 5, 10, 10], [3, 3, 0, 4], [50, 5, 4, 4], [-5, -5, 15, 15], [1, 1, float("nan"), 4]]
    annotations = [row(i, 0, 3, box) for i, box in enumerate(boxes)] + [
        row(9, 0, 4, [1, 1, 2, 2]),
        row(8, 20, 7, boxes[0]),
    ]
    write_instances(tmp_path, "train", images, annotations)
    dataset = open_coco(Request(path=str(tmp_path)))
    assert not dataset.masks
    assert len(dataset.train) == 2  # the one without objects is not trained on
    assert dataset.train.objects(0).boxes.tolist() == [[5, 5, 15, 15], [0, 0, 10, 10]]
    text = "\n".join(dataset.format_warnings)
    assert "left out 1 box without an area: annotation 1" in text
    assert "left out 1 box with coordinates that are not finite: annotation 4" in text
    assert "left out 1 box outside of the image: annotation 2" in text
    assert "left out 1 box of an unknown class: annotation 9" in text
    assert "not trained on 1 image without objects: 1.png" in text
    assert "1 image missing, see DATA.BAD_IMAGES" in text
    assert "20.png" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a COCO annotation file"),
        ('{"images": []}', "annotations, categories"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"no file instances_train.json"):
        open_coco(Request(path=str(tmp_path)))
    write_coco(tmp_path)
    (tmp_path / "instances_val.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_coco(Request(path=str(tmp_path)))


def test_voc_counts_pixels_from_one_and_skips_difficult_objects(tmp_path: Path) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    box = "<bndbox><xmin>3</xmin><ymin>1</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    objects = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult>{box}</object>"
        for name, difficult in (("dog", 0), ("cat", 1))
    ]
    size = "<size><width>40</width><height>32</height></size>"
    content = f"<annotation><filename>a.png</filename>{size}{''.join(objects)}</annotation>"
    (tmp_path / "Annotations" / "a.xml").write_text(content)
    Image.new("RGB", (40, 32)).save(tmp_path / "JPEGImages" / "a.png")
    for part in ("train", "val"):
        (tmp_path / "ImageSets" / "Main" / f"{part}.txt").write_text("a\n")
    dataset = open_voc(Request(path=str(tmp_path)))
    assert dataset.classes == ["cat", "dog"]
    objects = dataset.train.objects(0)
    assert objects.boxes.tolist() == [[2, 0, 9, 8]] * 2
    assert objects.labels.tolist() == [1, 0]
    assert objects.crowd.tolist() == [False, True]
    for name, right, wrong in (("bndbox/xmin", ">3<", ">3,5<"), ("size/width", ">40<", "><")):
        (tmp_path / "Annotations" / "a.xml").write_text(content.replace(right, wrong))
        with pytest.raises(ValueError, match=f"the annotation of a.png: {name} must be a number, not '{wrong[1:-1]}'"):
            open_voc(Request(path=str(tmp_path)))


def test_yolo_boxes_are_shares_of_the_image(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / part).mkdir(parents=True)
        Image.new("RGB", (40, 32)).save(tmp_path / "images" / part / "a.png")
        (tmp_path / "labels" / part / "a.txt").write_text("1 0.5 0.5 0.25 0.5\n9 0.5 0.5 0.1 0.1\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    dataset = open_yolo(Request(path=str(tmp_path)))
    assert dataset.train.objects(0).boxes.tolist() == [[15, 8, 25, 24]]
    assert "line 2 of a.txt" in dataset.format_warnings[0]
    (tmp_path / "labels" / "val" / "a.txt").write_text("dog 0.5 0.5\n")
    with pytest.raises(ValueError, match=r"a.txt, line 1: 'dog 0.5 0.5' is not"):
        open_yolo(Request(path=str(tmp_path)))


def test_yolo_images_of_other_endings_are_read_or_counted(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for name in ("a.jpg", "b.JFIF", "c.tif", "d.heic", "._a.jpg"):
        file = tmp_path / "images" / "train" / name
        Image.new("RGB", (40, 32)).save(file, "TIFF" if name == "c.tif" else "JPEG")
        (tmp_path / "labels" / "train" / f"{file.stem}.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    dataset = open_yolo(Request(path=str(tmp_path), needs=("train",)))
    assert len(dataset.train) == 3
    (warning,) = dataset.format_warnings
    assert warning.startswith("1 file skipped in ")
    assert warning.endswith("with extensions that Pillow does not read: 1 .heic")


def test_coco_file_in_another_form_of_unicode(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    Image.new("RGB", (40, 32)).save(tmp_path / "val" / "a\u0308.png")
    image = {"id": 1, "file_name": "\u00e4.png", "height": 32, "width": 40}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [3, 1, 6, 7]}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "instances_val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"exists: .*; \u00e4\.png is there in another Unicode normalisation, convert"):
        open_coco(Request(path=str(tmp_path), needs=("val",)))


@pytest.mark.parametrize("listed", [False, True])
def test_voc_names_in_two_forms_of_unicode_are_one_class(tmp_path: Path, listed: bool) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    box = "<bndbox><xmin>3</xmin><ymin>1</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    size = "<size><width>40</width><height>32</height></size>"
    objects = "".join(f"<object><name>{name}</name>{box}</object>" for name in ("\u00e4", "a\u0308"))
    content = f"<annotation><filename>a.png</filename>{size}{objects}</annotation>"
    (tmp_path / "Annotations" / "a.xml").write_text(content, encoding="utf-8")
    Image.new("RGB", (40, 32)).save(tmp_path / "JPEGImages" / "a.png")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    if listed:
        (tmp_path / "classes.txt").write_text("a\u0308\n", encoding="utf-8")
    dataset = open_voc(Request(path=str(tmp_path), needs=("train",)))
    assert dataset.classes == ["\u00e4"]
    assert dataset.train.objects(0).labels.tolist() == [0, 0]


def test_voc_names_may_contain_spaces(tmp_path: Path) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    box = "<bndbox><xmin>3</xmin><ymin>1</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    size = "<size><width>40</width><height>32</height></size>"
    content = f"<annotation><filename>my dog.png</filename>{size}<object><name>dog</name>{box}</object></annotation>"
    (tmp_path / "Annotations" / "my dog.xml").write_text(content)
    Image.new("RGB", (40, 32)).save(tmp_path / "JPEGImages" / "my dog.png")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("my dog\n")
    assert len(open_voc(Request(path=str(tmp_path), needs=("train",))).train) == 1


def test_yolo_images_that_are_rotated_or_damaged(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 32)).save(tmp_path / "images" / "train" / "a.jpg", exif=exif)
    (tmp_path / "images" / "train" / "b.jpg").write_bytes(b"no image")
    for name in "ab":
        (tmp_path / "labels" / "train" / f"{name}.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    for orientation, size in ((False, (32, 40)), (True, (40, 32))):
        images = open_yolo(Request(path=str(tmp_path), needs=("train",), exif=orientation)).train
        assert images.size(0) == size == np.asarray(images.get(0).decode()).shape[:2]
        assert len(images) == 2  # DATA.BAD_IMAGES decides about the damaged one when it is used
        with pytest.raises(UnreadableImage, match=r"b\.jpg"):
            images.get(1).decode()


def test_digit_scenes_are_exact_and_always_the_same(tmp_path: Path) -> None:
    scenes = DigitScenes(train=True, scenes=4)
    scene = scenes[3]
    assert scenes[3] is scene
    assert not (scenes[2].pixels == scene.pixels).all()
    for box, mask in zip(scene.boxes, scene.masks, strict=True):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert scene.masks.sum(0).max() == 1
    assert (scenes[3].pixels == scene.pixels).all()
    assert not (DigitScenes(train=False, scenes=4)[3].pixels == scene.pixels).all()
    dataset = open_digit_scenes(Request(scenes=600))
    assert (dataset.train.objects(3).decoded((128, 128)) == scene.masks).all()
    # A path takes their place.
    assert open_digit_scenes(Request(path=str(write_coco(tmp_path)))).classes == ["dog", "cat"]


IMAGE = {"id": 10, "file_name": "0.png", "height": 32, "width": 40}


def test_objects_with_invalid_outlines_are_skipped_and_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    square = [3, 3, 9, 3, 9, 9, 3, 9]
    runs = {"size": [32, 40], "counts": [64, 64, 32 * 40 - 128]}
    wrong = [[square, square[:4]], [square[:7]], [[*square[:5], "9"]], {"size": [40, 32], "counts": [1280]}]
    outlines = [[square], runs, *wrong, runs | {"counts": [64]}]
    annotations = [row(i, 10, 3, [3, 3, 6, 6], segmentation=outline) for i, outline in enumerate(outlines)]
    write_instances(tmp_path, "val", [IMAGE], annotations)
    dataset = open_coco(Request(path=str(tmp_path)))
    assert dataset.masks
    assert dataset.held_out.objects(0).decoded((32, 40)).shape == (2, 32, 40)
    assert "left out 5 boxes whose outline is neither polygons nor run lengths" in dataset.format_warnings[0]


def test_empty_outlines_are_boxes_alone(tmp_path: Path) -> None:
    write_coco(tmp_path)
    annotations = [row(i, 10, 3, [3, 3, 6, 6], segmentation=outline) for i, outline in enumerate(([], [[]]))]
    write_instances(tmp_path, "val", [IMAGE], annotations)
    dataset = open_coco(Request(path=str(tmp_path)))
    assert not dataset.masks
    assert len(dataset.held_out.objects(0).boxes) == 2


def test_held_out_images_without_any_object_are_refused(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_instances(tmp_path, "val", [IMAGE], [row(1, "10", 3, [3, 3, 6, 6])])
    with pytest.raises(
        ValueError, match=r"val.json has no image with an object; .* 1 box of images that are not listed"
    ):
        open_coco(Request(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("height", None, "height of its images must be an integer, unlike None"),
        ("width", "40", "width of its images must be an integer, unlike '40'"),
        ("file_name", 5, "file_name of its images must be text, unlike 5"),
        ("id", None, "id of its images must be a number or text, unlike None"),
        ("id", "a", "some ids of its images are numbers and others text"),
    ],
)
def test_values_of_wrong_types_are_refused(tmp_path: Path, name: str, value: object, message: str) -> None:
    write_coco(tmp_path)
    write_instances(tmp_path, "val", [IMAGE, IMAGE | {"id": 11, name: value}], [row(1, 10, 3, [3, 3, 6, 6])])
    with pytest.raises(ValueError, match=rf"instances_val\.json: {message}"):
        open_coco(Request(path=str(tmp_path)))


def test_names_of_categories_are_text_and_occur_once(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "instances_val.json"
    content = json.loads(path.read_text())
    for second, message in (
        (1, "name of its categories must be text"),
        ("cat", "two categories of the name cat; give"),
    ):
        path.write_text(json.dumps(content | {"categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": second}]}))
        with pytest.raises(ValueError, match=message):
            open_coco(Request(path=str(tmp_path)))


def test_evaluation_takes_the_classes_of_training(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "instances_val.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"categories": [{"id": 7, "name": "cat"}]}))
    dataset = open_coco(Request(path=str(tmp_path), needs=("val",)))
    assert dataset.classes == ["dog", "cat"]
    assert set(dataset.held_out.objects(0).labels.tolist()) == {1}
    (tmp_path / "instances_train.json").unlink()
    assert open_coco(Request(path=str(tmp_path), needs=("val",))).classes == ["cat"]


def write_voc(root: Path, objects: dict[str, str], head: str = "") -> None:
    """Write an annotation file, with an image and a list of its own, for each split."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    box = "<bndbox><xmin>3</xmin><ymin>1</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    size = "<size><width>40</width><height>32</height></size>"
    for split, content in objects.items():
        one = f"{head}<annotation><filename> {split}.png </filename>{size}<object>{content}{box}</object></annotation>"
        (root / "Annotations" / f"{split}.xml").write_text(one)
        Image.new("RGB", (40, 32)).save(root / "JPEGImages" / f"{split}.png")
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{split}\n")


def test_voc_text_is_stripped_and_classes_are_those_of_both_lists(tmp_path: Path) -> None:
    extra = "<object><name>bird</name><difficult> 1 </difficult></object>"
    write_voc(tmp_path, {"train": "<name>cat</name>", "val": "<name> dog </name><difficult> 0 </difficult>"})
    assert open_voc(Request(path=str(tmp_path), needs=("val",))).classes == ["cat", "dog"]
    path = tmp_path / "Annotations" / "val.xml"
    box = "<bndbox><xmin>3</xmin><ymin>1</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
    path.write_text(path.read_text().replace("<object>", extra.replace("</object>", box) + "<object>"))
    assert open_voc(Request(path=str(tmp_path))).held_out.objects(0).crowd.tolist() == [True, False]


def test_voc_files_of_unknown_encodings_are_named(tmp_path: Path) -> None:
    for encoding in ("gb2312", "none-such"):
        write_voc(tmp_path, {"train": "<name>cat</name>"}, head=f'<?xml version="1.0" encoding="{encoding}"?>')
        with pytest.raises(ValueError, match=r"train\.xml cannot be read as XML"):
            open_voc(Request(path=str(tmp_path), needs=("train",)))


def write_yolo(root: Path, content: bytes) -> None:
    """Write one held-out image with a label file."""
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
    Image.new("RGB", (40, 32)).save(root / "images" / "val" / "a.png")
    (root / "labels" / "val" / "a.txt").write_bytes(content)
    (root / "classes.txt").write_text("cat\ndog\n")


def test_yolo_label_files_of_windows_and_in_other_encodings(tmp_path: Path) -> None:
    write_yolo(tmp_path, b"\xef\xbb\xbf1 0.5 0.5 0.25 0.5\r\n\r\n  \n")
    request = Request(path=str(tmp_path), needs=("val",))
    assert open_yolo(request).held_out.objects(0).boxes.tolist() == [[15, 8, 25, 24]]
    (tmp_path / "labels" / "val" / "a.txt").write_bytes(b"\xe4")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        open_yolo(request)
    (tmp_path / "labels" / "val").rename(tmp_path / "labels" / "validation")
    with pytest.raises(ValueError, match=r"no folder .*labels.val in data path"):
        open_yolo(request)


@pytest.mark.parametrize("turned", [False, True])
def test_yolo_sizes_of_rotated_tiff_files(tmp_path: Path, turned: bool) -> None:
    write_yolo(tmp_path, b"1 0.5 0.5 0.25 0.5\n")
    (tmp_path / "images" / "val" / "a.png").unlink()
    Image.new("RGB", (40, 32)).save(tmp_path / "images" / "val" / "a.tif", tiffinfo={274: 6})
    images = open_yolo(Request(path=str(tmp_path), needs=("val",), exif=turned)).held_out
    assert images.size(0) == np.asarray(images.get(0).decode()).shape[:2]


def write_voc_images(root: Path, files: dict[str, str], images: tuple[str, ...]) -> None:
    """Write annotations of training images by name, with their `<filename>`, and images whose red is their number."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    box = "<bndbox><xmin>3</xmin><ymin>1</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    size = "<size><width>40</width><height>32</height></size>"
    for name, file in files.items():
        content = f"<annotation><filename>{file}</filename>{size}<object><name>cat</name>{box}</object></annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(content)
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(files))
    for number, image in enumerate(images):
        Image.new("RGB", (40, 32), (number, 0, 0)).save(root / "JPEGImages" / image)


@pytest.mark.parametrize(
    ("files", "images", "read"),
    [
        (dict.fromkeys("abc", "a.png"), ("a.png", "b.png", "c.png"), [0, 1, 2]),  # copied annotations
        ({"a": "", "b": "b"}, ("a.png", "b.png"), [0, 1]),
        ({"a": "one.png", "b": "b.png"}, ("one.png", "b.png"), [0, 1]),  # under another name
        ({"a": "a.png"}, ("a.bmp", "a.png"), [1]),  # two of one name
    ],
)
def test_voc_images_are_those_in_the_list(
    tmp_path: Path, files: dict[str, str], images: tuple[str, ...], read: list[int]
) -> None:
    write_voc_images(tmp_path, files, images)
    source = open_voc(Request(path=str(tmp_path), needs=("train",))).train
    assert [np.asarray(source.get(index).decode())[0, 0, 0] for index in range(len(source))] == read


def test_voc_images_occur_once(tmp_path: Path) -> None:
    write_voc_images(tmp_path, dict.fromkeys("ab", "one.png"), ("one.png",))
    listed = tmp_path / "ImageSets" / "Main" / "train.txt"
    for names in ("a\nb\n", "a\na\n"):
        listed.write_text(names)
        with pytest.raises(ValueError, match=r"train\.txt has the image one\.png more than once; list each image once"):
            open_voc(Request(path=str(tmp_path), needs=("train",)))


@pytest.mark.parametrize("key", ["images", "categories"])
def test_ids_occur_once(tmp_path: Path, key: str) -> None:
    write_coco(tmp_path)
    path = tmp_path / "instances_val.json"
    content = json.loads(path.read_text())
    content[key][1]["id"] = content[key][0]["id"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"val\.json: two {key} have the id {content[key][0]['id']}; give each its"):
        open_coco(Request(path=str(tmp_path)))


def test_objects_without_an_outline_are_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    outline = [[3, 3, 9, 3, 9, 9, 3, 9]]
    objects = [row(i, 10, 3, [3, 3, 6, 6], **({} if i % 2 else {"segmentation": outline})) for i in range(20)]
    write_instances(tmp_path, "val", [IMAGE], objects)
    dataset = open_coco(Request(path=str(tmp_path)))
    assert not dataset.masks
    assert dataset.without_masks == [f"annotation {i} in {tmp_path / 'instances_val.json'}" for i in (1, 3, 5)]


def count_objects(source: DetectionSource) -> int:
    """Return the number of Python objects that a source holds."""
    seen, ahead = {}, [source]
    while ahead:
        one = ahead.pop()
        if id(one) not in seen and not isinstance(one, (type, ModuleType, FunctionType)):
            seen[id(one)] = one
            ahead += gc.get_referents(one)
    return len(seen)


def test_annotations_are_held_in_a_few_arrays(tmp_path: Path) -> None:
    """Reading an object writes its reference count, which copies its page of memory into each forked worker."""
    counts = []
    for number in (10, 100):
        images = [IMAGE | {"id": i, "file_name": f"{i}.png", "width": 40 + i} for i in range(number)]
        write_instances(tmp_path, "val", images, [row(i, i, 3, [3, 3, 6, 6 + i % 3]) for i in range(number)])
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / "0.png").touch()
        source = open_coco(Request(path=str(tmp_path), needs=("val",))).held_out
        assert (len(source), source.size(9), source.objects(8).boxes.tolist()) == (number, (32, 49), [[3, 3, 9, 11]])
        counts.append(count_objects(source))
    assert counts[0] == counts[1]


def test_yolo_sizes_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_yolo(tmp_path, b"1 0.5 0.5 0.25 0.5\n")
    for kind, ending in (("images", "png"), ("labels", "txt")):
        file = tmp_path / kind / "val" / f"a.{ending}"
        file.with_stem("b").write_bytes(file.read_bytes())
    two, read = threading.Barrier(2, timeout=5), Image.open
    monkeypatch.setattr(Image, "open", lambda path: (two.wait(), read(path))[1])
    images = open_yolo(Request(path=str(tmp_path), needs=("val",))).held_out
    assert [images.size(index) for index in range(2)] == [(32, 40)] * 2
