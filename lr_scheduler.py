"""Learning rate by update: linear warm-up, then cosine, polynomial, linear or step decay."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from yacs.config import CfgNode

from optimizer import learning_rate_scale

# The published linear schedule ends at this fraction of the base learning rate, whatever MIN_LR is.
_LINEAR_END = 0.01

# A learning rate that falls below this fraction of its peak when the warm-up ends is probably unintended.
_SMALLEST_KEPT = 0.8


class Continued:
    """A schedule extended beyond its last update: the learning rate is held, or the schedule restarted.

    Args:
        first: the schedule.
        updates: its length.
        again: the schedule that follows; None holds the last learning rate.
    """

    def __init__(self, first: Scheduler, updates: int, again: Scheduler | None) -> None:
        self._first, self._updates, self._again = first, updates, again

    def step_update(self, num_updates: int) -> None:
        """Set the learning rate that follows an update, counted from 0."""
        if self._again is None or num_updates < self._updates - 1:
            self._first.step_update(min(num_updates, self._updates - 1))
        else:
            self._again.step_update(max(num_updates - self._updates, 0))


def schedule_epochs(config: CfgNode) -> int:
    """Return the length of the schedule in epochs; later epochs hold its last value or repeat it."""
    return config.TRAIN.LR_SCHEDULER.PLANNED_EPOCHS or config.TRAIN.EPOCHS


def build_scheduler(
    config: CfgNode, optimizer: torch.optim.Optimizer, *, updates_per_epoch: int, world_size: int
) -> Scheduler | Continued:
    """Return the configured schedule, counted in updates: call `step_update(n)` after update n, counted from 0.

    The learning rate depends only on n, so a resumed run needs no scheduler state. With WARMUP_PREFIX the decay starts
    after the warm-up; without it, it starts at the first update, as in the published training, and the warm-up replaces
    its beginning. Linear always starts after the warm-up.
    """
    epochs, shape = schedule_epochs(config), {"updates_per_epoch": updates_per_epoch, "world_size": world_size}
    beyond = config.TRAIN.EPOCHS - epochs
    if beyond <= 0:
        return _cycle(config, optimizer, epochs, **shape)
    again = _cycle(config, optimizer, beyond, **shape) if config.TRAIN.LR_SCHEDULER.AFTER == "rewarm" else None
    return Continued(_cycle(config, optimizer, epochs, **shape), epochs * updates_per_epoch, again)


def _cycle(
    config: CfgNode, optimizer: torch.optim.Optimizer, epochs: int, *, updates_per_epoch: int, world_size: int
) -> Scheduler:
    """Return a schedule of warm-up and decay."""
    train, scale = config.TRAIN, learning_rate_scale(config, world_size)
    kind, warmup_updates = train.LR_SCHEDULER.NAME, _warmup_updates(config, updates_per_epoch)
    after_warmup = train.LR_SCHEDULER.WARMUP_PREFIX or kind == "linear"
    updates = epochs * updates_per_epoch - (warmup_updates if after_warmup else 0)
    updates = max(2, updates)  # a decay of one update is its first one, the peak; timm warns of such a schedule
    warmup = {
        "warmup_t": warmup_updates,
        "warmup_lr_init": train.WARMUP_LR * scale,
        "warmup_prefix": after_warmup,
        "t_in_epochs": False,
    }
    if kind == "cosine":
        return CosineLRScheduler(optimizer, t_initial=updates, lr_min=train.MIN_LR * scale, cycle_limit=1, **warmup)
    if kind == "linear":
        lowest = _LINEAR_END * train.BASE_LR * scale
        return PolyLRScheduler(optimizer, power=1.0, t_initial=updates, lr_min=lowest, **warmup)
    if kind == "poly":
        power, lowest = train.LR_SCHEDULER.POWER, train.MIN_LR * scale
        return PolyLRScheduler(optimizer, power=power, t_initial=updates, lr_min=lowest, **warmup)
    if kind == "milestones":
        at = [epoch * updates_per_epoch for epoch in train.LR_SCHEDULER.MILESTONES]
        return MultiStepLRScheduler(optimizer, decay_t=at, decay_rate=train.LR_SCHEDULER.DECAY_RATE, **warmup)
    decay_updates = train.LR_SCHEDULER.DECAY_EPOCHS * updates_per_epoch
    return StepLRScheduler(optimizer, decay_t=decay_updates, decay_rate=train.LR_SCHEDULER.DECAY_RATE, **warmup)


def _warmup_updates(config: CfgNode, updates_per_epoch: int) -> int:
    return config.TRAIN.WARMUP_UPDATES or config.TRAIN.WARMUP_EPOCHS * updates_per_epoch


def planned_schedule(
    config: CfgNode, *, updates_per_epoch: int, world_size: int, points: int = 500
) -> list[tuple[float, float]]:
    """Return the planned learning rates of a run: `(epochs done, learning rate)` at about `points` updates.

    They include the first and last update and those around the end of the warm-up.
    """
    shape = {"updates_per_epoch": updates_per_epoch, "world_size": world_size}
    total, warmup = config.TRAIN.EPOCHS * updates_per_epoch, _warmup_updates(config, updates_per_epoch)
    updates = {*range(0, total, max(1, total // points)), warmup, warmup + 1, total - 1}
    updates.add(schedule_epochs(config) * updates_per_epoch)
    rates = learning_rates(config, sorted(update for update in updates if update < total), **shape)
    return [(update / updates_per_epoch, rate) for update, rate in rates.items()]


def schedule_warnings(config: CfgNode, *, updates_per_epoch: int, world_size: int) -> list[str]:
    """Return warnings about a schedule that is probably unintended: an endless warm-up, a steep drop, no decay."""
    shape = {"updates_per_epoch": updates_per_epoch, "world_size": world_size}
    reversed_phases = [_falling_warmup(config), _rising_decay(config)]
    checks = [
        _endless_warmup(config, updates_per_epoch),
        *(reversed_phases if any(reversed_phases) else [drop_warning(config, **shape)]),
        _missing_decay(config, **shape),
    ]
    return [warning for warning in checks if warning]


def _endless_warmup(config: CfgNode, updates_per_epoch: int) -> str:
    train, planned = config.TRAIN, schedule_epochs(config)
    phases = [(f"TRAIN.EPOCHS {train.EPOCHS}", train.EPOCHS)]
    if planned < train.EPOCHS:
        phases.append((f"TRAIN.LR_SCHEDULER.PLANNED_EPOCHS {planned}", planned))
        if train.LR_SCHEDULER.AFTER == "rewarm":
            phases.append(("the epochs after TRAIN.LR_SCHEDULER.PLANNED_EPOCHS", train.EPOCHS - planned))
    warmup = _warmup_updates(config, updates_per_epoch)
    for phase, epochs in phases:
        if warmup >= epochs * updates_per_epoch:
            given, limit = f"TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS}", phase
            if train.WARMUP_UPDATES:
                given, limit = f"TRAIN.WARMUP_UPDATES {warmup}", f"{epochs * updates_per_epoch}, the updates of {phase}"
            return f"{given} is not below {limit}: the learning rate never reaches TRAIN.BASE_LR there"
    return ""


def _falling_warmup(config: CfgNode) -> str:
    """Return a warning if the warm-up lowers the learning rate, otherwise an empty string."""
    warmup_lr, base_lr = config.TRAIN.WARMUP_LR, config.TRAIN.BASE_LR
    if not _warmup_updates(config, 1) or warmup_lr <= base_lr:
        return ""
    return f"the warm-up lowers the learning rate, from TRAIN.WARMUP_LR {warmup_lr:g} to {base_lr:g}"


def _rising_decay(config: CfgNode) -> str:
    """Return a warning if the decay raises the learning rate, otherwise an empty string."""
    base_lr, min_lr = config.TRAIN.BASE_LR, config.TRAIN.MIN_LR
    if config.TRAIN.LR_SCHEDULER.NAME not in ("cosine", "poly") or min_lr <= base_lr:
        return ""
    return (
        f"the learning rate rises to TRAIN.MIN_LR {min_lr:g}, which is above TRAIN.BASE_LR {base_lr:g}; lower "
        "TRAIN.MIN_LR, too"
    )


def _missing_decay(config: CfgNode, *, updates_per_epoch: int, world_size: int) -> str:
    """Return a warning if a step schedule has no step before the run ends, otherwise an empty string."""
    schedule, warmup = config.TRAIN.LR_SCHEDULER, _warmup_updates(config, updates_per_epoch)
    keys = {"step": "DECAY_EPOCHS", "milestones": "MILESTONES"}
    last = config.TRAIN.EPOCHS * updates_per_epoch - 1
    if schedule.NAME not in keys or warmup + 1 >= last or not schedule[keys[schedule.NAME]]:
        return ""
    shape = {"updates_per_epoch": updates_per_epoch, "world_size": world_size}
    first, end = learning_rates(config, [warmup + 1, last], **shape).values()
    if end < first:
        return ""
    key = keys[schedule.NAME]
    return (
        f"the learning rate does not decay within TRAIN.EPOCHS {config.TRAIN.EPOCHS} with TRAIN.LR_SCHEDULER.{key} "
        f"{schedule[key]}"
    )


def drop_warning(config: CfgNode, *, updates_per_epoch: int, world_size: int) -> str:
    """Return a warning if the learning rate falls steeply when the warm-up ends, otherwise an empty string."""
    warmup = _warmup_updates(config, updates_per_epoch)
    if not warmup or warmup >= schedule_epochs(config) * updates_per_epoch:
        return ""
    shape = {"updates_per_epoch": updates_per_epoch, "world_size": world_size}
    before, after = learning_rates(config, [warmup, warmup + 1], **shape).values()
    if after >= _SMALLEST_KEPT * before:
        return ""
    return (
        f"the learning rate falls from {before:.2e} to {after:.2e} when the warm-up ends: the decay has then run for "
        f"{warmup / updates_per_epoch:g} of {schedule_epochs(config)} epochs, as in the published training. "
        "TRAIN.LR_SCHEDULER.WARMUP_PREFIX True starts it after the warm-up; a shorter TRAIN.WARMUP_EPOCHS helps, too"
    )


def learning_rates(config: CfgNode, updates: list[int], *, updates_per_epoch: int, world_size: int) -> dict[int, float]:
    """Return the learning rate of each of `updates`, which count from 0 and are sorted."""
    base = config.TRAIN.BASE_LR * learning_rate_scale(config, world_size)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=base)
    schedule = build_scheduler(config, optimizer, updates_per_epoch=updates_per_epoch, world_size=world_size)
    rates = {}
    for update in updates:
        if update:
            schedule.step_update(update - 1)
        rates[update] = optimizer.param_groups[0]["lr"]
    return rates
