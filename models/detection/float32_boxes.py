"""Boxes of transformers' detectors in float32, also under autocast.

Half precision rounds coordinates to 1/256 of an image, and those of a pixel above 128 to whole pixels.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..ops.precision import autocast_disabled

# Layers that compute boxes or reference points, and layers whose outputs become the input of encoder or decoder:
# transformers computes grids of pixels in its dtype.
_BOXES = re.compile(
    r"(^|\.)(bbox_predictor|bbox_embed(\.\d+)?|(enc|pre)_bbox_head|integral|reference_points|ref_point_head)$"
)
_MAPS = re.compile(r"(^|\.)(decoder_)?input_proj\.\d+$")


def compute_boxes_in_float32(detector: PreTrainedModel) -> None:
    """Let a detector of transformers compute boxes in the dtype of its weights, even if autocast is on."""
    for name, module in detector.named_modules():
        if _BOXES.search(name) and not isinstance(module, nn.ModuleList):
            module.forward = partial(_without_autocast, module)
        elif _MAPS.search(name):
            module.register_forward_hook(partial(_as_weights, detector))


def _without_autocast(layer: nn.Module, *inputs: Tensor) -> Tensor:
    dtype = next((parameter.dtype for parameter in layer.parameters()), inputs[0].dtype)
    with autocast_disabled(inputs[0].device.type):
        return type(layer).forward(layer, *(x.to(dtype) for x in inputs))


def _as_weights(detector: PreTrainedModel, _layer: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
    return out.to(detector.dtype)
