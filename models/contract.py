"""The interface between the trainer and networks.

A network may implement the methods called here, which have timm's names where timm has them; each has a default. The
trainer, the optimizer and the code for weights therefore do not depend on model names.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from torch import Tensor, nn

from .tables import Resize


class ConvertedWeights(NamedTuple):
    """Weights of another kind of network under the names of a target network.

    Attributes:
        weights: state dict under the names of the target network.
        new: names of the target network without a counterpart in the source weights.
        unused: names of the source weights without a counterpart in the target network.
    """

    weights: dict[str, Tensor]
    new: Set[str] = frozenset()
    unused: Set[str] = frozenset()


def classifier(model: nn.Module) -> str:
    """Return the dotted name of the layer that computes the logits, or "" if there is none."""
    if not hasattr(model, "get_classifier"):
        return ""
    head = model.get_classifier()
    return next((name for name, module in model.named_modules() if module is head), "")


def no_weight_decay(model: nn.Module) -> set[str]:
    """Return the names of the parameters exempt from weight decay, in addition to biases and norms."""
    return set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()


def compile_parts(model: nn.Module) -> None:
    """Compile a network in place, block by block if it supports this; parameters keep their names."""
    compile_model = model.compile_blocks if hasattr(model, "compile_blocks") else model.compile
    compile_model()


def recompute_activations(model: nn.Module) -> None:
    """Let a network recompute activations in the backward pass instead of saving them.

    Raises:
        ValueError: the network does not support this.
    """
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError):  # timm's models without support raise an AssertionError
        raise ValueError(
            f"--use-checkpoint: {type(model).__name__} cannot recompute activations; leave the flag out"
        ) from None


def smallest_image(model: nn.Module) -> tuple[int, int]:
    """Return the height and width in pixels of the smallest supported image."""
    return model.smallest_image if hasattr(model, "smallest_image") else (1, 1)


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Notify a network of the start of an epoch, counted from 0, also when a run starts or resumes."""
    if hasattr(model, "set_epoch"):
        model.set_epoch(epoch)


def rename_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the same network in another library under the names of ``model``."""
    return model.rename_weights(weights) if hasattr(model, "rename_weights") else weights


def convert_weights(model: nn.Module, weights: dict[str, Tensor]) -> ConvertedWeights:
    """Return the weights of another kind of network under the names of ``model``."""
    return model.convert_weights(weights) if converts_weights(model) else ConvertedWeights(weights)


def converts_weights(model: nn.Module) -> bool:
    """Return whether a network accepts weights under names other than its own."""
    return hasattr(model, "convert_weights")


def position_tables(model: nn.Module) -> dict[str, Resize]:
    """Return the resize function of each parameter whose shape depends on the image or window size, by name."""
    return model.position_tables() if hasattr(model, "position_tables") else {}


def input_convs(model: nn.Module) -> set[str]:
    """Return the dotted names of the layers applied to the image."""
    if hasattr(model, "input_convs"):
        return model.input_convs()
    names = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()  # timm's convention
    return {names} if isinstance(names, str) else set(names)
