"""Build a run from a config: build its parts and open the output folder."""

from __future__ import annotations

import warnings as python_warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data.streams import Loader
from data.wording import counted
from logger import RunLog, check_recorders
from lr_scheduler import build_scheduler, schedule_warnings
from models.contract import compile_parts
from optimizer import build_optimizer, freeze
from tasks import Task, build_task
from training.checkpoint import CheckpointFolder, load_strictly
from training.device import prepare_device
from training.environment import write_environment
from training.output_folder import lock_folder, open_folder, set_aside
from training.resume import (
    Resumed,
    check_weight_options,
    find_resumed,
    is_same_file,
    start_from_pretrained,
    written_config,
)
from training.run import BadImages, Run, TrainingState
from training.running_statistics import RunningStatistics
from training.teacher import add_teacher
from training.weight_sets import RAW, pick_weights
from utils import (
    StopSignal,
    World,
    collective_timeout,
    different_on_ranks,
    fail_together,
    write_atomically,
)

# A learning rate that changes by more than this factor on resume is probably unintended.
_LARGEST_JUMP = 1.5


@dataclass(frozen=True)
class Assembly:
    """The parts of a run before anything is written and before any communication with other processes.

    Attributes:
        continued_from: the checkpoint that the run resumes from.
        notes: lines for the log at the start.
        warnings: warnings for the log.
    """

    task: Task
    train_loader: Loader
    eval_loader: Loader
    state: TrainingState
    continued_from: Path | None
    notes: list[str]
    warnings: list[str]


def build_network(task: Task, world: World) -> nn.Module:
    """Return the task's untrained network on its device."""
    prepare_device(task.config)
    return task.build_model().to(world.device, memory_format=torch.channels_last)


def build_run(config: CfgNode, world: World) -> Run:
    """Build a training run and open its output folder.

    Raises:
        ValueError: wrong input; nothing has been written except the lock of an existing folder.
    """
    folder, lock = config.run_folder, None
    with fail_together():
        if world.is_main and folder.is_dir():  # before reading checkpoints that another run may be about to replace
            lock = lock_folder(open_folder(folder), patience=min(120, collective_timeout().total_seconds() / 2))
    with fail_together():
        assembly = assemble(config, world)
    _check_agreement(assembly, config)
    changed, config.TRAIN.ALLOW_CONFIG_CHANGE = config.TRAIN.ALLOW_CONFIG_CHANGE, False  # applies only once
    begins = assembly.continued_from is None or assembly.continued_from.parent.resolve() != folder.resolve()
    rewound = not begins and _is_rewound(assembly.continued_from, config)
    checkpoints, notes = CheckpointFolder(folder, keep=config.KEEP_CHECKPOINTS), list(assembly.notes)
    with fail_together():
        if world.is_main:
            lock = lock or _lock_new_folder(folder)
            if begins and (earlier := set_aside(folder)):
                notes.append(f"the files of an earlier run in this folder were moved to {earlier}")
            elif rewound:
                others = checkpoints.abandoned(assembly.continued_from, assembly.state.position.epoch)
                if earlier := set_aside(folder, others):
                    notes.append(f"the other checkpoints in this folder were moved to {earlier}")
    run = Run(
        config=config,
        world=world,
        task=assembly.task,
        train_loader=assembly.train_loader,
        eval_loader=assembly.eval_loader,
        state=assembly.state,
        statistics=RunningStatistics(assembly.state.network),
        model=_distribute(assembly.state.network, world),
        folder=folder,
        log=RunLog(folder, config, is_main=world.is_main, updates_done=assembly.state.updates_logged),
        stop=StopSignal(),
        bad_images=BadImages(folder / "bad_images.txt"),
        checkpoints=checkpoints,
        lock=lock,
    )
    run.stop.listen()
    if begins or rewound or changed:  # the checkpoint then contains the new options, which need not be allowed again
        run.save()  # before the first log line, so that a run killed before it leaves nothing to move away
    _log_start(run, describe_run(config, assembly, world), notes, assembly.warnings)
    return run


def assemble(config: CfgNode, world: World, *, cached: bool = True) -> Assembly:
    """Build the parts of a run, resumed from its newest checkpoint or started from pretrained weights, if any.

    Writes nothing and does not communicate with other processes.

    Args:
        config: options of the run.
        world: its processes.
        cached: whether DATA.CACHE takes effect; it reads all images.

    Raises:
        ValueError: wrong input.
    """
    task = build_task(config, world, training=True)  # which may reject DATA.CACHE
    config.DATA.CACHE &= cached
    train_loader, eval_loader = task.train_loader(), task.eval_loader()
    check_recorders(config)
    check_weight_options(config)
    notes, warnings = [*task.notes, *add_teacher(config, task)], []
    network = build_network(task, world)
    resumed = find_resumed(config, task, training_images=len(train_loader.dataset))
    if resumed:
        weights = pick_weights(resumed.checkpoint, resumed.path, network, kind=RAW).weights
        load_strictly(network, weights, resumed.path)
        warnings += resumed.warnings
    else:
        pretrained_notes, pretrained_warnings = start_from_pretrained(config, network, task)
        notes, warnings = notes + pretrained_notes, warnings + pretrained_warnings
    if config.TRAIN.FREEZE:
        frozen = freeze(network, config.TRAIN.FREEZE)
        notes.append(f"{frozen / 1e6:.2f} M parameters are frozen: {', '.join(config.TRAIN.FREEZE)}")
    ema = ModelEmaV3(network, decay=config.TRAIN.EMA.DECAY, use_warmup=True) if config.TRAIN.EMA.ENABLED else None
    if config.COMPILE:
        compile_parts(network)
    updates = train_loader.sampler.updates_per_epoch
    optimizer = build_optimizer(config, network, world.size)
    state = TrainingState(
        network=network,
        ema=ema,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, updates_per_epoch=updates, world_size=world.size),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.AMP == "fp16"),
        images_per_update=config.images_per_update(world.size),
        updates_per_epoch=updates,
    )
    if resumed:
        notes += _restore(state, config, resumed)
        warnings += rate_jump_warning(config, state, resumed.checkpoint)
    warnings += settings_warnings(config, state, len(train_loader.dataset), world.size) + task.warnings()
    return Assembly(task, train_loader, eval_loader, state, resumed and resumed.path, notes, warnings)


def settings_warnings(config: CfgNode, state: TrainingState, images: int, world_size: int) -> list[str]:
    """Return warnings about settings that are probably unintended, for a run on `images` training images."""
    found = schedule_warnings(config, updates_per_epoch=state.updates_per_epoch, world_size=world_size)
    dropped = images - state.updates_per_epoch * state.images_per_update
    if dropped > images / 10:
        found.append(
            f"an update has {state.images_per_update} images, and the incomplete last one of an epoch is dropped: "
            f"{dropped} of {images} images, different ones in each epoch; smaller batches drop fewer"
        )
    return found


def rate_jump_warning(config: CfgNode, state: TrainingState, saved: dict[str, Any]) -> list[str]:
    """Return a warning if the learning rate of a resumed run differs from that of its checkpoint."""
    before, now = (groups[0]["lr"] for groups in (saved["optimizer"]["param_groups"], state.optimizer.param_groups))
    if state.position.epoch >= config.TRAIN.EPOCHS or before / _LARGEST_JUMP <= now <= before * _LARGEST_JUMP:
        return []
    hint, schedule = "", config.TRAIN.LR_SCHEDULER
    if schedule.PLANNED_EPOCHS and schedule.AFTER == "rewarm":
        hint = ". TRAIN.LR_SCHEDULER.AFTER hold keeps the rate"
    elif not schedule.PLANNED_EPOCHS and written_config(saved).TRAIN.EPOCHS != config.TRAIN.EPOCHS:
        hint = ". To keep the rate of a finished run, set TRAIN.LR_SCHEDULER.PLANNED_EPOCHS to its number of epochs"
    return [
        f"the learning rate goes from {before:.2e} to {now:.2e} where the run continues, so its accuracy may drop at "
        f"first{hint}"
    ]


def _restore(state: TrainingState, config: CfgNode, resumed: Resumed) -> list[str]:
    """Continue from a checkpoint and return what to note in the log."""
    path = resumed.path
    state.restore(resumed.checkpoint, path)
    position = state.position
    if position.epoch >= config.TRAIN.EPOCHS and path.parent.resolve() != config.run_folder.resolve():
        raise ValueError(
            f"{path} is the end of a run of {counted(position.epoch, 'epoch')}, so nothing is left to train; "
            "evaluate it with --eval, or start from its weights with --pretrained"
        )
    left = "; nothing is left to train" if position.epoch >= config.TRAIN.EPOCHS else ""
    notes = [f"continuing from {path}: epoch {position.epoch + 1}, update {position.update}{left}"]
    if config.MODEL.PRETRAINED:
        notes.append(f"the weights are those of {path}, not of --pretrained {config.MODEL.PRETRAINED}")
    return notes


def _is_rewound(path: Path, config: CfgNode) -> bool:
    """Return whether --resume names an earlier checkpoint of the run's own folder, from which the run continues."""
    return path.name != "last.pth" and is_same_file(config.MODEL.RESUME, path)


def _check_agreement(assembly: Assembly, config: CfgNode) -> None:
    """Check that all processes start at the same update, on the same data and in the same precision.

    Raises:
        ValueError: they do not.
    """
    position = assembly.state.position
    facts = {
        "checkpoints": (position.epoch, position.update),
        "training images": len(assembly.train_loader.dataset),
        "validation images": len(assembly.eval_loader.dataset),
        "classes": assembly.task.describe(),
        "AMP": config.AMP,
    }
    different = different_on_ranks(facts)
    if "checkpoints" in different:
        raise ValueError(
            f"the processes do not see the same checkpoints in {config.run_folder}; it must be a shared folder"
        )
    if different == ["AMP"]:
        raise ValueError("--amp chooses bf16 or fp16 by the GPU, and the GPUs differ; give --amp fp16")
    if different:
        raise ValueError(
            f"the processes do not see the same {different[0]}; all machines need the same data, in a shared folder or "
            "as complete copies"
        )


def _lock_new_folder(folder: Path) -> TextIO:
    """Create and lock a new folder.

    Raises:
        ValueError: another run has created it in the meantime.
    """
    lock = lock_folder(open_folder(folder), patience=0)
    if (folder / "last.pth").exists():
        lock.close()
        raise ValueError(
            f"another run has started in {folder} in the meantime; start again to continue it, or give another --tag"
        )
    return lock


def _distribute(network: nn.Module, world: World) -> nn.Module:
    """Return `network`, averaging its gradients over the processes if there are several."""
    if world.size == 1:
        return network
    devices = [world.device] if world.device.type == "cuda" else None
    # Harmless for 1x1 weights, whose memory layouts are identical.
    python_warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        network, device_ids=devices, gradient_as_bucket_view=True, forward_sync_buffers=False
    )


def describe_run(config: CfgNode, assembly: Assembly, world: World) -> str:
    """Return one line with the sizes of a run."""
    state = assembly.state
    parameters = sum(p.numel() for p in state.network.parameters())
    return (
        f"{config.MODEL.NAME}: {parameters / 1e6:.2f} M parameters, {len(assembly.train_loader.dataset)} training and "
        f"{counted(len(assembly.eval_loader.dataset), 'validation image')}, {counted(config.TRAIN.EPOCHS, 'epoch')} of "
        f"{counted(state.updates_per_epoch, 'update')} of {counted(state.images_per_update, 'image')} on "
        f"{world.size} x {world.device.type}; results in {config.run_folder}"
    )


def _log_start(run: Run, introduction: str, notes: list[str], warnings: list[str]) -> None:
    """Write config.yaml and log what is about to run."""
    config, log, state = run.config, run.log, run.state
    if run.world.is_main:
        try:
            write_atomically(run.folder / "config.yaml", config.dump())
            write_environment(run.folder, run.world)
        except OSError as error:  # a full disk must not end the run
            warnings = [*warnings, f"{error.filename or run.folder} could not be written ({error.strerror})"]
    log.rewind(epoch=state.position.epoch, update=state.updates_logged)
    log.info(introduction)
    log.begin(notes, warnings)
