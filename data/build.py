"""Build data sets, loaders and mixup from the config."""

from __future__ import annotations

import difflib
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from timm.data import Mixup
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.cache import CachedSource
from data.datasets import OnUnreadable, PipedCollate, SeededSamples, TransformedImages, collate
from data.formats import FORMATS
from data.formats.stream import ImageStream, open_stream
from data.samplers import EvalSampler, TrainSampler
from data.segmentation.sources import Labels
from data.sources import SPLITS, Dataset, ImageSource, Request
from data.streams import EvalBatches, Loader, StreamLoader, TrainBatches
from data.transforms import Erase, EvalTransform, TrainTransform
from data.wording import counted
from data.workers import leave_signals_to_parent

F = TypeVar("F")

# Shared memory on Linux; containers have 64 MiB of it by default.
SHARED_MEMORY = Path("/dev/shm")
# Batches prefetched per worker.
PREFETCHED = 2
# Batches beside these: one in use, and the next one, which is received before that is released.
_IN_USE = 2
# Bytes of a pixel: its colours; the fourth is for its label, or for the label of the image.
PIXEL = 4


def open_dataset(config: CfgNode, needs: Sequence[str] = ("train", "val")) -> Dataset:
    """Open the data set of the config: classes and images are listed, but no image is opened yet.

    Args:
        config: the options of the run.
        needs: the splits to open: `("val",)` if there is no training.

    Raises:
        ValueError: DATA.DATASET is unknown or has one label per image although DATA.MULTI_LABEL is set, an option is of
            another task, or the data path is missing or has a wrong layout.
    """
    open_format = choose_format(config, FORMATS)
    mask_labels(config).check_unmapped(f"TASK {config.TASK}")
    if is_stream(config.DATA.DATASET):
        _check_stream(config)
    dataset = open_format(request(config, needs))
    if config.DATA.MULTI_LABEL and not (is_stream(config.DATA.DATASET) or dataset.has_several_labels()):
        raise ValueError(f"DATA.DATASET {config.DATA.DATASET} has one label per image; leave DATA.MULTI_LABEL at False")
    if not config.DATA.ALLOW_LARGER_VAL:
        dataset.check_splits()
    return dataset.by_number() if config.DATA.CLASS_ORDER == "number" else dataset


def choose_format(config: CfgNode, formats: Mapping[str, F]) -> F:
    """Return the function that opens the data set of the config.

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
    """Return how unreadable images are handled."""
    if training:
        return "raise" if config.DATA.BAD_IMAGES == "raise" else "substitute"
    return "mark" if config.DATA.BAD_IMAGES == "skip" else "raise"


def is_stream(name: str) -> bool:
    """Return whether a DATA.DATASET is a stream, which reads images sequentially from commands."""
    return FORMATS.get(name) is open_stream


def _check_stream(config: CfgNode) -> None:
    """Check that no option needs random access to the images.

    Raises:
        ValueError: one does.
    """
    for key, value, off in (
        ("DATA.BALANCE", config.DATA.BALANCE, "none"),
        ("DATA.CACHE", config.DATA.CACHE, False),
        ("AUG.REPEATS", config.AUG.REPEATS, 1),
        ("TEST.LABELS", config.TEST.LABELS, ""),
    ):
        if value != off:
            advice = "remove it" if off == "" else f"leave it at {off}"
            raise ValueError(f"{key} {value} needs random access, which a stream does not have; {advice}")


def build_train_loader(config: CfgNode, dataset: Dataset, *, rank: int, world_size: int) -> Loader:
    """Return the loader of this rank's batches of `dataset.train`; its `sampler` is a `TrainSampler`.

    Raises:
        ValueError: the data set is smaller than one update.
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
        options = {"batch_size": config.DATA.BATCH_SIZE, "rank": rank, "world_size": world_size, **unreadable}
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
        options = {"batch_size": config.DATA.BATCH_SIZE, "rank": rank, "world_size": world_size, **unreadable}
        return _stream_loader(config, EvalBatches(dataset.held_out, transform, **options), sampler, world_size)
    source = _source(config, dataset.held_out, "val", rank)
    images = TransformedImages(source, transform, **unreadable)
    return build_loader(config, images, sampler, _collate(config))


def train_sampler(
    config: CfgNode, length: int, *, rank: int, world_size: int, balanced: np.ndarray | None = None
) -> TrainSampler:
    """Return the sampler of this rank's share of `length` training samples; for `balanced` see `TrainSampler`.

    Raises:
        ValueError: there are fewer samples than one update needs.
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


def _source(config: CfgNode, source: ImageSource, split: str, rank: int) -> ImageSource:
    """Return the images of a split, cached in memory with DATA.CACHE.

    Raises:
        ValueError: this system has no /dev/shm.
    """
    if not config.DATA.CACHE:
        return source
    if not SHARED_MEMORY.is_dir():
        raise ValueError(f"DATA.CACHE needs {SHARED_MEMORY}, which this system does not have; leave it off")
    processes = _local_processes()
    key = f"{_launch_id(processes)}-{split}"
    needed, free = _shared_memory(config, config.image_size)
    reserved = needed if needed <= free else 0  # batches that do not fit go through pipes
    return CachedSource(source, SHARED_MEMORY, key, processes=processes, is_main=rank == 0, reserved=reserved)


def _local_processes() -> int:
    """Return the number of training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _launch_id(processes: int) -> str:
    """Return a name that is unique to the processes of this launch on this machine."""
    env = os.environ
    if processes == 1:
        return str(os.getpid())
    if "RANK" in env:  # torchrun is the parent of its processes
        return f"{env.get('MASTER_PORT', '')}-{os.getppid()}"
    return f"slurm-{env['SLURM_JOB_ID']}-{env['SLURM_STEP_ID']}"


def build_erasing(config: CfgNode) -> Erase | None:
    """Return random erasing of normalised batches, or None if it is off."""
    aug = config.AUG
    return Erase(aug.REPROB, mode=aug.REMODE, count=aug.RECOUNT) if aug.REPROB and aug.RECOUNT else None


def build_mixup(config: CfgNode, num_classes: int) -> Mixup | None:
    """Return mixup and cutmix with smoothed targets, or None if both are off.

    Raises:
        ValueError: the batch size is odd; images are mixed in pairs.
    """
    aug = config.AUG
    if not aug.MIXUP_PROB or not (aug.MIXUP or aug.CUTMIX):
        return None
    if config.DATA.MULTI_LABEL:
        raise ValueError(
            "mixup and cutmix need single labels; switch them off for DATA.MULTI_LABEL with AUG.MIXUP 0 AUG.CUTMIX 0"
        )
    if config.DATA.BATCH_SIZE % 2:
        raise ValueError(
            f"DATA.BATCH_SIZE must be even for mixup and cutmix, not {config.DATA.BATCH_SIZE}; change it, or switch "
            f"them off with AUG.MIXUP 0 AUG.CUTMIX 0"
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


def mask_labels(config: CfgNode) -> Labels:
    """Return the options for the values of mask files.

    Raises:
        ValueError: DATA.LABEL_MAP has something else than values and classes.
    """
    data, mapping = config.DATA, {}
    for value, label in data.LABEL_MAP.items():
        if not (str(value).isdecimal() and int(value) <= 255 and isinstance(label, int) and 0 <= label <= 255):
            raise ValueError(f"DATA.LABEL_MAP {{{value}: {label!r}}}: both must be numbers from 0 to 255")
        mapping[int(value)] = label
    return Labels(mapping=mapping, reduce_zero=data.REDUCE_ZERO_LABEL, ignored=data.IGNORE_LABEL)


def _check_not_swapped(data: CfgNode, needs: Sequence[str]) -> None:
    """Check that training does not use the held-out images. Evaluation may use those of training.

    Raises:
        ValueError: both splits have the usual names of the other one, or one has, and the other one is the default.
    """
    given = {"train": data.TRAIN, "val": data.VAL}
    other = {"train": "val", "val": "train"}
    swapped = [
        split for split in given if re.split(r"\.|-[\d*?{[]", Path(given[split]).name)[0] in SPLITS[other[split]]
    ]
    for split in swapped if "train" in needs else ():
        if len(swapped) == 2 or (other[split] in needs and not given[other[split]]):
            raise ValueError(
                f"DATA.{split.upper()} {given[split]}: the splits seem swapped; exchange DATA.TRAIN and DATA.VAL"
            )


def request(config: CfgNode, needs: Sequence[str]) -> Request:
    """Return the data options of a run for a format.

    Raises:
        ValueError: the splits seem swapped.
    """
    data = config.DATA
    _check_not_swapped(data, needs)
    return Request(
        path=data.DATA_PATH,
        path_by_variable=os.environ.get("DATA_PATH", ""),
        needs=needs,
        train=data.TRAIN,
        val=data.VAL,
        exif=data.EXIF == "apply",
        multi_label=data.MULTI_LABEL,
        image_column=data.IMAGE_COLUMN,
        label_column=data.LABEL_COLUMN,
        download=data.DOWNLOAD,
        scenes=data.SCENES,
        stream_images={"train": data.STREAM.IMAGES, "val": data.STREAM.VAL_IMAGES},
    )


def loader_warnings(config: CfgNode, size: tuple[int, int]) -> list[str]:
    """Return warnings about loader options that this machine does not support, with the fallback.

    Args:
        config: options of the run.
        size: largest height and width of the images of a batch.
    """
    found, workers, asked = [], _workers(config), config.DATA.NUM_WORKERS
    if workers < asked:
        share = f" for each of {_local_processes()} processes" if _local_processes() > 1 else ""
        found.append(f"DATA.NUM_WORKERS {asked} is reduced to {workers}, the number of cores here{share}")
    needed, free = _shared_memory(config, size)
    if needed > free:
        found.append(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, but prefetched batches need {needed / 2**20:.0f} MiB: "
            "they are sent through pipes, which is slower. Give the container more with --shm-size or --ipc=host, or "
            "use smaller batches or fewer DATA.NUM_WORKERS"
        )
    return found


def _workers(config: CfgNode) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Processes of torchrun share their cores; SLURM binds each task to some of those that it gave to all of them.
    shared = max(cores, int(os.environ.get("SLURM_CPUS_ON_NODE", "0")))
    return min(config.DATA.NUM_WORKERS, cores, max(1, shared // _local_processes()))


def _shared_memory(config: CfgNode, size: tuple[int, int]) -> tuple[float, float]:
    """Return the bytes needed for prefetched batches in all processes of this machine, and the free bytes."""
    if not SHARED_MEMORY.is_dir():
        return 0, math.inf  # other systems have no such limit
    batch = config.DATA.BATCH_SIZE * size[0] * size[1] * PIXEL
    workers = _workers(config)
    needed = _local_processes() * batch * (PREFETCHED * workers + _IN_USE) * (workers > 0)
    return needed, shutil.disk_usage(SHARED_MEMORY).free


def _collate(config: CfgNode) -> Callable[[list[Any]], Any]:
    """Return the collate function of images of DATA.IMG_SIZE."""
    if _is_shared_memory_short(config, config.image_size):
        return PipedCollate(partial(collate, shared=False))
    return collate


def fit_shared_memory(
    config: CfgNode, size: tuple[int, int], collate: Callable[[list[Any]], Any]
) -> Callable[[list[Any]], Any]:
    """Return `collate`, sending its batches through pipes if they do not fit into shared memory.

    Args:
        config: options of the run.
        size: largest height and width of the images of a batch.
        collate: from samples to a batch.
    """
    return PipedCollate(collate) if _is_shared_memory_short(config, size) else collate


def _is_shared_memory_short(config: CfgNode, size: tuple[int, int]) -> bool:
    needed, free = _shared_memory(config, size)
    return needed > free


def build_loader(
    config: CfgNode,
    samples: SeededSamples,
    sampler: TrainSampler | EvalSampler,
    collate: Callable[[list[Any]], Any],
) -> DataLoader:
    """Return the loader of the samples drawn by a sampler, with batch size and workers of the config."""
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
    """Return the `DataLoader` arguments for `workers` workers."""
    return {
        "num_workers": workers,
        "prefetch_factor": PREFETCHED if workers else None,
        # Pinning creates a CUDA context, which a run on another device should not.
        "pin_memory": config.DATA.PIN_MEMORY and config.DEVICE in ("", "cuda") and torch.cuda.is_available(),
        "worker_init_fn": leave_signals_to_parent,
        # Without its own generator, a loader draws from the global one at the start of every iteration.
        "generator": torch.Generator(),
    }


def _stream_loader(
    config: CfgNode, batches: TrainBatches | EvalBatches, sampler: TrainSampler | EvalSampler, world_size: int
) -> StreamLoader:
    """Return the loader of a stream, with at most one worker per shard of the process.

    Raises:
        ValueError: there are fewer training shards than processes.
    """
    shards = len(batches.stream.urls) // world_size
    if not shards and isinstance(batches, TrainBatches):
        raise ValueError(
            f"DATA.TRAIN has {counted(len(batches.stream.urls), 'shard')} for {world_size} processes, each of which "
            f"needs one or more; make more and smaller shards"
        )
    workers = min(_workers(config), max(shards, 1))
    return StreamLoader(batches, sampler, _collate(config), **_loading(config, workers))
