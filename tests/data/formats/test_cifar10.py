"""CIFAR-10 in six formats: the same images in the same order, the same results of killed runs, the same accuracy.

    CIFAR10=FOLDER python -m pytest -m slow tests/data/formats/test_cifar10.py

The folder holds `train/<class>/*` and `val/<class>/*`. All images are read in order and evaluated; runs are killed on a
part.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.build import open_dataset, train_sampler
from data.samplers import Draw
from tests.data.formats.writers import WRITERS, write_shards
from tests.data.samples import small_config
from tests.launched import Trial, first_difference, run_forked

FOLDERS = Path(os.environ.get("CIFAR10", "nowhere")).absolute()
KINDS = ("csv", "tar", "shards", "parquet", "huggingface")
MICRO_BATCH = 300  # of 1, 2 and 3 processes
RUN = {"train": 30, "val": 10}  # images of each class in the runs that are killed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("serial"),
    pytest.mark.skipif(not FOLDERS.is_dir(), reason="the variable CIFAR10 names no folder"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `part`, class folders of a part of the images."""
    root = tmp_path_factory.mktemp("cifar10")
    for split, count in RUN.items():
        for folder in (FOLDERS / split).iterdir():
            (root / "part" / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, root / "part" / split / folder.name)
    return root


def write(kind: str, folders: Path, root: Path) -> dict:
    """Write class folders in a format and return the options that open it."""
    if kind == "folders":
        return {"DATASET": "imagenet", "DATA_PATH": str(folders)}
    name, writer = WRITERS[kind]
    if not root.exists():
        write_shards(folders, root, size=1000) if kind == "shards" else writer(folders, root)
    return {"DATASET": name, "DATA_PATH": str(root)}


@pytest.fixture
def cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


def epoch(data: dict, processes: int) -> tuple[list[Draw], str]:
    """Return the images that an epoch draws on all processes, in order, and a checksum of their files and labels."""
    config = small_config(Path(data["DATA_PATH"]), **data, BATCH_SIZE=MICRO_BATCH // processes)
    source = open_dataset(config, ("train",)).train
    samplers = [train_sampler(config, len(source), rank=rank, world_size=processes) for rank in range(processes)]
    shares = [np.reshape(list(sampler), (-1, config.DATA.BATCH_SIZE, 3)) for sampler in samplers]
    draws = [Draw(*draw) for draw in np.concatenate(shares, axis=1).reshape(-1, 3).tolist()]
    checksum = hashlib.sha256()
    for draw in draws:
        checksum.update(source.get(draw.index).data + bytes([source.label(draw.index)]))
    return draws, checksum.hexdigest()


@pytest.fixture(scope="module")
def expected(place: Path) -> tuple[list[Draw], str]:
    return epoch(write("folders", FOLDERS, place), 1)


@pytest.mark.parametrize("kind", ["folders", *KINDS])
def test_an_epoch_is_the_same_in_every_format_on_1_2_and_3_processes(
    kind: str, place: Path, expected: tuple[list[Draw], str], cache: None
) -> None:
    draws, _ = expected
    images = sum(1 for _ in FOLDERS.glob("train/*/*"))
    assert len({draw.index for draw in draws}) == len(draws) == images - images % MICRO_BATCH
    for processes in (1, 2, 3):
        assert epoch(write(kind, FOLDERS, place / kind), processes) == expected


def trial(folder: Path, data: dict) -> Trial:
    return Trial(folder, 1, 0, DATA={**data, "BATCH_SIZE": 12, "NUM_WORKERS": 0})


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[dict, Path]:
    """Return the outcome of an uninterrupted run, and its checkpoint."""
    whole = trial(place / "whole", write("folders", place / "part", place))
    return whole.finish(), whole.folder / "best.pth"


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_bit_for_bit_like_one_on_folders(
    kind: str, place: Path, trained: tuple[dict, Path], cache: None
) -> None:
    killed = trial(place / f"killed-{kind}", write(kind, place / "part", place / f"part-{kind}"))
    assert first_difference(trained[0], killed.finish_killed()) is None


def test_evaluation_gives_the_same_digits(place: Path, trained: tuple[dict, Path], cache: None) -> None:
    found = {}
    for kind in ("folders", *KINDS):
        data = write(kind, FOLDERS, place / kind)
        words = ["--cfg", trial(place / f"evaluated-{kind}", data).words[1], "--eval", "--resume", trained[1]]
        for processes in (1, 2, 3) if kind == "folders" else (1,):
            printed = run_forked(*words, processes=processes)
            found[kind, processes] = re.findall(r" \* .*|Accuracy of the network.*", printed)
    assert len(found["folders", 1]) == 3
    assert {tuple(lines) for lines in found.values()} == {tuple(found["folders", 1])}, found
    print("\n".join(found["folders", 1]))
