"""Data sets, loaders and mixup as the config asks for them."""

from __future__ import annotations

import difflib
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from timm.data import Mixup
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.cache import CachedSource
from data.datasets import OnUnreadable, SeededSamples, TransformedImages, collate, collate_for_a_pipe
from data.formats import FORMATS
from data.formats.stream import ImageStream, open_stream
from data.samplers import EvalSampler, TrainSampler
from data.sources import PARTS, Dataset, ImageSource, Request
from data.streams import EvalBatches, Loader, StreamLoader, TrainBatches
from data.transforms import Erase, EvalTransform, TrainTransform
from data.workers import leave_signals_to_parent

F = TypeVar("F")

# Where Linux keeps what processes share; containers have 64 MiB of it by default.
SHARED_MEMORY = Path("/dev/shm")
# Batches that a worker reads ahead.
PREFETCHED = 2


def open_dataset(config: CfgNode, needs: Sequence[str] = ("train", "val")) -> Dataset:
    """Open the data set that the config names: its classes are known and its images listed, none is opened.

    Args:
        config: the options of the run.
        needs: the parts that are needed: `("val",)` where there is no training.

    Raises:
        ValueError: for an unknown DATA.DATASET, and a data path that is missing or not laid out as it should be.
    """
    open_parts = choose_format(config, FORMATS)
    if open_parts is open_stream:
        _check_stream(config)
    dataset = open_parts(request(config, needs))
    if not config.DATA.ALLOW_LARGER_VAL:
        dataset.check_parts()
    return dataset.by_number() if config.DATA.CLASS_ORDER == "number" else dataset


def choose_format(config: CfgNode, formats: Mapping[str, F]) -> F:
    """Return what opens the data set that the config names.

    Raises:
        ValueError: the task has no such format.
    """
    name = config.DATA.DATASET
    if name not in formats:
        near = difflib.get_close_matches(name, formats, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(formats)
        raise ValueError(f"DATA.DATASET must be one of {known} for TASK {config.TASK}, not {name!r}{hint}")
    return formats[name]


def on_unreadable(config: CfgNode, *, training: bool) -> OnUnreadable:
    """Return what becomes of an image that cannot be read."""
    if training:
        return "raise" if config.DATA.BAD_IMAGES == "raise" else "substitute"
    return "mark" if config.DATA.BAD_IMAGES == "skip" else "raise"


def is_stream(name: str) -> bool:
    """Return whether a DATA.DATASET gives its images one after the other, and runs commands to get them."""
    return FORMATS.get(name) is open_stream


def _check_stream(config: CfgNode) -> None:
    """Check that nothing is asked for that takes images by number.

    Raises:
        ValueError: something is.
    """
    for key, value, off in (
        ("DATA.BALANCE", config.DATA.BALANCE, "none"),
        ("DATA.CACHE", config.DATA.CACHE, False),
        ("AUG.REPEATS", config.AUG.REPEATS, 1),
    ):
        if value != off:
            raise ValueError(f"{key} {value} takes images by their number, which a stream has not; leave it at {off}")


def build_train_loader(config: CfgNode, dataset: Dataset, *, rank: int, world_size: int) -> Loader:
    """Return the loader of this rank's batches of `dataset.train`; its `sampler` is a `TrainSampler`.

    Raises:
        ValueError: for a data set smaller than one update.
    """
    aug = config.AUG
    transform = TrainTransform(
        config.image_size,
        interpolation=config.DATA.INTERPOLATION,
        crop=aug.CROP,
        padding=aug.CROP_PADDING,
        scale=aug.SCALE,
        ratio=aug.RATIO,
        hflip=aug.HFLIP,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=aug.AUTO_AUGMENT,
    )
    unreadable = {"seed": config.SEED, "on_unreadable": on_unreadable(config, training=True)}
    if isinstance(dataset.train, ImageStream):
        sampler = train_sampler(config, len(dataset.train), rank=rank, world_size=world_size)
        options = _stream_options(config, rank, world_size) | unreadable
        buffer = config.DATA.STREAM.SHUFFLE
        batches = TrainBatches(dataset.train, transform, sampler=sampler, buffer=buffer, **options)
        return _stream_loader(config, batches, sampler, world_size)
    balanced = dataset.train.labels if config.DATA.BALANCE == "sampling" else None
    sampler = train_sampler(config, len(dataset.train), rank=rank, world_size=world_size, balanced=balanced)
    source = _source(config, dataset.train, "train", rank)
    images = TransformedImages(source, transform, **unreadable)
    return build_loader(config, images, sampler, _collate(config))


def build_eval_loader(config: CfgNode, dataset: Dataset, *, rank: int, world_size: int) -> Loader:
    """Return the loader of this rank's share of `dataset.held_out`; its `sampler` is an `EvalSampler`."""
    transform = EvalTransform(
        config.image_size,
        interpolation=config.DATA.INTERPOLATION,
        crop=config.TEST.CROP,
        crop_ratio=config.TEST.CROP_RATIO,
        resize=config.TEST.RESIZE,
    )
    unreadable = {"seed": config.SEED, "on_unreadable": on_unreadable(config, training=False)}
    sampler = EvalSampler(len(dataset.held_out), rank=rank, world_size=world_size)
    if isinstance(dataset.held_out, ImageStream):
        options = _stream_options(config, rank, world_size) | unreadable
        return _stream_loader(config, EvalBatches(dataset.held_out, transform, **options), sampler, world_size)
    source = _source(config, dataset.held_out, "val", rank)
    images = TransformedImages(source, transform, **unreadable)
    return build_loader(config, images, sampler, _collate(config))


def train_sampler(
    config: CfgNode, length: int, *, rank: int, world_size: int, balanced: np.ndarray | None = None
) -> TrainSampler:
    """Return the sampler of this rank's share of `length` training samples, see there for `balanced`.

    Raises:
        ValueError: for fewer samples than an update takes.
    """
    return TrainSampler(
        length,
        batch_size=config.DATA.BATCH_SIZE,
        rank=rank,
        world_size=world_size,
        seed=config.SEED,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
        repeats=config.AUG.REPEATS,
        balanced=balanced,
    )


def _source(config: CfgNode, source: ImageSource, part: str, rank: int) -> ImageSource:
    """Return the images of a part, from memory where DATA.CACHE asks for it.

    Raises:
        ValueError: this system has no memory that is a folder.
    """
    if not config.DATA.CACHE:
        return source
    if not SHARED_MEMORY.is_dir():
        raise ValueError(f"DATA.CACHE needs {SHARED_MEMORY}, which this system does not have; leave it off")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Processes of one run and machine agree on the port of their group; a single one has itself.
    job = f"{os.environ.get('MASTER_PORT', '')}-{os.getppid()}" if processes > 1 else str(os.getpid())
    return CachedSource(source, SHARED_MEMORY, f"{job}-{part}", processes=processes, is_main=rank == 0)


def build_erasing(config: CfgNode) -> Erase | None:
    """Return random erasing of normalised batches, or None where it is off."""
    aug = config.AUG
    return Erase(aug.REPROB, mode=aug.REMODE, count=aug.RECOUNT) if aug.REPROB and aug.RECOUNT else None


def build_mixup(config: CfgNode, num_classes: int) -> Mixup | None:
    """Return mixup and cutmix with smoothed targets, or None where both are off.

    Raises:
        ValueError: for a batch size that is odd: images are mixed in pairs.
    """
    aug = config.AUG
    if not aug.MIXUP_PROB or not (aug.MIXUP or aug.CUTMIX):
        return None
    if config.DATA.MULTI_LABEL:
        raise ValueError(
            "mixup and cutmix mix single labels; switch them off for DATA.MULTI_LABEL by AUG.MIXUP 0 AUG.CUTMIX 0"
        )
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


def request(config: CfgNode, needs: Sequence[str]) -> Request:
    """Return what the data options of a run ask of a format.

    Raises:
        ValueError: the parts seem swapped.
    """
    data = config.DATA
    swapped = {"train": set(PARTS["val"]), "val": set(PARTS["train"])}
    for part, name in (("train", data.TRAIN), ("val", data.VAL)):
        if re.split(r"\.|-[\d*?{[]", Path(name).name)[0] in swapped[part]:
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
        scenes=data.SCENES,
        stream_images={"train": data.STREAM.IMAGES, "val": data.STREAM.VAL_IMAGES},
    )


def loader_doubts(config: CfgNode) -> list[str]:
    """Return where this machine cannot read images as the config asks, and what is done instead."""
    found, workers, asked = [], _workers(config), config.DATA.NUM_WORKERS
    if workers < asked:
        found.append(f"DATA.NUM_WORKERS {asked} is more than the {workers} cores here; {workers} are used")
    needed, free = _shared_memory(config)
    if needed > free:
        found.append(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, and the batches under way take {needed / 2**20:.0f} "
            "MiB: they are handed over through pipes, which is slower. Give the container more by --shm-size or "
            "--ipc=host, or take smaller batches or fewer DATA.NUM_WORKERS"
        )
    return found


def _workers(config: CfgNode) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(config.DATA.NUM_WORKERS, cores)


def _shared_memory(config: CfgNode) -> tuple[float, float]:
    """Return how many bytes the batches under way take in all processes of this machine, and how many are free."""
    if not SHARED_MEMORY.is_dir():
        return 0, math.inf  # other systems do not limit it so
    height, width = config.image_size
    batch = config.DATA.BATCH_SIZE * height * width * 3
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = _workers(config)
    return processes * batch * (PREFETCHED * workers + 1) * (workers > 0), shutil.disk_usage(SHARED_MEMORY).free


def _collate(config: CfgNode) -> Callable[[list[Any]], Any]:
    return collate_for_a_pipe if is_shared_memory_short(config) else collate


def is_shared_memory_short(config: CfgNode) -> bool:
    """Return whether the batches under way take more shared memory than there is."""
    needed, free = _shared_memory(config)
    return needed > free


def build_loader(
    config: CfgNode,
    samples: SeededSamples,
    sampler: TrainSampler | EvalSampler,
    collate: Callable[[list[Any]], Any],
) -> DataLoader:
    """Return the loader of the samples that a sampler draws, in the batches and workers that the config asks for."""
    workers = _workers(config)
    return DataLoader(
        samples,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        collate_fn=collate,
        drop_last=isinstance(sampler, TrainSampler),
        persistent_workers=workers > 0,
        **_loading(config, workers),
    )


def _loading(config: CfgNode, workers: int) -> dict[str, Any]:
    """Return how a `DataLoader` with so many workers works."""
    return {
        "num_workers": workers,
        "prefetch_factor": PREFETCHED if workers else None,
        # Pinning opens a context on the GPU, where a run on another device has no business.
        "pin_memory": config.DATA.PIN_MEMORY and config.DEVICE in ("", "cuda") and torch.cuda.is_available(),
        "worker_init_fn": leave_signals_to_parent,
        # Without its own, a loader takes a number from the global generator whenever it is iterated.
        "generator": torch.Generator(),
    }


def _stream_options(config: CfgNode, rank: int, world_size: int) -> dict[str, Any]:
    return {"batch_size": config.DATA.BATCH_SIZE, "rank": rank, "world_size": world_size}


def _stream_loader(
    config: CfgNode, batches: TrainBatches | EvalBatches, sampler: TrainSampler | EvalSampler, world_size: int
) -> StreamLoader:
    """Return the loader of a stream, with at most as many workers as there are shards for a process.

    Raises:
        ValueError: for fewer shards to train on than processes.
    """
    shards = len(batches.stream.urls) // world_size
    if not shards and isinstance(batches, TrainBatches):
        raise ValueError(
            f"DATA.TRAIN has {len(batches.stream.urls)} shards for {world_size} processes, each of which needs one at "
            f"least; make more and smaller shards"
        )
    workers = min(_workers(config), max(shards, 1))
    return StreamLoader(batches, sampler, _collate(config), **_loading(config, workers))
