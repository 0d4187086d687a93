"""The config knows the options of the Vision Transformer as the network declares them."""

from __future__ import annotations

import inspect

from config import default_config
from models.vit import VisionTransformer


def test_the_config_has_the_arguments_and_their_defaults() -> None:
    parameters = inspect.signature(VisionTransformer).parameters
    declared = {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in parameters.items()
        if name not in ("img_size", "use_checkpoint")  # of DATA and TRAIN
    }
    assert dict(default_config().MODEL.VIT) == declared
