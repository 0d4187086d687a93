"""Every format gives the same data set: classes, labels, pixels and order."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from data.build import open_dataset
from data.sources import Dataset
from tests.data.formats.writers import WRITERS
from tests.data.samples import build_train_loader, small_config, write_folder

LAYOUT = {"train/cat": 4, "train/dog": 3, "train/emu": 3, "val/cat": 2, "val/emu": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("formats") / "photos", LAYOUT)


@pytest.fixture(scope="module", params=WRITERS)
def stored(request: pytest.FixtureRequest, photos: Path) -> tuple[str, Path]:
    """Return DATA.DATASET and the path of a copy of the photos."""
    name, write = WRITERS[request.param]
    return name, write(photos, photos.parent / request.param)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(stored: tuple[str, Path], *needs: str) -> Dataset:
    return open_dataset(small_config(stored[1], DATASET=stored[0]), needs or ("train", "val"))


def content(source: object) -> list[tuple[int, bytes]]:
    return [(source.label(index), source.read(index).tobytes()) for index in range(len(source))]


def test_format_has_the_images_of_the_folders(photos: Path, stored: tuple[str, Path]) -> None:
    folders, other = opened(("imagenet", photos)), opened(stored)
    assert other.classes == folders.classes == ["cat", "dog", "emu"]
    assert content(other.train) == content(folders.train)
    assert content(other.held_out) == content(folders.held_out)
    assert other.warnings() == folders.warnings() == ["1 of 3 classes without validation images: dog"]


def test_evaluation_without_training_assigns_the_same_labels(stored: tuple[str, Path]) -> None:
    dataset = opened(stored, "val")
    assert dataset.train is None
    assert dataset.classes == ["cat", "dog", "emu"]
    assert [dataset.held_out.label(index) for index in range(4)] == [0, 0, 2, 2]


def test_images_are_read(stored: tuple[str, Path]) -> None:
    source = opened(stored).train
    assert {source.read(index).size for index in range(len(source))} == {(48, 36)}
    assert source.get(3).name


def test_spawned_workers_get_a_copy(stored: tuple[str, Path]) -> None:
    source = opened(stored).train
    assert content(pickle.loads(pickle.dumps(source))) == content(source)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_are_those_of_the_folders(photos: Path, stored: tuple[str, Path], processes: int) -> None:
    def drawn(name: str, root: Path) -> list[list[int]]:
        config = small_config(root, DATASET=name, BATCH_SIZE=6 // processes, NUM_WORKERS=0)
        return [
            [batch.images.sum().item() for batch in build_train_loader(config, rank=rank, world_size=processes)]
            for rank in range(processes)
        ]

    assert drawn(*stored) == drawn("imagenet", photos)


def test_labels_are_numbers_of_numpy_or_python(stored: tuple[str, Path]) -> None:
    assert np.issubdtype(opened(stored).train.labels.dtype, np.integer)
