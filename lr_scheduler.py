"""Learning rate by update: linear warm-up, then cosine, linear or step decay."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from yacs.config import CfgNode

from optimizer import learning_rate_scale

# The published linear schedule ends at this share of the base learning rate, whatever MIN_LR says.
_LINEAR_END = 0.01


def build_scheduler(
    config: CfgNode, optimizer: torch.optim.Optimizer, *, updates_per_epoch: int, world_size: int
) -> Scheduler:
    """Return the configured schedule, counted in updates: call `step_update(n)` after update n, counted from 0.

    The learning rate is a function of n alone, so a resumed run needs no state of it. Cosine and step go on from where
    they would be without the warm-up; linear begins after it, as in the published training.
    """
    train, scale = config.TRAIN, learning_rate_scale(config, world_size)
    updates = train.EPOCHS * updates_per_epoch
    warmup = {
        "warmup_t": train.WARMUP_EPOCHS * updates_per_epoch,
        "warmup_lr_init": train.WARMUP_LR * scale,
        "warmup_prefix": train.LR_SCHEDULER.NAME == "linear",
        "t_in_epochs": False,
    }
    if train.LR_SCHEDULER.NAME == "cosine":
        return CosineLRScheduler(optimizer, t_initial=updates, lr_min=train.MIN_LR * scale, cycle_limit=1, **warmup)
    if train.LR_SCHEDULER.NAME == "linear":
        return PolyLRScheduler(
            optimizer,
            power=1.0,
            t_initial=max(1, updates - warmup["warmup_t"]),
            lr_min=_LINEAR_END * train.BASE_LR * scale,
            **warmup,
        )
    decay_updates = train.LR_SCHEDULER.DECAY_EPOCHS * updates_per_epoch
    return StepLRScheduler(optimizer, decay_t=decay_updates, decay_rate=train.LR_SCHEDULER.DECAY_RATE, **warmup)
