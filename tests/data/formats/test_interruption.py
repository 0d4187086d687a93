"""In every format, a run killed in mid-epoch ends like an uninterrupted run on class folders."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.formats.writers import WRITERS, idx, images
from tests.launched import Trial, Uninterrupted, first_difference, outcome, whole_and_killed

pytestmark = pytest.mark.xdist_group("resume")


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in WRITERS if kind != "shards"]


@pytest.mark.parametrize("kind", ["shards", *SLOW])
def test_a_kill_in_mid_epoch_changes_nothing(kind: str, tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    expected, _ = uninterrupted.of(1)
    photos = Trial(tmp_path / "folders", 1, 0).images
    name, write = WRITERS[kind]
    data = {"DATASET": name, "DATA_PATH": str(write(photos, tmp_path / kind)), "BATCH_SIZE": 12, "NUM_WORKERS": 0}
    trial = Trial(tmp_path / "trial", 1, 0, DATA=data)
    left = trial.finish_killed(XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert first_difference(expected, left) is None


def write_cifar10(photos: Path, root: Path) -> None:
    """Write photos of 32 x 32 pixels as CIFAR-10 is published."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
    for split, names in batches.items():
        rows = list(images(photos, split))
        for name, numbers in zip(names, np.array_split(np.arange(len(rows)), len(names)), strict=True):
            pixels = [np.asarray(Image.open(rows[number][0])).transpose(2, 0, 1).ravel() for number in numbers]
            content = {"data": np.stack(pixels), "labels": [rows[number][2] for number in numbers]}
            (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(number) for number in range(10)]}))


def write_mnist(photos: Path, root: Path) -> None:
    """Write photos, in grey, as MNIST is published."""
    root.mkdir()
    for split, prefix in (("train", "train"), ("val", "t10k")):
        rows = list(images(photos, split))
        pixels = np.stack([np.asarray(Image.open(path).convert("L")) for path, *_ in rows])
        (root / f"{prefix}-images-idx3-ubyte").write_bytes(idx(pixels))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.array([row[2] for row in rows], dtype=np.uint8)))


def trust_checksums() -> None:
    """Let torchvision take files for CIFAR-10 whose checksums are not those of the published ones."""
    from torchvision.datasets import cifar

    cifar.check_integrity = lambda *_: True


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cifar10", "mnist"])
def test_a_kill_changes_nothing_on_files_as_published(kind: str, tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    write = {"cifar10": write_cifar10, "mnist": write_mnist}[kind]
    write(Trial(tmp_path / "folders", 1, 0).images, tmp_path / kind)
    data = {"DATASET": kind, "DATA_PATH": str(tmp_path / kind), "BATCH_SIZE": 12, "NUM_WORKERS": 0}
    trial = whole_and_killed(tmp_path, 1, prepare=trust_checksums, DATA=data)
    if kind == "cifar10":  # has the pixels of the folders
        assert first_difference(uninterrupted.of(1)[0], outcome(trial.folder)) is None
