"""The detectors of Hugging Face transformers by name; the library itself is not needed to name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A detector of transformers.

    Attributes:
        name: of its classes there, before `Config` and `ForObjectDetection`.
        maps: how many maps of the backbone it uses, the last ones.
        defaults: its arguments where they differ from those of transformers.
        background: it has a class for "no object" and a softmax, instead of a sigmoid for each class.
        masked: it knows which pixels are padding, and its boxes are shares of the image without it.
        pyramid: it is told channels and strides of its maps, and begins with a prior probability of its own.
        class_weight: of its loss of classes in its paper; transformers always has 1.
    """

    name: str
    maps: int = 1
    defaults: dict[str, Any] = field(default_factory=dict)
    background: bool = False
    masked: bool = True
    pyramid: bool = False
    class_weight: float = 1.0


_DEFORMABLE = partial(Kind, "DeformableDetr", maps=3, class_weight=2.0)
KINDS = {
    "detr": Kind("Detr", background=True),
    "conditional_detr": Kind("ConditionalDetr", class_weight=2.0),
    "dab_detr": Kind("DabDetr"),
    "deformable_detr": _DEFORMABLE(),
    "deformable_detr_refined": _DEFORMABLE(defaults={"with_box_refine": True}),
    "deformable_detr_two_stage": _DEFORMABLE(defaults={"with_box_refine": True, "two_stage": True}),
    "rt_detr": Kind("RTDetr", maps=3, masked=False, pyramid=True),
    "d_fine": Kind("DFine", maps=3, masked=False, pyramid=True),
}
