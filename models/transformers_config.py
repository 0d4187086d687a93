"""Configs of transformers from the arguments of a user, which transformers itself hardly checks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .options import did_you_mean


def check_names(name: str, arguments: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Check the names of arguments: transformers ignores unknown ones.

    Args:
        name: the network's name, for the message.
        arguments: the arguments given by the user.
        allowed: names of the arguments that have an effect.

    Raises:
        ValueError: an argument is not allowed.
    """
    for argument in arguments:
        if argument not in allowed:
            raise ValueError(f"{name} does not take the argument {argument!r}{did_you_mean(argument, allowed)}")


def build_config(name: str, cls: type[PreTrainedConfig], **options: Any) -> Any:
    """Return a config of class ``cls`` for the network ``name``.

    Raises:
        ValueError: an option has the wrong type, or options contradict each other.
    """
    try:
        return cls(**options)
    except StrictDataclassError as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
