"""The example that writes CIFAR-10 as files in class folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

from data.formats.published import open_cifar10
from data.sources import Request
from examples.cifar10_folders import write_folders
from tests.data.formats.writers import write_cifar10


def test_the_first_images_of_each_class_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    write_folders(str(tmp_path), tmp_path / "folders", train=1, val=2)
    original = CIFAR10(str(tmp_path), train=True)
    files = sorted((tmp_path / "folders" / "train").glob("*/*"))
    assert [file.parent.name for file in files] == [original.classes[label] for label in sorted(set(original.targets))]
    image, _ = original[original.targets.index(min(original.targets))]
    image.save(tmp_path / "first.jpg")
    assert files[0].read_bytes() == (tmp_path / "first.jpg").read_bytes()
    counts = Counter(CIFAR10(str(tmp_path), train=False).targets)
    dataset = open_cifar10(Request(path=str(tmp_path / "folders")))
    assert len(dataset.held_out) == sum(min(count, 2) for count in counts.values())
