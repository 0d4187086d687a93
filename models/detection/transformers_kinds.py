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
        class_weight: weight of its class loss if its config has no ``cls_loss_coefficient``.
        size_bias: initial bias of width and height without two stages, see `initial_weights.draw_weights`.
        proposals: option that sets the number of queries that are chosen from the pixels of all maps; empty if queries
            are learned. With two stages, Deformable DETR chooses them, too.
        without_effect: arguments of its config, besides `WITHOUT_EFFECT`, that have no effect here or, as
            ``learn_initial_query``, fail in transformers.
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
    without_effect: frozenset[str] = frozenset()


# The backbone, the initialisation, the operations and the losses of boxes are this project's.
WITHOUT_EFFECT = frozenset(
    {
        *("backbone_config", "num_channels", "dilation", "disable_custom_kernels"),
        *("init_std", "init_xavier_std", "initializer_range"),
        *("mask_loss_coefficient", "dice_loss_coefficient"),
        *("encoder_layerdrop", "is_encoder_decoder", "tie_word_embeddings"),
    }
)

_DEFORMABLE = partial(
    Kind,
    "DeformableDetr",
    maps=3,
    class_weight=2.0,
    size_bias=-2.0,
    without_effect=frozenset({"eos_coefficient", "max_position_embeddings", "return_intermediate"}),
)
_COSTS = {"class_cost": 2}  # as in the authors' code; 1 in transformers
_PYRAMID = partial(
    Kind,
    maps=3,
    masked=False,
    pyramid=True,
    proposals="num_queries",
    without_effect=frozenset({"eos_coefficient", "with_box_refine", "learn_initial_query"}),
)
KINDS = {
    "detr": Kind("Detr", background=True, size_bias=None, without_effect=frozenset({"decoder_layerdrop"})),
    "conditional_detr": Kind("ConditionalDetr"),
    "dab_detr": Kind(
        "DabDetr",
        defaults={"cls_loss_coefficient": 1},
        without_effect=frozenset({"initializer_bias_prior_prob", "query_dim"}),
    ),
    "deformable_detr": _DEFORMABLE(defaults=_COSTS),
    "deformable_detr_refined": _DEFORMABLE(defaults={**_COSTS, "with_box_refine": True}),
    "deformable_detr_two_stage": _DEFORMABLE(defaults={**_COSTS, "with_box_refine": True, "two_stage": True}),
    "rt_detr": _PYRAMID("RTDetr"),
    "d_fine": _PYRAMID("DFine"),
}
