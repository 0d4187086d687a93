"""From a configuration to a model: the only place under `models` that knows the config."""

from __future__ import annotations

from typing import Any

from torch import nn

from .dat import DAT

MODELS = {"dat": DAT}


def build_model(config: Any) -> nn.Module:
    """Build the model that ``config.MODEL`` describes, on the CPU and in training mode.

    Args:
        config: configuration with ``MODEL.TYPE``, ``MODEL.DAT`` (the arguments of `DAT` by name) and
            ``TRAIN.USE_CHECKPOINT``.

    Raises:
        ValueError: the type is unknown, or an option of the architecture is not allowed.
    """
    if config.MODEL.TYPE not in MODELS:
        raise ValueError(f"MODEL.TYPE = {config.MODEL.TYPE!r} is unknown; choose one of {', '.join(MODELS)}")
    model = MODELS[config.MODEL.TYPE](**config.MODEL.DAT, use_checkpoint=config.TRAIN.USE_CHECKPOINT)
    size, smallest = config.DATA.IMG_SIZE, model.smallest_image
    if size < smallest:
        raise ValueError(f"DATA.IMG_SIZE = {size} leaves no pixel for the last stage; give at least {smallest}")
    return model
