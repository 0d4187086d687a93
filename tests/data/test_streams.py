"""Shards from commands: guarantees and error messages."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

from data.datasets import Batch
from data.images import UnreadableImage, UnusableImage
from tests.data.formats.writers import add_bytes, write_shards
from tests.data.samples import build_eval_loader, build_train_loader, small_config, write_folder
from tests.launched import Job, run_forked
from tests.runs import write_config
from training.exit_status import FAILED
from training.report.page import write_report

LAYOUT = {"train/cat": 6, "train/dog": 6, "val/cat": 4, "val/dog": 3}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of three training images, three shards of at most three held-out ones."""
    root = tmp_path_factory.mktemp("streams")
    return write_shards(write_folder(root / "photos", LAYOUT), root / "shards")


def stream_options(root: Path) -> dict:
    return {
        "DATASET": "webdataset",
        "DATA_PATH": str(root),
        "TRAIN": f"pipe:cat {root}/train-{{000000..000003}}.tar",
        "VAL": f"pipe:cat {root}/val-{{000000..000002}}.tar",
        "STREAM": CfgNode({"IMAGES": 12, "VAL_IMAGES": 7, "SHUFFLE": 4}),
    }


def stream_config(root: Path, **data: object) -> CfgNode:
    return small_config(root, **{**stream_options(root), "BATCH_SIZE": 2, **data})


def training(config: CfgNode, epoch: int = 0, start: int = 0, *, rank: int = 0, world_size: int = 1) -> list[Batch]:
    loader = build_train_loader(config, rank=rank, world_size=world_size)
    loader.sampler.set_position(epoch, start)
    return list(loader)


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (4, 0)])
def test_evaluation_takes_each_image_once(shards: Path, world_size: int, workers: int) -> None:
    def images(config: CfgNode, world_size: int) -> list[tuple[int, int]]:
        loaders = [build_eval_loader(config, rank=rank, world_size=world_size) for rank in range(world_size)]
        batches = [batch for loader in loaders for batch in loader]
        return sorted(
            (int(image.sum()), target)
            for batch in batches
            for image, target in zip(batch.images.int(), batch.targets.tolist(), strict=True)
        )

    indexed = images(small_config(shards, DATASET="tar", BATCH_SIZE=2), 1)
    assert len(indexed) == 7
    assert images(stream_config(shards, NUM_WORKERS=workers), world_size) == indexed


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_repeatable_and_continues_at_its_update(shards: Path, workers: int) -> None:
    config = stream_config(shards, NUM_WORKERS=workers)
    whole = training(config, epoch=1)
    assert [len(batch.images) for batch in whole] == [2] * 6
    assert equal(training(config, epoch=1), whole)
    assert not equal(training(config, epoch=2), whole)
    assert equal(training(config, epoch=1, start=6), whole[3:])


def test_an_epoch_of_one_process_takes_each_image_once(shards: Path) -> None:
    config = stream_config(shards)
    config.AUG.SCALE, config.AUG.RATIO, config.AUG.HFLIP, config.AUG.AUTO_AUGMENT = [1.0, 1.0], [1.0, 1.0], 0.0, ""
    config.AUG.COLOR_JITTER = 0.0
    assert len({int(image.sum()) for batch in training(config) for image in batch.images.int()}) == 12


def test_processes_divide_the_shards_and_repeat_them(shards: Path) -> None:
    config = stream_config(shards)
    config.DATA.STREAM.IMAGES = 24  # twice what there is
    halves = [training(config, rank=rank, world_size=2) for rank in range(2)]
    assert [len(half) for half in halves] == [6, 6]
    assert not equal(*halves)


def test_unreadable_image_is_replaced_by_another_of_the_batch(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos", LAYOUT)
    (photos / "train/cat/2.jpg").write_bytes(b"no image")
    config = stream_config(write_shards(photos, tmp_path / "shards"), BATCH_SIZE=4)
    batches = training(config)
    assert [len(batch.images) for batch in batches] == [4] * 3
    (name,) = {name for batch in batches for name in batch.unreadable}
    assert name.endswith("train-000000.tar/00000002.jpg")
    config.DATA.BAD_IMAGES = "raise"
    with pytest.raises(UnreadableImage, match=r"00000002.jpg': cannot identify image file"):
        training(config)


def test_unreadable_image_of_a_batch_of_one_is_replaced_by_one_that_follows(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos", LAYOUT)
    for number in (1, 2):
        (photos / f"train/cat/{number}.jpg").write_bytes(b"no image")
    root = write_shards(photos, tmp_path / "shards")
    config = stream_config(root, BATCH_SIZE=1)
    batches = training(config)
    assert [len(batch.images) for batch in batches] == [1] * 12
    assert sorted(name.rpartition("/")[2] for batch in batches for name in batch.unreadable) == [
        "00000001.jpg",
        "00000002.jpg",
    ]
    assert equal(training(config, start=5), batches[5:])


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("pipe:cat {root}/nothing.tar", "the command ended with status 1"),
        *((f"pipe:head -c {size} {{root}}/train-000000.tar", "unexpected end of data") for size in (1000, 3000, 3072)),
        ("pipe:cat {root}/train-000000.tar; exit 3", "the command ended with status 3"),
        ("{root}/nothing.tar", "No such file or directory"),
        ("pipe:tar c --files-from /dev/null", "is empty"),
    ],
)
def test_a_command_that_fails(shards: Path, command: str, says: str) -> None:
    config = stream_config(shards, TRAIN=command.format(root=shards))
    with pytest.raises(OSError, match=rf"^shard \S.* {says}$"):
        training(config)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"TRAIN": ""}, r"^DATA\.DATASET webdataset needs DATA\.TRAIN; DATA_PATH is a folder with classes\.txt"),
        (
            {"STREAM": CfgNode({"IMAGES": 0, "VAL_IMAGES": 0})},
            r"the number of images of a stream is unknown; set DATA\.STREAM\.IMAGES$",
        ),
        ({"DATA_PATH": "nowhere"}, r"^data path nowhere does not exist; "),
        ({"BALANCE": "loss"}, r"^DATA\.BALANCE loss needs random access, which a stream does not have; leave it at"),
        ({"CACHE": True}, r"^DATA\.CACHE True needs random access"),
    ],
)
def test_options_that_do_not_match(shards: Path, data: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_train_loader(stream_config(shards, **data), rank=0, world_size=1)


def test_label_lists_by_file_name_do_not_match(shards: Path) -> None:
    config = stream_config(shards)
    config.TEST.LABELS = "real.json"
    with pytest.raises(ValueError, match=r"^TEST\.LABELS real\.json needs random access, .* not have; remove it$"):
        build_eval_loader(config, rank=0, world_size=1)


def test_fewer_shards_than_processes(shards: Path) -> None:
    config = stream_config(shards, TRAIN=f"pipe:cat {shards}/train-000000.tar")
    with pytest.raises(ValueError, match=r"^DATA\.TRAIN has 1 shard for 2 processes, each of which needs one"):
        build_train_loader(config, rank=0, world_size=2)


def test_labels_by_name_and_in_numbers(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\n")
    config = stream_config(shards, DATA_PATH=str(tmp_path))
    with pytest.raises(UnusableImage, match=r"\d\.jpg': label '1' is out of range; classes\.txt has 1 class"):
        training(config)
    (tmp_path / "classes.txt").write_text("10\n2\n")
    config.DATA.CLASS_ORDER = "number"
    assert np.unique(np.concatenate([batch.targets for batch in training(config)])).tolist() == [0, 1]


def test_number_that_is_both_a_name_and_a_position(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("1\n0\n")
    config = stream_config(shards, DATA_PATH=str(tmp_path))
    with pytest.raises(UnusableImage, match=r"\d\.jpg': label '[01]' is the name of a class and the position of anoth"):
        training(config)
    (tmp_path / "shards.json").write_text('{"shards": []}')  # of tools/make_shards.py, which writes positions
    assert np.unique(np.concatenate([batch.targets for batch in training(config)])).tolist() == [0, 1]


def test_shard_without_images(tmp_path: Path) -> None:
    """The names have a second dot, which is why they have none; without an error they would be read forever."""
    with tarfile.open(tmp_path / "train-000000.tar", "w") as archive:
        for name in ("img_0.1.jpg", "img_0.1.cls"):
            add_bytes(archive, name, b"0")
    (tmp_path / "classes.txt").write_text("cat\n")
    config = stream_config(tmp_path, TRAIN=f"{tmp_path}/train-000000.tar")
    says = (
        rf"^shard {tmp_path}/train-000000\.tar has no image: its first sample is img_0\.1\.jpg, img_0\.1\.cls; the "
        r"extension begins at the first dot of a name, and that of an image is \.jpg, \.png or another of the \d+ that"
    )
    with pytest.raises(OSError, match=says):
        training(config)


@pytest.mark.parametrize(
    ("classes", "images", "says"),
    [
        ("dog\n", 7, ".*jpg': label '1' is out of range; classes.txt has 1 class, labels are"),
        ("cat\ndog\n", 9, r"evaluated 7 images of a data set of 9 \(DATA\.STREAM\.VAL_IMAGES, if it is a stream"),
    ],
)
def test_run_on_a_stream_with_a_wrong_description(
    shards: Path, tmp_path: Path, classes: str, images: int, says: str
) -> None:
    (tmp_path / "classes.txt").write_text(classes)
    stream = {"STREAM": {"IMAGES": 12, "VAL_IMAGES": images}, "DATA_PATH": str(tmp_path)}
    data = {**stream_options(shards), **stream, "BATCH_SIZE": 2, "NUM_WORKERS": 1}
    config = write_config(tmp_path, OUTPUT=str(tmp_path), DATA=data, TRAIN={"EPOCHS": 1})
    job = Job(("--cfg", config), tmp_path / "console.txt")
    assert job.wait(240) == [FAILED]
    assert re.search(says, job.console())
    assert "Traceback" not in job.console()


@pytest.mark.xdist_group("resume")
def test_run_on_a_stream_warns_that_it_is_approximate(shards: Path, tmp_path: Path) -> None:
    data = {**stream_options(shards), "STREAM": {"IMAGES": 12, "VAL_IMAGES": 7}, "BATCH_SIZE": 2, "NUM_WORKERS": 1}
    config = write_config(tmp_path, OUTPUT=str(tmp_path), DATA=data, TRAIN={"EPOCHS": 1})
    printed = run_forked("--cfg", config, processes=2)
    assert "an epoch is 12 images (DATA.STREAM.IMAGES), some may appear twice and others not at all" in printed
    assert "Accuracy of the network on the 7 test images" in printed
    folder = tmp_path / "tiny/default"
    options = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(options.replace("pipe:cat", f"pipe:touch {tmp_path}/victim; cat"))
    assert write_report(folder, torch.device("cpu")).is_file()
    assert not (tmp_path / "victim").exists()
