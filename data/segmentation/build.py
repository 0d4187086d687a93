"""Data sets of segmentation and their loaders, from the config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.build import (
    build_loader,
    choose_format,
    fit_shared_memory,
    mask_labels,
    on_unreadable,
    request,
    train_sampler,
)
from data.samplers import EvalSampler
from data.segmentation.coco import open_coco
from data.segmentation.datasets import MaskedImages, collate, stack
from data.segmentation.folders import open_ade20k, open_masks
from data.segmentation.scenes import open_scenes
from data.segmentation.sources import Labels, MaskedDataset, check_some
from data.segmentation.transforms import EvalTransform, TrainTransform
from data.sources import Request

FORMATS: Mapping[str, Callable[[Request, Labels], MaskedDataset]] = {
    "ade20k": open_ade20k,
    "masks": open_masks,
    "coco": open_coco,
    "digit_scenes": open_scenes,
}


def open_dataset(config: CfgNode, needs: Sequence[str] = ("train", "val")) -> MaskedDataset:
    """Open the data set of the config, and check a few of its masks.

    Args:
        config: the options of the run.
        needs: the splits to open: `("val",)` if there is no training.

    Raises:
        ValueError: DATA.DATASET is unknown, the data path is missing or has a wrong layout, or a mask has another size
            than its image or an unknown label.
    """
    dataset = choose_format(config, FORMATS)(request(config, needs), mask_labels(config))
    check_some(dataset)
    return dataset


def build_train_loader(config: CfgNode, dataset: MaskedDataset, *, rank: int, world_size: int) -> DataLoader:
    """Return the loader of this rank's batches of `dataset.train`; its `sampler` is a `TrainSampler`.

    Raises:
        ValueError: the data set is smaller than one update.
    """
    options = config.SEGMENTATION
    transform = TrainTransform(
        config.image_size,
        scale=options.SCALE,
        largest_share=options.LARGEST_SHARE,
        hflip=config.AUG.HFLIP,
        photometric=options.PHOTOMETRIC,
    )
    unreadable = on_unreadable(config, training=True)
    images = MaskedImages(dataset.train, transform, seed=config.SEED, on_unreadable=unreadable)
    sampler = train_sampler(config, len(images), rank=rank, world_size=world_size)
    return build_loader(config, images, sampler, fit_shared_memory(config, config.image_size, stack))


def build_eval_loader(config: CfgNode, dataset: MaskedDataset, *, rank: int, world_size: int) -> DataLoader:
    """Return the loader of this rank's share of `dataset.held_out` at all scales; its `sampler` is an `EvalSampler`."""
    unreadable, scales = on_unreadable(config, training=False), config.SEGMENTATION.TEST_SCALES
    transform = EvalTransform(config.image_size, scales)
    images = MaskedImages(dataset.held_out, transform, seed=config.SEED, on_unreadable=unreadable)
    sampler = EvalSampler(len(images), rank=rank, world_size=world_size)
    return build_loader(config, images, sampler, fit_shared_memory(config, largest_sample(config), collate))


def largest_sample(config: CfgNode) -> tuple[int, int]:
    """Return height and width of an image with as many pixels as the largest sample: a held-out image at all scales."""
    factor = max(1.0, math.hypot(*config.SEGMENTATION.TEST_SCALES))
    height, width = (math.ceil(factor * side) for side in config.image_size)
    return height, width
