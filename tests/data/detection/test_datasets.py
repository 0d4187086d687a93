"""Detection samples, and the handling of unreadable images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.build import loader_warnings
from data.datasets import PipedCollate
from data.detection.build import build_eval_loader, build_train_loader, largest_image, largest_sample, open_dataset
from data.detection.coco import open_coco
from data.detection.datasets import EvalSamples, TrainSamples
from data.detection.transforms import EvalTransform, TrainTransform
from data.images import UnreadableImage
from data.samplers import Draw
from data.sources import Request
from tests.data.detection.samples import write_coco
from tests.data.samples import small_config


def damage(root: Path, part: str) -> list[str]:
    """Make three images unreadable: one of no image, one of another size, one that is missing."""
    paths = [root / part / f"{number}.png" for number in range(3)]
    paths[0].write_bytes(b"no image")
    Image.new("RGB", (40, 30)).save(paths[1])
    paths[2].unlink()
    return list(map(str, paths))


def test_held_out_images_that_cannot_be_read_are_marked_or_raise(tmp_path: Path) -> None:
    damaged = damage(write_coco(tmp_path), "val")
    source, transform = open_coco(Request(path=str(tmp_path))).held_out, EvalTransform(short_side=32, long_side=64)
    samples = EvalSamples(source, transform, on_unreadable="mark")
    for index, path in enumerate(damaged):
        marked = samples[Draw(index, 0)]
        assert (marked.unreadable, marked.target["size"].tolist()) == ([path], [0, 0])
    assert samples[Draw(3, 0)].target["size"].tolist() == [32, 40]
    with pytest.raises(UnreadableImage, match=r"1\.png' is 40 x 30 pixels, its annotations say 40 x 32"):
        EvalSamples(source, transform, on_unreadable="raise")[Draw(1, 0)]


def test_training_images_that_cannot_be_read_are_substituted(tmp_path: Path) -> None:
    damaged = damage(write_coco(tmp_path), "train")
    transform = TrainTransform(short_sides=[32], long_side=64, crop_sides=[], crop=[32, 32], hflip=0.0)
    source = open_coco(Request(path=str(tmp_path))).train
    samples = TrainSamples(source, transform, masks=True, seed=0, on_unreadable="substitute")
    for index, path in enumerate(damaged):
        sample = samples[Draw(index, 0)]
        assert sample.unreadable[0] == path
        assert len(sample.target["labels"]) == len(sample.target["masks"]) == 2


def test_batches_that_exceed_shared_memory_go_through_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(write_coco(tmp_path), DATASET="coco", NUM_WORKERS=1)
    config.DETECTION.SHORT_SIDES, config.DETECTION.TEST_SHORT_SIDE, config.DETECTION.LONG_SIDE = [48], 48, 60
    dataset = open_dataset(config, ("train", "val"))
    images = 4 * 4 * 48 * 60 * 4  # four batches of four images, larger than DATA.IMG_SIZE
    masks = images * 6 // 4  # two objects each, without the crowd
    assert largest_sample(config, dataset.train) == (72, 60)
    batches = []
    for free in (masks, masks - 1, images - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        assert len(loader_warnings(config, largest_image(config))) == (free < images)
        assert len(loader_warnings(config, largest_sample(config, dataset.train))) == (free < masks)
        loaders = {
            masks: build_train_loader(config, dataset, masks=True, rank=0, world_size=1),
            images: build_eval_loader(config, dataset, rank=0, world_size=1),
        }
        assert all(isinstance(loader.collate_fn, PipedCollate) == (free < needed) for needed, loader in loaders.items())
        batches.append([batch for loader in loaders.values() for batch in loader])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, images))
    boxes = build_train_loader(config, dataset, masks=False, rank=0, world_size=1)
    assert not isinstance(boxes.collate_fn, PipedCollate)
    for (images, targets, _), (others, other_targets, _) in zip(batches[0], batches[2], strict=True):
        assert all(map(torch.equal, images, others))
        assert all(torch.equal(a[name], b[name]) for a, b in zip(targets, other_targets, strict=True) for name in a)
