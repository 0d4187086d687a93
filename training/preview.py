"""Summary of a run for `--check`: sizes, learning rate schedule, and disk space of the checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from lr_scheduler import planned_schedule
from training.build import Assembly, describe_run
from training.run import TrainingState
from utils import World

_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 60


def preview(assembly: Assembly, config: CfgNode, world: World) -> tuple[list[str], list[str]]:
    """Return the lines and warnings about a run, including a warning if the disk is too small.

    Takes an optimizer step, so the run must not be trained afterwards.
    """
    rates = planned_schedule(config, updates_per_epoch=assembly.state.updates_per_epoch, world_size=world.size)
    size, files = checkpoint_bytes(assembly.state), checkpoint_files(config)
    folder = config.run_folder
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    taken = f"a checkpoint takes {_megabytes(size)}; the run keeps at most {files} ({_megabytes(size * files)})"
    lines = [describe_run(config, assembly, world), *assembly.notes, draw_schedule(rates), taken]
    full = [f"{taken}, but {folder} has {_megabytes(free)} free"] if size * files > free else []
    return lines, [*assembly.warnings, *full]


def draw_schedule(rates: list[tuple[float, float]]) -> str:
    """Return one line that draws the learning rate schedule, given as pairs of epochs done and rate."""
    peak_at, peak = max(rates, key=lambda pair: pair[1])
    epochs = rates[-1][0] or 1
    columns = min(_COLUMNS, len(rates))
    heights = [0.0] * columns
    for at, rate in rates:
        column = min(int(at / epochs * columns), columns - 1)
        heights[column] = max(heights[column], rate)
    bars = "".join(_BARS[round(height / (peak or 1) * (len(_BARS) - 1))] for height in heights)
    return f"learning rate: {rates[0][1]:.2e} {bars} {rates[-1][1]:.2e}, highest {peak:.2e} at epoch {peak_at:.3g}"


def checkpoint_bytes(state: TrainingState) -> int:
    """Return the size of the tensors of a checkpoint, after an optimizer step with zero gradients."""
    for group in state.optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    state.optimizer.step()
    once = {id(tensor): tensor for tensor in _tensors(state.to_dict())}  # averaged weights have two names
    return sum(tensor.numel() * tensor.element_size() for tensor in once.values())


def checkpoint_files(config: CfgNode) -> int:
    """Return the maximum number of checkpoints of a run on the disk, including the one being written."""
    copies = config.TRAIN.EPOCHS // config.SAVE_FREQ if config.SAVE_FREQ else 0
    return len(("best", "last", "previous", "written")) + min(copies, config.KEEP_CHECKPOINTS or copies)


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    for value in held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ():
        yield from _tensors(value)


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
