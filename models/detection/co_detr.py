"""Co-DETR: DINO with collaborative hybrid assignments (Zong et al., arXiv 2211.12860).

In training, two auxiliary heads with one-to-many assignment, ATSS and Faster R-CNN, process the maps of the encoder
(section 3.1), and their positive samples become additional queries of the decoder (section 3.2). In evaluation,
Co-DETR is the same as DINO.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from ..backbone import DATBackbone, TimmBackbone
from ..options import at_least, not_negative
from .atss import ATSSHead
from .dino import DINO, Memory
from .faster_rcnn_head import FasterRCNNHead
from .positives import as_queries
from .queries import Assignment, Queries, Targets

# Groups of the queries from the heads, see `Queries`: below MATCHED, so that they do not see the matched queries, and
# not PADDED.
GROUPS = {"atss": -2, "faster_rcnn": -3}


class CoDETR(DINO):
    """DINO with auxiliary heads in training.

    Args:
        backbone: maps images to feature maps; has ``channels`` and ``strides``.
        num_classes: number of classes, without "no object".
        positive_queries: largest number of positive samples per head and image that become queries.
        head_weight: weight of the losses of the heads: the second lambda of the paper, whose first lambda is 1. As in
            the authors' configs, it is multiplied by the number of decoder layers, over which the other losses are
            summed.
        **options: options of `DINO`.
    """

    sized_by_classes = (*DINO.sized_by_classes, "atss.class_logits.", "faster_rcnn.roi_heads.box_predictor.")

    def __init__(
        self,
        backbone: DATBackbone | TimmBackbone,
        *,
        num_classes: int,
        positive_queries: int = 100,
        head_weight: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, num_classes=num_classes, **options)
        at_least(1).require("positive_queries", positive_queries)
        not_negative().require("head_weight", head_weight)
        self.positive_queries, self.head_weight = positive_queries, head_weight
        config = self.transformer.config
        more = config.num_feature_levels - len(backbone.strides)
        self.strides = [*backbone.strides, *(backbone.strides[-1] << i for i in range(1, more + 1))]
        self.atss = ATSSHead(config.d_model, num_classes)
        self.faster_rcnn = FasterRCNNHead(config.d_model, num_classes, self.strides)
        self.positive_contents = nn.ModuleList(nn.Linear(config.d_model, config.d_model) for _ in range(2))

    def extra_queries(
        self, memory: Memory, truth: Targets, batch: ImageList
    ) -> tuple[list[Queries], dict[str, Assignment], dict[str, Tensor]]:
        extra, assignments, losses = super().extra_queries(memory, truth, batch)
        targets = truth.in_pixels(batch.image_sizes)
        maps = memory.maps()
        found = {
            "atss": self.atss(maps, self.strides, targets),
            "faster_rcnn": self.faster_rcnn(maps, batch, targets),
        }
        for i, (name, (named, positives)) in enumerate(found.items()):
            some = [one.at_most(self.positive_queries) for one in positives]
            queries, assignment = as_queries(some, batch.image_sizes, self.positive_contents[i], GROUPS[name])
            extra.append(queries)
            assignments[f"{name}_queries"] = assignment
            losses[name] = self.head_weight * self.transformer.config.decoder_layers * sum(named.values())
        return extra, assignments, losses
