"""Detectors of transformers on this project's backbones: DETR, Conditional, Deformable, DAB, RT-DETR and D-FINE."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from ..backbone import DATBackbone, TimmBackbone
from ..options import at_least
from ..ranks import all_ranks_factor
from ..transformers_config import build_config, check_names
from .backbone_adapter import AdapterConfig, adapt
from .float32_boxes import compute_boxes_in_float32
from .initial_weights import draw_weights, set_prior
from .set_prediction import SetDetector, best_boxes, image_mask, padded_sizes, relative_targets
from .transformers_kinds import KINDS, WITHOUT_EFFECT, Kind
from .transformers_losses import guarded_loss


class TransformersDetector(SetDetector):
    """A detector of transformers, with its losses, which are divided by the objects of all ranks.

    Args:
        kind: a name in `KINDS`.
        backbone: maps images to feature maps; has ``channels`` and ``strides``.
        num_classes: number of classes, without "no object".
        **arguments: arguments of the detector's config in transformers, such as ``num_queries``.

    Raises:
        ValueError: the kind or an argument is unknown, or arguments contradict each other.
    """

    sized_by_classes = (
        "detector.class_labels_classifier.",
        "detector.class_embed.",
        "detector.model.decoder.class_embed.",
        "detector.model.enc_score_head.",
        "detector.model.denoising_class_embed.",
    )

    def __init__(self, kind: str, backbone: DATBackbone | TimmBackbone, *, num_classes: int, **arguments: Any) -> None:
        self.maps = KINDS[kind].maps
        super().__init__(backbone)
        self.name, self.kind = kind, KINDS[kind]
        self.config = _configuration(kind, backbone, num_classes, arguments)
        self.detector = getattr(transformers, f"{self.kind.name}ForObjectDetection")(self.config)
        self._weights = {} if self.kind.pyramid else _weights(self.config, self.kind)
        self.detector.loss_function = partial(guarded_loss, self.detector.loss_function)
        two_stage = getattr(self.config, "two_stage", False)
        self._proposals = "two_stage_num_proposals" if two_stage else self.kind.proposals
        draw_weights(self.detector, 0.0 if two_stage else self.kind.size_bias)
        adapt(self.detector, backbone)
        compute_boxes_in_float32(self.detector)
        if not (self.kind.background or self.kind.pyramid):
            set_prior(self.detector, num_classes)

    def process(
        self, batch: ImageList, targets: Sequence[dict[str, Tensor]] | None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        inside = image_mask(batch)
        if not self.training:
            return best_boxes(*self.predict(batch.tensors, inside), batch, of_padded=not self.kind.masked)
        labels = relative_targets(targets, batch.image_sizes if self.kind.masked else padded_sizes(batch))
        out = self._run(batch.tensors, inside, labels=labels)
        factor = all_ranks_factor(sum(len(target["boxes"]) for target in labels), batch.tensors.device)
        losses = self._summed(out.loss_dict, factor)
        if self.kind.pyramid:
            losses["vfl"] = losses["vfl"] + self._zero()
        if getattr(self.config, "two_stage", False):
            losses["encoder"] = sum(self._summed(self._proposal_losses(out, labels), factor).values())
        return losses

    def predict(self, images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        out = self._run(images, inside)
        scores = out.logits.softmax(-1)[..., :-1] if self.kind.background else out.logits.sigmoid()
        return scores, out.pred_boxes

    def _run(self, images: Tensor, inside: Tensor, **labels: Any) -> Any:
        """Return the output of the detector in transformers."""
        mask = {"pixel_mask": inside.long()} if self.kind.masked else {}
        with self._at_most_all_pixels(*images.shape[-2:]) if self._proposals else nullcontext():
            return self.detector(images, **mask, **labels)

    @contextmanager
    def _at_most_all_pixels(self, height: int, width: int) -> Iterator[None]:
        """Choose no more queries from the pixels of all maps than there are, for padded images of this size.

        transformers reads their number from the config in each forward pass.
        """
        strides = list(self.backbone.strides)
        while len(strides) < self.config.num_feature_levels:
            strides.append(2 * strides[-1])
        pixels = sum(math.ceil(height / stride) * math.ceil(width / stride) for stride in strides)
        wanted = getattr(self.config, self._proposals)
        if pixels < wanted:
            setattr(self.config, self._proposals, int(pixels))  # an int also if the size is symbolic
        try:
            yield
        finally:
            setattr(self.config, self._proposals, wanted)

    def _zero(self) -> Tensor | float:
        """Return 0 as a function of the contents of the denoising queries.

        transformers has no denoising queries if the batch has no objects. DistributedDataParallel needs a gradient of
        every parameter on every rank, though, so theirs is then zero.
        """
        contents = getattr(self.detector.model, "denoising_class_embed", None)
        return 0.0 if contents is None else 0.0 * contents.weight.sum()

    def _summed(self, named: dict[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
        """Return the weighted losses, summed over layers by kind.

        Args:
            named: losses of transformers.
            factor: factor of the losses that are divided by the number of objects, see `all_ranks_factor`.
        """
        sums: dict[str, Tensor] = {}
        for name, value in named.items():
            measure = re.match(r"loss_[a-z]+", name)
            if measure:
                weight = self._weights.get(measure[0], 1.0)
                short = measure[0].removeprefix("loss_")
                sums[short] = sums.get(short, 0.0) + weight * value
        # Cross-entropy with "no object" and D-FINE's distillation are means, not divided by the number of objects.
        means = {"ddf", "ce"} if self.kind.background else {"ddf"}
        return {name: loss if name in means else factor * loss for name, loss in sums.items()}

    def _proposal_losses(self, out: Any, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the losses of the proposals of two-stage models, which transformers omits (section A.4 of the paper).

        Proposals have only one class, "object", whose label is 0.
        """
        logits, boxes = out.enc_outputs_class, out.enc_outputs_coord_logits.sigmoid()
        objects = [{**target, "class_labels": torch.zeros_like(target["class_labels"])} for target in labels]
        layers = logits[None], boxes[None]  # a single layer: no auxiliary losses
        return self.detector.loss_function(logits, objects, logits.device, boxes, self.config, *layers)[1]


def _configuration(kind: str, backbone: DATBackbone | TimmBackbone, num_classes: int, arguments: dict[str, Any]) -> Any:
    """Return the config of a detector."""
    cls, channels = getattr(transformers, f"{KINDS[kind].name}Config"), list(backbone.channels)
    given = {"auxiliary_loss": True, **KINDS[kind].defaults, **arguments}
    fixed = {"backbone_config": AdapterConfig(channels=channels), "num_labels": num_classes}
    if KINDS[kind].pyramid:
        fixed |= {
            "encoder_in_channels": channels,
            "feat_strides": list(backbone.strides),
            "encode_proj_layers": [len(channels) - 1],
            "decoder_in_channels": [given.get("encoder_hidden_dim", 256)] * len(channels),
            "num_feature_levels": len(channels),
            "freeze_backbone_batch_norms": False,
        }
    unused = {*fixed, *WITHOUT_EFFECT, *KINDS[kind].without_effect}
    if "two_stage" in cls.__annotations__:
        unused.add("num_queries" if given.get("two_stage") else "two_stage_num_proposals")
    check_names(kind, arguments, cls.__annotations__.keys() - unused)
    config = build_config(kind, cls, **given, **fixed)
    if config.decoder_layers < 2:
        raise ValueError(f"decoder_layers = {config.decoder_layers} of {kind} is not allowed; give at least 2")
    for name, smallest in {
        "num_queries": 1,
        "two_stage_num_proposals": 1,
        "encoder_layers": 0,
        "num_feature_levels": len(channels),
    }.items():
        if hasattr(config, name):
            at_least(smallest).require(f"{name} of {kind}", getattr(config, name))
    return config


def _weights(config: Any, kind: Kind) -> dict[str, float]:
    """Return the loss weights by name. RT-DETR and D-FINE apply them themselves."""
    return {
        "loss_ce": getattr(config, "cls_loss_coefficient", kind.class_weight),
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
