"""Classes by name, and what a checkpoint knows of them."""

from __future__ import annotations

from tasks.classification import class_changes


def test_classes_are_known_by_name() -> None:
    assert class_changes({}, ["cat", "dog"]) == class_changes({"classes": ["cat", "dog"]}, ["cat", "dog"]) == []
    assert class_changes({"classes": ["cat", "dog"]}, ["ape", "dog"]) == ["class 0: 'cat' in the checkpoint, 'ape' now"]
