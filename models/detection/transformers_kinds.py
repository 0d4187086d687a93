"""The detectors of Hugging Face transformers by name, without importing the library."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A detector of transformers.

    Attributes:
        name: prefix of its classes ``...Config`` and ``...ForObjectDetection``.
        maps: number of feature maps that it uses, the coarsest of the backbone.
        defaults: arguments whose default differs from that of transformers.
        background: whether it has a class "no object" and a softmax, instead of a sigmoid per class.
        masked: whether it uses a padding mask; boxes are then relative to the image without padding.
        pyramid: whether it is configured with channels and strides of its maps and sets its own prior probability.
        class_weight: weight of its class loss in the paper; in transformers it is always 1.
        size_bias: initial bias of width and height without two stages, see `initial_weights.draw_weights`.
        proposals: option that sets the number of queries that are chosen from the pixels of all maps; empty if queries
            are learned. With two stages, Deformable DETR chooses them, too.
    """

    name: str
    maps: int = 1
    defaults: dict[str, Any] = field(default_factory=dict)
    background: bool = False
    masked: bool = True
    pyramid: bool = False
    class_weight: float = 1.0
    size_bias: float | None = 0.0
    proposals: str = ""


_DEFORMABLE = partial(Kind, "DeformableDetr", maps=3, class_weight=2.0, size_bias=-2.0)
_PYRAMID = partial(Kind, maps=3, masked=False, pyramid=True, proposals="num_queries")
KINDS = {
    "detr": Kind("Detr", background=True, size_bias=None),
    "conditional_detr": Kind("ConditionalDetr", class_weight=2.0),
    "dab_detr": Kind("DabDetr"),
    "deformable_detr": _DEFORMABLE(),
    "deformable_detr_refined": _DEFORMABLE(defaults={"with_box_refine": True}),
    "deformable_detr_two_stage": _DEFORMABLE(defaults={"with_box_refine": True, "two_stage": True}),
    "rt_detr": _PYRAMID("RTDetr"),
    "d_fine": _PYRAMID("DFine"),
}
