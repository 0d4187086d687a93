"""Parameter groups and optimizer: trained parameters, learning rate factors and weight decay."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from yacs.config import CfgNode

from models.contract import classifier, no_weight_decay
from models.options import did_you_mean

# Optimizers of timm that the training loop cannot use, by name prefix.
_UNUSABLE = {
    "adahessian": "needs second derivatives, which the training loop does not provide",
    "bnb": "needs the package bitsandbytes, with which exact resuming is not tested",
    "fused": "needs the package apex, with which exact resuming is not tested",
}


def decays(name: str, parameter: Tensor, exceptions: Collection[str]) -> bool:
    """Return whether weight decay applies to a parameter: to all but biases, norms and the named `exceptions`."""
    one_dimensional = parameter.ndim <= 1 or name.endswith(".bias")
    return not one_dimensional and not any(fnmatchcase(name, pattern) for pattern in exceptions)


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Freeze the parameters that match `patterns` and return their total number of elements.

    Args:
        model: the network.
        patterns: names of modules or parameters, with wildcards: `stages.0`, `*.norm?.weight`.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    _check_patterns(parameters, patterns, "TRAIN.FREEZE")
    for name, parameter in parameters.items():
        if any(_is_part(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"TRAIN.FREEZE {list(patterns)} leaves nothing to train; name fewer parts")
    return sum(parameter.numel() for parameter in parameters.values() if not parameter.requires_grad)


def _check_patterns(parameters: Iterable[str], patterns: Iterable[str], option: str) -> None:
    """Raise a ValueError if a pattern of an option matches no module or parameter."""
    names = {part: None for name in parameters for part in _with_parents(name)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = did_you_mean(pattern, names) or f"; its parts are {', '.join(n for n in names if '.' not in n)}"
            raise ValueError(f"{option}: the network has no part named {pattern!r}{hint}")


def _is_part(name: str, pattern: str) -> bool:
    """Return whether the name of a parameter or of one of its modules matches a pattern."""
    return any(fnmatchcase(part, pattern) for part in _with_parents(name))


def keep_frozen_in_eval(model: nn.Module) -> None:
    """Put every module whose parameters are all frozen into evaluation mode, including its norms and dropout."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _with_parents(name: str) -> Iterator[str]:
    """Yield the dotted `name` and the names of its parent modules, innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    head_scale: float = 1.0,
    backbone_scale: float = 1.0,
    scales: Mapping[str, float] | None = None,
) -> list[dict]:
    """Return the trained parameters in groups, those with weight decay first.

    Args:
        model: the network.
        weight_decay: the weight decay of the parameters that have one.
        layer_decay: factor on the learning rate from each layer to the preceding one (BEiT, arXiv 2106.08254,
            appendix); the layers are those of the network's `group_matcher`, as in timm.
        head_scale: factor on the learning rate of the layer that computes the logits.
        backbone_scale: factor on the learning rate of the backbone of a detector or segmenter.
        scales: further factors by names of modules or parameters, with wildcards as in `freeze`.

    Returns:
        Two groups; with a factor other than 1 two for each layer, for the head, for the backbone, and for each further
        factor: the head first, the backbone last, of the layers the last one first. timm's schedules apply their
        `lr_scale`.

    Raises:
        ValueError: a factor is given, but the network does not define its layers, or has no classifier or backbone, or
            no part of that name.
    """
    exceptions = no_weight_decay(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if layer_decay == head_scale == backbone_scale == 1 and not scales:
        decayed = {name: decays(name, parameter, exceptions) for name, parameter in trained}
        return [
            {"params": [parameter for name, parameter in trained if decayed[name]], "weight_decay": weight_decay},
            {"params": [parameter for name, parameter in trained if not decayed[name]], "weight_decay": 0.0},
        ]
    depths = _depths(model) if layer_decay != 1 else {}
    head = _head(model) if head_scale != 1 else None
    backbone = _backbone(model) if backbone_scale != 1 else None
    scales = scales or {}
    _check_patterns(dict(model.named_parameters()), scales, "TRAIN.LR_SCALES")
    groups = defaultdict(list)  # by depth, part, further factor (the largest first), not decayed: in this order
    for name, parameter in trained:
        part = 0 if _is_in(name, head) else 2 if _is_in(name, backbone) else 1
        further = math.prod(factor for pattern, factor in scales.items() if _is_part(name, pattern))
        groups[depths.get(name, 0), part, -further, not decays(name, parameter, exceptions)].append(parameter)
    return [
        {
            "params": groups[depth, part, negated, undecayed_group],
            "weight_decay": 0.0 if undecayed_group else weight_decay,
            "lr_scale": layer_decay**depth * (head_scale, 1.0, backbone_scale)[part] * -negated,
        }
        for depth, part, negated, undecayed_group in sorted(groups)
    ]


def _depths(model: nn.Module) -> dict[str, int]:
    """Return for each parameter name the distance of its layer from the last one."""
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"TRAIN.LAYER_DECAY: {type(model).__name__} does not define its layers; leave it at 1.0")
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return {name: max(layers.values()) - layer for name, layer in layers.items()}


def _head(model: nn.Module) -> str:
    """Return the name of the layer that computes the logits."""
    if not classifier(model):
        raise ValueError(f"TRAIN.HEAD_LR_SCALE: {type(model).__name__} has no classifier; leave it at 1.0")
    return classifier(model)


def _backbone(model: nn.Module) -> str:
    """Return the name of the backbone of a detector or segmenter."""
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise ValueError(f"TRAIN.BACKBONE_LR_SCALE: {type(model).__name__} has no backbone; leave it at 1.0")
    return "backbone"


def _is_in(name: str, module: str | None) -> bool:
    """Return whether a parameter is in a module, given their dotted names."""
    return module is not None and name.startswith(f"{module}.")


def learning_rate_scale(config: CfgNode, world_size: int) -> float:
    """Return the factor on the configured learning rates, which are for 512 images per update."""
    return config.images_per_update(world_size) / 512


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the next step, before the factors of the groups."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("lr_scale", 1.0)


def _adamw(groups: list[dict], settings: CfgNode, **arguments: Any) -> torch.optim.Optimizer:
    """Return PyTorch's AdamW, fused: one kernel for all parameters, which can also skip an update on the device."""
    return torch.optim.AdamW(
        groups, **{"betas": tuple(settings.BETAS), "eps": settings.EPS, "fused": True, **arguments}
    )


def _sgd(groups: list[dict], settings: CfgNode, **arguments: Any) -> torch.optim.Optimizer:
    """Return PyTorch's SGD, fused, with its buffers initialised; a skipped first step would leave them undefined."""
    momentum = settings.MOMENTUM
    sgd = torch.optim.SGD(groups, **{"momentum": momentum, "nesterov": momentum > 0, "fused": True, **arguments})
    for group in sgd.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


# Optimizers made here, each from parameter groups, TRAIN.OPTIMIZER and further arguments. All others are timm's.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}


def optimizer_names() -> list[str]:
    """Return the names of the optimizers that can be configured."""
    return sorted({*OPTIMIZERS, *(name for name in list_optimizers() if not name.startswith(tuple(_UNUSABLE)))})


def build_optimizer(config: CfgNode, model: nn.Module, world_size: int) -> torch.optim.Optimizer:
    """Return the configured optimizer of `model`'s trained parameters, with the base learning rate.

    Raises:
        ValueError: there is no such optimizer, it cannot be used here, or it does not accept an argument.
    """
    settings, train = config.TRAIN.OPTIMIZER, config.TRAIN
    groups = parameter_groups(
        model,
        weight_decay=train.WEIGHT_DECAY,
        layer_decay=train.LAYER_DECAY,
        head_scale=train.HEAD_LR_SCALE,
        backbone_scale=train.BACKBONE_LR_SCALE,
        scales=train.LR_SCALES,
    )
    arguments = {"lr": train.BASE_LR * learning_rate_scale(config, world_size), **_own_arguments(settings.ARGS)}
    _check_name(settings.NAME)
    try:
        if settings.NAME in OPTIMIZERS:
            return OPTIMIZERS[settings.NAME](groups, settings, **arguments)
        return create_optimizer_v2(groups, opt=settings.NAME, **arguments)
    except (TypeError, ValueError) as error:  # an unknown argument, or a value out of range
        raise ValueError(f"TRAIN.OPTIMIZER: {error}") from None


def _own_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return TRAIN.OPTIMIZER.ARGS in the form the constructors expect."""
    set_by = {"lr": "TRAIN.BASE_LR", "weight_decay": "TRAIN.WEIGHT_DECAY"}
    for name in set_by.keys() & given.keys():
        raise ValueError(f"TRAIN.OPTIMIZER.ARGS.{name} is set by {set_by[name]}; remove it")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _check_name(name: str) -> None:
    if name in optimizer_names():
        return
    for beginning, reason in _UNUSABLE.items():
        if name.startswith(beginning) and name in list_optimizers():
            raise ValueError(f"TRAIN.OPTIMIZER.NAME: {name} cannot be used here: it {reason}; use adamw, for example")
    hint = did_you_mean(name, optimizer_names()) or "; timm.optim.list_optimizers() lists them"
    raise ValueError(f"TRAIN.OPTIMIZER.NAME: there is no optimizer {name!r}{hint}")


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer step, or leave weights and optimizer state unchanged if `skip` is 1.

    Fused optimizers decide on the device without synchronisation; for all others the host reads `skip`.

    Args:
        skip: float32 scalar, 0 or 1, on the parameters' device.
        optimizer: with its gradients in place.
    """
    if skips_on_device(optimizer):
        # The attributes that torch.amp.GradScaler sets on fused optimizers.
        optimizer.grad_scale, optimizer.found_inf = None, skip
        optimizer.step()
    elif not skip:
        optimizer.step()


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the kernels of `optimizer` can skip an update on the device."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def keeps_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `optimizer` has state between steps, determined by a step of a copy on a single weight."""
    probe = copy.copy(optimizer)
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**optimizer.param_groups[0], "params": [weight]}]
    probe.step()
    return any(value is not None for values in probe.state.values() for value in values.values())
