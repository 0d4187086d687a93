"""Parameter groups and optimizer."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from yacs.config import CfgNode

# Position tables that the published recipe does not decay; the `rpb` of neighborhood attention it does.
_UNDECAYED_TABLES = ("rpe_table", "relative_position_bias_table")


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Return whether weight decay acts on the parameter `name`."""
    one_dimensional = parameter.ndim == 1 or name.endswith(".bias")
    return not one_dimensional and not any(table in name for table in _UNDECAYED_TABLES)


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Return the trained parameters as two groups, with and without `weight_decay`."""
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    return [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]


def learning_rate_scale(config: CfgNode, world_size: int) -> float:
    """Return what the configured learning rates, meant for 512 images an update, are multiplied by."""
    return config.DATA.BATCH_SIZE * world_size * config.TRAIN.ACCUMULATION_STEPS / 512


def build_optimizer(config: CfgNode, model: nn.Module, world_size: int) -> torch.optim.Optimizer:
    """Return the configured optimizer over `model`'s trained parameters, with the base learning rate.

    Both kinds are fused: one kernel for all parameters, which also lets an update be skipped on the device.
    """
    settings = config.TRAIN.OPTIMIZER
    groups = parameter_groups(model.named_parameters(), config.TRAIN.WEIGHT_DECAY)
    lr = config.TRAIN.BASE_LR * learning_rate_scale(config, world_size)
    if settings.NAME == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(settings.BETAS), eps=settings.EPS, fused=True)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=settings.MOMENTUM, nesterov=settings.MOMENTUM > 0, fused=True)
    for parameter in (p for group in groups for p in group["params"] if settings.MOMENTUM):
        # Left to the first step, the buffer would hold anything where that step is skipped.
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def keeps_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `optimizer` remembers anything between steps, which a step of a copy on one weight shows."""
    probe = copy.copy(optimizer)
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**optimizer.param_groups[0], "params": [weight]}]
    probe.step()
    return any(value is not None for values in probe.state.values() for value in values.values())


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `skip_next_step` works on `optimizer`: whether its kernels look at the flag themselves."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def skip_next_step(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """Make the next `optimizer.step()` leave everything as it is where `skip` is 1, decided on the device.

    Args:
        skip: float32 scalar, 0 or 1, on the parameters' device.
    """
    # The attributes through which torch.amp.GradScaler speaks to fused optimizers.
    optimizer.grad_scale, optimizer.found_inf = None, skip
