"""Small networks with every letter and option."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.attention.letters import MIXERS
from models.dat import DAT

SMALL = {
    "img_size": 64,
    "num_classes": 10,
    "expansion": 2,
    "dim_stem": 8,
    "dims": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "heads": [1, 2, 4, 8],
    "heads_q": [1, 2, 4, 8],
    "groups": [1, 1, 2, 4],
    "window_sizes": [7, 7, 7, 7],
    "strides": [8, 4, 2, 1],
    "ksizes": [9, 7, 5, 3],
    "nat_ksizes": [7, 7, 7, 7],
    "offset_range_factor": [-1, -1, -1, -1],
    "use_pes": [True, True, True, True],
    "use_conv_patches": True,
}

# Letters and options that differ from SMALL; an option per stage is given as one value for all stages.
VARIANTS = [
    *((letter, {}) for letter in MIXERS),
    ("N", {"nat_rpb": False}),
    ("N", {"use_dwc_mlps": True, "use_lpus": True}),
    ("X", {"layer_scale_values": 0.1, "use_lpus": True}),
    ("Q", {"qna_activation": "sigmoid"}),
    ("Q", {"qna_activation": "linear"}),
    ("D", {"img_size": 32}),
    ("D", {"img_size": 32, "fixed_pes": True}),
    ("D", {"use_conv_patches": False, "layer_scale_values": 0.1}),
    ("D", {"use_pes": False}),
    ("D", {"log_cpb": True}),
    ("D", {"fixed_pes": True}),
    ("D", {"dwc_pes": True}),
    ("D", {"no_offs": True}),
    ("D", {"no_offs": True, "fixed_pes": True}),
    ("D", {"offset_range_factor": 2.0}),
    ("D", {"offset_range_factor": 0}),
    ("D", {"ksizes": 4, "strides": 4}),
    ("D", {"ksizes": 4, "strides": 4, "coordinates": "cvpr22"}),
    ("D", {"coordinates": "cvpr22"}),
    ("D", {"coordinates": "cvpr22", "offset_range_factor": 2}),
    ("D", {"coordinates": "cvpr22", "offset_range_factor": 0}),
]
SCALARS = {"img_size", "in_chans", "num_classes", "use_conv_patches", "nat_rpb", "qna_activation", "coordinates"}


def variant_id(variant: tuple[str, dict[str, Any]]) -> str:
    letter, options = variant
    return "-".join([letter, *(f"{name}={value}" for name, value in options.items())])


def build_small(letters: str, **options: Any) -> DAT:
    """Build a network with the same letters and options in all stages."""
    spread = {name: value if name in SCALARS else [value] * 4 for name, value in options.items()}
    return DAT(**{**SMALL, "depths": [len(letters)] * 4, "stage_spec": [letters] * 4, **spread})


def without_gradient(model: nn.Module) -> list[str]:
    """Return the trainable parameters that a backward pass left without a gradient or with one that is not finite."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all())
    ]
