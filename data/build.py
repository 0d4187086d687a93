"""Data sets, loaders and mixup as the config asks for them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import Mixup
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.datasets import TransformedImages, collate
from data.formats import FORMATS
from data.samplers import EvalSampler, TrainSampler
from data.sources import PARTS, Dataset, Request
from data.transforms import eval_transform, train_transform
from data.workers import leave_signals_to_parent

# More are taken for a slip; fewer are cut to the number of cores, which the default may exceed.
WORKERS_PER_CORE = 8


def open_dataset(config: CfgNode, needs: Sequence[str] = ("train", "val")) -> Dataset:
    """Open the data set that the config names: its classes are known and its images listed, none is opened.

    Args:
        config: the options of the run.
        needs: the parts that are needed: `("val",)` where there is no training.

    Raises:
        ValueError: for an unknown DATA.DATASET, and a data path that is missing or not laid out as it should be.
    """
    name = config.DATA.DATASET
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"DATA.DATASET must be one of {', '.join(FORMATS)}, not {name!r}{hint}")
    dataset = FORMATS[name](_request(config, needs))
    if not config.DATA.ALLOW_LARGER_VAL:
        dataset.check_parts()
    return dataset.by_number() if config.DATA.CLASS_ORDER == "number" else dataset


def build_train_loader(config: CfgNode, dataset: Dataset, *, rank: int, world_size: int) -> DataLoader:
    """Return the loader of this rank's batches of `dataset.train`; its `sampler` is a `TrainSampler`.

    Raises:
        ValueError: for a data set smaller than one update, and for more workers than the machine can feed.
    """
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
        len(dataset.train),
        batch_size=config.DATA.BATCH_SIZE,
        rank=rank,
        world_size=world_size,
        seed=config.SEED,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
    )
    images = TransformedImages(dataset.train, transform, seed=config.SEED, on_unreadable=on_unreadable)
    return _build_loader(config, images, sampler)


def build_eval_loader(config: CfgNode, dataset: Dataset, *, rank: int, world_size: int) -> DataLoader:
    """Return the loader of this rank's share of `dataset.held_out`; its `sampler` is an `EvalSampler`.

    Raises:
        ValueError: for more workers than the machine can feed.
    """
    transform = eval_transform(config.DATA.IMG_SIZE, interpolation=config.DATA.INTERPOLATION, crop=config.TEST.CROP)
    on_unreadable = "mark" if config.DATA.BAD_IMAGES == "skip" else "raise"
    sampler = EvalSampler(len(dataset.held_out), rank=rank, world_size=world_size)
    images = TransformedImages(dataset.held_out, transform, seed=config.SEED, on_unreadable=on_unreadable)
    return _build_loader(config, images, sampler)


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


def _request(config: CfgNode, needs: Sequence[str]) -> Request:
    data = config.DATA
    swapped = {"train": set(PARTS["val"]), "val": set(PARTS["train"])}
    for part, name in (("train", data.TRAIN), ("val", data.VAL)):
        if Path(name).name.partition(".")[0] in swapped[part]:
            raise ValueError(f"DATA.{part.upper()} {name}: the parts seem swapped; exchange DATA.TRAIN and DATA.VAL")
    return Request(
        path=data.DATA_PATH,
        path_by_variable=os.environ.get("DATA_PATH", ""),
        needs=needs,
        train=data.TRAIN,
        val=data.VAL,
        turn=data.EXIF == "apply",
        multi_label=data.MULTI_LABEL,
        image_column=data.IMAGE_COLUMN,
        label_column=data.LABEL_COLUMN,
        download=data.DOWNLOAD,
    )


def _build_loader(config: CfgNode, images: TransformedImages, sampler: TrainSampler | EvalSampler) -> DataLoader:
    cores = os.cpu_count() or 1
    most = WORKERS_PER_CORE * cores
    if most < config.DATA.NUM_WORKERS:
        raise ValueError(
            f"DATA.NUM_WORKERS must be at most {most} on this machine, {WORKERS_PER_CORE} for each core, not "
            f"{config.DATA.NUM_WORKERS}; one for each core that a training process has is enough"
        )
    return DataLoader(
        images,
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
