"""The interface between the trainer and any network.

A network implements methods, named as in timm where timm has them; missing methods have a default here. So the
trainer, the optimizer and the weight code need no model names.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from torch import Tensor, nn

from .tables import Resize


class TakenOver(NamedTuple):
    """Weights converted from a different kind of network.

    Attributes:
        weights: state dict under the names of the target network.
        new: names in the target network that the source weights lack.
        unused: names in the source weights without a counterpart.
    """

    weights: dict[str, Tensor]
    new: Set[str] = frozenset()
    unused: Set[str] = frozenset()


def classifier(model: nn.Module) -> str:
    """Return the dotted name of the layer that computes the logits, or ""."""
    if not hasattr(model, "get_classifier"):
        return ""
    head = model.get_classifier()
    return next((name for name, module in model.named_modules() if module is head), "")


def undecayed(model: nn.Module) -> set[str]:
    """Return the names of matrices and tables exempt from weight decay, besides biases and norms."""
    return set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()


def compile_parts(model: nn.Module) -> None:
    """Compile a network in place, part by part if it supports this; parameters keep their names."""
    model.compile_blocks() if hasattr(model, "compile_blocks") else model.compile()


def recompute_activations(model: nn.Module) -> None:
    """Let a network recompute activations in the backward pass instead of keeping them.

    Raises:
        ValueError: it cannot.
    """
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError):  # timm's way to refuse is the latter
        raise ValueError(
            f"--use-checkpoint: {type(model).__name__} cannot recompute activations; leave the flag out"
        ) from None


def smallest_image(model: nn.Module) -> tuple[int, int]:
    """Return the height and width in pixels of the smallest supported image."""
    return model.smallest_image if hasattr(model, "smallest_image") else (1, 1)


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Notify a network that an epoch, counted from 0, begins; also called when a run starts or resumes."""
    if hasattr(model, "set_epoch"):
        model.set_epoch(epoch)


def taken_over(model: nn.Module, weights: dict[str, Tensor]) -> TakenOver:
    """Return the weights of a different kind of network under the names of `model`."""
    return model.take_over(weights) if takes_over(model) else TakenOver(weights)


def takes_over(model: nn.Module) -> bool:
    """Return whether a network accepts weights under names different from its own."""
    return hasattr(model, "take_over")


def position_tables(model: nn.Module) -> dict[str, Resize]:
    """Return the resize function of each parameter that depends on the image or window size, by name."""
    return model.position_tables() if hasattr(model, "position_tables") else {}


def input_convs(model: nn.Module) -> set[str]:
    """Return the dotted names of the layers applied to the image channels."""
    if hasattr(model, "input_convs"):
        return model.input_convs()
    names = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()  # timm's convention
    return {names} if isinstance(names, str) else set(names)
