"""Data sets, loaders and mixup as the config asks for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import Mixup
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data import digits
from data.datasets import ImageSource, TransformedImages, collate
from data.folders import LAYOUT, ImageFolder, class_folders, find_classes
from data.samplers import EvalSampler, TrainSampler
from data.transforms import eval_transform, train_transform
from data.workers import leave_signals_to_parent

# More are taken for a slip; fewer are cut to the number of cores, which the default may exceed.
WORKERS_PER_CORE = 8


def class_names(config: CfgNode, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """Check the layout of the data set, without opening its images, and return the names of its classes by label.

    Args:
        config: the options of the run.
        splits: those that are needed: `("val",)` where there is no training.

    Raises:
        ValueError: for a data path that is missing or not laid out as it should be.
    """
    if config.DATA.DATASET == "digits":
        if config.DATA.DATA_PATH:
            raise ValueError(
                "the digits are a data set of their own, without --data-path; "
                "to use folders with this config, add --opts DATA.DATASET imagenet"
            )
        return digits.CLASSES
    return find_classes(_root(config), splits)


def classes_not_held_out(config: CfgNode, classes: Sequence[str]) -> list[str]:
    """Return those of the classes that have no folder among the held-out images."""
    if config.DATA.DATASET == "digits":
        return []
    held_out = set(class_folders(_root(config) / "val"))
    return [name for name in classes if name not in held_out]


def build_train_loader(config: CfgNode, *, rank: int, world_size: int) -> DataLoader:
    """Return the loader of this rank's training batches; its `sampler` is a `TrainSampler`.

    Raises:
        ValueError: for a data set that is not laid out as it should be, or smaller than one update, and for more
            workers than the machine can feed.
    """
    source = _build_source(config, "train")
    transform = train_transform(
        config.DATA.IMG_SIZE,
        interpolation=config.DATA.INTERPOLATION,
        scale=config.AUG.SCALE,
        ratio=config.AUG.RATIO,
        hflip=config.AUG.HFLIP,
        color_jitter=config.AUG.COLOR_JITTER,
        auto_augment=config.AUG.AUTO_AUGMENT,
        reprob=config.AUG.REPROB,
        remode=config.AUG.REMODE,
        recount=config.AUG.RECOUNT,
    )
    on_unreadable = "raise" if config.DATA.BAD_IMAGES == "raise" else "substitute"
    sampler = TrainSampler(
        len(source),
        batch_size=config.DATA.BATCH_SIZE,
        rank=rank,
        world_size=world_size,
        seed=config.SEED,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
    )
    dataset = TransformedImages(source, transform, seed=config.SEED, on_unreadable=on_unreadable)
    return _build_loader(config, dataset, sampler)


def build_eval_loader(config: CfgNode, *, rank: int, world_size: int) -> DataLoader:
    """Return the loader of this rank's share of the validation images; its `sampler` is an `EvalSampler`.

    Raises:
        ValueError: for a data set that is not laid out as it should be, and for more workers than the machine can feed.
    """
    source = _build_source(config, "val")
    transform = eval_transform(config.DATA.IMG_SIZE, interpolation=config.DATA.INTERPOLATION, crop=config.TEST.CROP)
    on_unreadable = "mark" if config.DATA.BAD_IMAGES == "skip" else "raise"
    sampler = EvalSampler(len(source), rank=rank, world_size=world_size)
    dataset = TransformedImages(source, transform, seed=config.SEED, on_unreadable=on_unreadable)
    return _build_loader(config, dataset, sampler)


def build_mixup(config: CfgNode, num_classes: int) -> Mixup | None:
    """Return mixup and cutmix with smoothed targets, or None where both are off.

    Raises:
        ValueError: for a batch size that is odd: images are mixed in pairs.
    """
    aug = config.AUG
    if not aug.MIXUP_PROB or not (aug.MIXUP or aug.CUTMIX):
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise ValueError(
            f"DATA.BATCH_SIZE must be even for mixup and cutmix, not {config.DATA.BATCH_SIZE}; change it, or switch "
            f"them off by AUG.MIXUP 0 AUG.CUTMIX 0"
        )
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=num_classes,
    )


def _build_source(config: CfgNode, split: str) -> ImageSource:
    if config.DATA.DATASET == "digits":
        return digits.Digits(train=split == "train")
    return ImageFolder(_root(config) / split, class_names(config, (split,)))


def _build_loader(config: CfgNode, dataset: TransformedImages, sampler: TrainSampler | EvalSampler) -> DataLoader:
    cores = os.cpu_count() or 1
    most = WORKERS_PER_CORE * cores
    if most < config.DATA.NUM_WORKERS:
        raise ValueError(
            f"DATA.NUM_WORKERS must be at most {most} on this machine, {WORKERS_PER_CORE} for each core, not "
            f"{config.DATA.NUM_WORKERS}; one for each core that a training process has is enough"
        )
    return DataLoader(
        dataset,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=min(config.DATA.NUM_WORKERS, cores),
        collate_fn=collate,
        # Pinning opens a context on the GPU, where a run on another device has no business.
        pin_memory=config.DATA.PIN_MEMORY and config.DEVICE in ("", "cuda") and torch.cuda.is_available(),
        drop_last=isinstance(sampler, TrainSampler),
        worker_init_fn=leave_signals_to_parent,
        persistent_workers=config.DATA.NUM_WORKERS > 0,
        # Without its own, a loader takes a number from the global generator whenever it is iterated.
        generator=torch.Generator(),
    )


def _root(config: CfgNode) -> Path:
    path = config.DATA.DATA_PATH or os.environ.get("DATA_PATH")
    if not path:
        raise ValueError(f"no data set given; pass --data-path FOLDER or set the variable DATA_PATH; {LAYOUT}")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"data path {path}: there is no such user; write the folder in full") from None
