"""Words for messages."""

from __future__ import annotations

from data.wording import counted, shorten


def test_counts_have_the_right_number() -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert counted(1, "class", "classes") == "1 class"
    assert counted(3, "image is", "images are") == "3 images are"


def test_long_lists_are_shortened() -> None:
    assert shorten(["a", "b"], 2) == "a, b"
    assert shorten(["a", "b", "c", "d"], 2) == "a, b and 2 more"
