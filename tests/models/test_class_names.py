"""Labels of classes in weights: by name, by number, by WordNet id and by a class map."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.class_names import NEW_ROW, as_numbers, find_labels, imagenet_rows, read_class_map, rows_by_name, synsets


def test_labels_by_name_need_every_class() -> None:
    assert find_labels(["cat", "ant"], ["ant", "bee", "cat"]) == [2, 0]
    assert find_labels(["cat", "emu"], ["ant", "bee", "cat"]) == []


def test_rows_of_unknown_classes_are_new_only_among_as_many_classes() -> None:
    assert rows_by_name(["ant", "emu"], ["emu", "owl"]) == [NEW_ROW, 0]
    assert rows_by_name(["ameise", "uhu"], ["ant", "owl"]) == []
    assert rows_by_name(["ant", "emu"], ["ant", "bee", "owl"]) == []


def test_only_numbers_below_the_limit_are_labels() -> None:
    assert as_numbers(["0", "10", "2"], 11) == [0, 10, 2]
    assert as_numbers(["0", "10", "2"], 10) == as_numbers(["0", "two"], 10) == []


def test_synsets_of_an_imagenet_set_have_its_number_of_classes() -> None:
    assert [len(synsets(number)) for number in (1000, 21841, 10)] == [1000, 21841, 0]
    rows = imagenet_rows("imagenet-22k")
    assert rows.count(NEW_ROW) == 1  # ImageNet-22K has no teddy bear
    assert synsets(21841)[rows[0]] == synsets(1000)[0] == "n01440764"


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("7\n-1\n0\n", [], [7, NEW_ROW, 0]),
        ("7000\n-1\n3\n", [str(1000 * number) for number in range(10)], [7, NEW_ROW, 3]),
        ("emu,ant\ncat,-1\nant,9\nowl,1\n", [*"abcdefgh", "ant", "emu"], [9, NEW_ROW, 8]),
    ],
    ids=["indices", "names that are numbers", "pairs in any order"],
)
def test_a_class_map_gives_the_label_of_each_class(
    tmp_path: Path, text: str, names: list[str], labels: list[int]
) -> None:
    class_map = tmp_path / "map.txt"
    class_map.write_text(text)
    assert read_class_map(class_map, num_classes=10, classes=["ant", "cat", "emu"], names=names) == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n", "must have one line per class, 3, but has 2"),
        ("1\n2\n10\n", "line 3: '10' is not a class of the weights; give 0 to 9, or -1"),
        ("1\nn01440764\n3\n", "line 2: 'n01440764' is not a class"),
        ("1\n\n3\n", "must have one line per class, 3, but has 2"),
        (None, "cannot be read"),
    ],
)
def test_class_maps_that_do_not_fit_are_rejected(tmp_path: Path, text: str | None, message: str) -> None:
    class_map = tmp_path / "map.txt"
    if text is not None:
        class_map.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_class_map(class_map, num_classes=10, classes=["ant", "cat", "emu"])
