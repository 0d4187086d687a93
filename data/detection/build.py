"""Data sets and loaders of detection from the config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.build import (
    PIXEL,
    build_loader,
    choose_format,
    fit_shared_memory,
    mask_labels,
    on_unreadable,
    request,
    train_sampler,
)
from data.detection.coco import open_coco
from data.detection.datasets import EvalSamples, TrainSamples, collate
from data.detection.digit_scenes import open_digit_scenes
from data.detection.sources import DetectionDataset, DetectionSource
from data.detection.transforms import EvalTransform, TrainTransform
from data.detection.voc import open_voc
from data.detection.yolo import open_yolo
from data.samplers import EvalSampler
from data.sources import Request

FORMATS: Mapping[str, Callable[[Request], DetectionDataset]] = {
    "digit_scenes": open_digit_scenes,
    "coco": open_coco,
    "voc": open_voc,
    "yolo": open_yolo,
}


def open_dataset(config: CfgNode, needs: Sequence[str]) -> DetectionDataset:
    """Open the data set of the config; no image is opened yet.

    Args:
        config: the options of the run.
        needs: the splits to open, of "train" and "val".

    Raises:
        ValueError: DATA.DATASET is unknown, an option is of another task, or the data path is missing or has a wrong
            layout.
    """
    mask_labels(config).check_unmapped(f"TASK {config.TASK}")
    return choose_format(config, FORMATS)(request(config, needs))


def build_train_loader(
    config: CfgNode, dataset: DetectionDataset, *, masks: bool, rank: int, world_size: int
) -> DataLoader:
    """Return the loader of this rank's training batches; its `sampler` is a `TrainSampler`.

    Raises:
        ValueError: the data set is smaller than one update.
    """
    options = config.DETECTION
    transform = TrainTransform(
        short_sides=options.SHORT_SIDES,
        long_side=options.LONG_SIDE,
        crop_sides=options.CROP_SIDES,
        crop=options.CROP,
        hflip=config.AUG.HFLIP,
    )
    unreadable = on_unreadable(config, training=True)
    samples = TrainSamples(dataset.train, transform, masks=masks, seed=config.SEED, on_unreadable=unreadable)
    sampler = train_sampler(config, len(samples), rank=rank, world_size=world_size)
    size = largest_sample(config, dataset.train) if masks else largest_image(config)
    return build_loader(config, samples, sampler, fit_shared_memory(config, size, collate))


def build_eval_loader(config: CfgNode, dataset: DetectionDataset, *, rank: int, world_size: int) -> DataLoader:
    """Return the loader of this rank's share of the held-out images; its `sampler` is an `EvalSampler`."""
    transform = EvalTransform(short_side=config.DETECTION.TEST_SHORT_SIDE, long_side=config.DETECTION.LONG_SIDE)
    samples = EvalSamples(dataset.held_out, transform, on_unreadable=on_unreadable(config, training=False))
    sampler = EvalSampler(len(samples), rank=rank, world_size=world_size)
    return build_loader(config, samples, sampler, fit_shared_memory(config, largest_image(config), collate))


def largest_image(config: CfgNode) -> tuple[int, int]:
    """Return the largest height and width of the images of a batch, without masks."""
    options = config.DETECTION
    return min(max([*options.SHORT_SIDES, options.TEST_SHORT_SIDE]), options.LONG_SIDE), options.LONG_SIDE


def largest_sample(config: CfgNode, source: DetectionSource) -> tuple[int, int]:
    """Return height and width of an image with as many bytes as the largest image with masks of many objects."""
    height, width = largest_image(config)
    return math.ceil(height * (1 + source.many() / PIXEL)), width  # masks have a byte a pixel
