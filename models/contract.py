"""What the trainer asks of a network, whatever its kind.

A network answers by methods under timm's names where timm has one; what it does not answer has a default here. So
trainer, optimizer and weight code hold no names of any model.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from torch import Tensor, nn

from .tables import Resize


class TakenOver(NamedTuple):
    """Weights of a network of another kind.

    Attributes:
        weights: under the names of the network that takes them over.
        new: names of that network that such weights do not have.
        unused: names of the weights that it has no place for.
    """

    weights: dict[str, Tensor]
    new: Set[str] = frozenset()
    unused: Set[str] = frozenset()


def classifier(model: nn.Module) -> str:
    """Return the dotted name of the layer that gives the logits, "" where there is none."""
    if not hasattr(model, "get_classifier"):
        return ""
    head = model.get_classifier()
    return next((name for name, module in model.named_modules() if module is head), "")


def undecayed(model: nn.Module) -> set[str]:
    """Return the names of matrices and tables that weight decay leaves alone, besides biases and norms."""
    return set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()


def compile_parts(model: nn.Module) -> None:
    """Compile a network in place, part by part where it knows its parts; parameters keep their names."""
    model.compile_blocks() if hasattr(model, "compile_blocks") else model.compile()


def smallest_image(model: nn.Module) -> tuple[int, int]:
    """Return the height and width in pixels of the smallest image that a network takes."""
    return model.smallest_image if hasattr(model, "smallest_image") else (1, 1)


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell a network which epoch begins, counted from 0, when a run starts or is resumed, too."""
    if hasattr(model, "set_epoch"):
        model.set_epoch(epoch)


def taken_over(model: nn.Module, weights: dict[str, Tensor]) -> TakenOver:
    """Return weights of a network of another kind under the names of `model`."""
    return model.take_over(weights) if takes_over(model) else TakenOver(weights)


def takes_over(model: nn.Module) -> bool:
    """Return whether a network takes weights under other names than its own."""
    return hasattr(model, "take_over")


def position_tables(model: nn.Module) -> dict[str, Resize]:
    """Return the parameters that are resized with the images or windows, by name, and how."""
    return model.position_tables() if hasattr(model, "position_tables") else {}


def input_convs(model: nn.Module) -> set[str]:
    """Return the dotted names of the layers that see the channels of the images."""
    if hasattr(model, "input_convs"):
        return model.input_convs()
    names = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()  # as timm says it
    return {names} if isinstance(names, str) else set(names)
