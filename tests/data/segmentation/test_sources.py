"""Images and masks in folders: pairing, and the mapping from mask values to classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import UnreadableImage
from data.segmentation.folders import open_ade20k, open_masks
from data.segmentation.scenes import open_scenes
from data.segmentation.sources import IGNORED, Labels, read_mask
from data.sources import Request
from tests.data.segmentation.samples import CLASSES, write_masks


def test_folders_pair_images_and_masks_by_name(tmp_path: Path) -> None:
    data = open_masks(Request(path=str(write_masks(tmp_path))), Labels())
    assert (data.classes, len(data.train), len(data.held_out)) == (list(CLASSES), 8, 5)
    for kind, name in (("images", "\u00e4.png"), ("masks", "a\u0308.png")):  # one of them written by macOS
        (tmp_path / kind / "train" / "7.png").rename(tmp_path / kind / "train" / name)
    (tmp_path / "images" / "train" / "@eaDir").mkdir()  # of network storage
    (tmp_path / "images" / "train" / "@eaDir" / "0.png").write_bytes(b"a preview")
    data = open_masks(Request(path=str(tmp_path)), Labels())
    assert len(data.train) == 8
    image, mask = data.train.pair(1)
    assert mask.shape == (image.height, image.width) == (41, 48)
    stored = np.asarray(Image.open(tmp_path / "masks" / "train" / "1.png"))
    assert np.array_equal(mask, stored)
    (tmp_path / "images" / "val" / "0.png").unlink()
    warnings = open_masks(Request(path=str(tmp_path)), Labels()).format_warnings
    assert warnings == [f"1 mask without an image in {tmp_path / 'masks' / 'val'}: 0"]


def test_images_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = write_masks(tmp_path) / "images" / "train"
    (folder / "0.jpg").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"0\.jpg and .*0\.png have the same name but for the extension"):
        open_masks(Request(path=str(tmp_path)), Labels())


def test_ade20k_ignores_zero_and_shifts_the_others(tmp_path: Path) -> None:
    write_masks(tmp_path, values=(0, 1, 150), parts=("training", "validation"), masks="annotations")
    (tmp_path / "classes.txt").unlink()
    rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.1\t9\t9\tthing {i}, object" for i in range(1, 151))]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    data = open_ade20k(Request(path=str(tmp_path)), Labels())
    assert (data.classes[0], data.classes[-1], len(data.classes)) == ("thing 1", "thing 150", 150)
    found = {int(label) for index in range(len(data.train)) for label in np.unique(data.train.mask(index))}
    assert found == {IGNORED, 0, 149}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (Labels(), {0: 0, 2: 2, 255: IGNORED}),
        (Labels(ignored=0), {0: IGNORED, 2: 2}),
        (Labels(reduce_zero=True), {0: IGNORED, 1: 0, 2: 1, 255: IGNORED}),
        (Labels(mapping={7: 0, 8: 1}), {7: 0, 8: 1, 0: IGNORED, 9: IGNORED}),
    ],
)
def test_values_become_classes(labels: Labels, expected: dict[int, int]) -> None:
    table = labels.table()
    assert {value: int(table[value]) for value in expected} == expected


def test_palette_indices_are_labels_and_colour_masks_are_rejected(tmp_path: Path) -> None:
    path, values = tmp_path / "mask.png", np.array([[0, 2], [1, 255]], dtype=np.uint8)
    image = Image.fromarray(values).convert("P")
    image.putdata(values.flatten().tolist())
    image.save(path)
    assert np.array_equal(read_mask(str(path), Labels().table(), 3), values)
    with pytest.raises(UnreadableImage, match=r"has the value 2, which is none of the 2 classes; .* DATA\.LABEL_MAP"):
        read_mask(str(path), Labels().table(), 2)
    Image.new("RGB", (2, 2)).save(path)
    with pytest.raises(UnreadableImage, match="mode is RGB; a mask has one channel"):
        read_mask(str(path), Labels().table(), 3)
    Image.fromarray(np.full((2, 2), 300, dtype=np.uint16)).save(path)
    with pytest.raises(UnreadableImage, match="values from 300 to 300; they must be 0 to 255"):
        read_mask(str(path), Labels().table(), 3)


def test_a_mask_of_another_size_is_named_with_its_image(tmp_path: Path) -> None:
    write_masks(tmp_path)
    Image.new("L", (48, 39)).save(tmp_path / "masks" / "train" / "0.png")
    with pytest.raises(
        UnreadableImage, match=r"0\.png' is 48 x 40 pixels, its mask 48 x 39; they must have the same size"
    ):
        open_masks(Request(path=str(tmp_path)), Labels()).train.pair(0)


def test_scenes_have_the_digits_over_the_background() -> None:
    data = open_scenes(Request(needs=("val",)), Labels())
    image, mask = data.held_out.pair(3)
    assert data.classes == ["background", *map(str, range(10))]
    assert mask.shape == (image.height, image.width)
    assert mask.dtype == np.uint8
    assert {0} < set(np.unique(mask)) <= set(range(11))
