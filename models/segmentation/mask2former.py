"""Mask2Former (Cheng et al., arXiv 2112.01527), built from Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from ..backbone import DATBackbone, TimmBackbone
from ..options import at_least
from ..ranks import all_ranks_factor
from ..transformers_config import build_config, check_names
from .parts import IGNORED, Segmenter, resize

_WITHOUT_EFFECT = {
    *("backbone_config", "ignore_value", "init_std", "init_xavier_std"),
    *("output_auxiliary_logits", "use_auxiliary_loss"),
}
_EMBEDDINGS = (
    *("transformer.queries_embedder.weight", "transformer.queries_features.weight"),
    *("transformer.level_embed.weight", "pixel_decoder.level_embed"),
)
_LOSSES = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}


class Mask2Former(Segmenter):
    """Queries that predict masks and their classes, which are combined to the class of each pixel.

    Built from parts of transformers' model, which accept any feature maps; the model itself builds its own backbone.

    Args:
        backbone: maps images to four feature maps.
        num_classes: number of classes, without "no object".
        **options: options of `transformers.Mask2FormerConfig`.

    Raises:
        ValueError: an option is unknown, or its value has the wrong type or is out of range.
    """

    gives_probabilities = True
    # Not a classifier in the sense of `get_classifier`, whose rows are the classes: the last row is "no object".
    sized_by_classes = ("decode_head.class_predictor.",)

    def __init__(self, backbone: DATBackbone | TimmBackbone, *, num_classes: int, **options: Any) -> None:
        super().__init__(backbone)
        check_names("mask2former", options, Mask2FormerConfig.__annotations__.keys() - _WITHOUT_EFFECT)
        strides = {"feature_strides": backbone.strides, "common_stride": backbone.strides[0]}
        config = build_config("mask2former", Mask2FormerConfig, num_labels=num_classes, **{**strides, **options})
        at_least(1).require("num_queries of mask2former", config.num_queries)
        self.decode_head = Mask2FormerHead(config, backbone.channels)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters exempt from weight decay: embeddings, as in the authors' code."""
        return super().no_weight_decay() | {f"decode_head.{name}" for name in _EMBEDDINGS}

    def logits(self, maps: list[Tensor]) -> Tensor:
        masks, classes = self.decode_head(maps)
        size = [self.backbone.strides[0] * side for side in masks[-1].shape[-2:]]
        return torch.einsum("bqk,bqhw->bkhw", classes[-1].softmax(-1)[..., :-1], resize(masks[-1], size).sigmoid())

    def losses(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return classification, mask and dice loss for labels ``[B, H, W]``, each summed over the decoder's layers."""
        masks, classes = self.decode_head(maps)
        with torch.autocast(labels.device.type, enabled=False):
            return self.decode_head.losses([x.float() for x in masks], [x.float() for x in classes], labels)


class Mask2FormerHead(Mask2FormerPreTrainedModel):
    """Pixel decoder, transformer decoder, classifier of the queries, and the loss, initialised as in transformers."""

    def __init__(self, config: Mask2FormerConfig, channels: list[int]) -> None:
        super().__init__(config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, channels)
        self.transformer = Mask2FormerTransformerModule(config.feature_size, config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        weights = config.class_weight, config.mask_weight, config.dice_weight
        self.criterion = Mask2FormerLoss(config, dict(zip(_LOSSES.values(), weights, strict=True)))
        self.post_init()

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return mask logits ``[B, queries, h, w]`` and class logits ``[B, queries, classes + 1]`` of each layer."""
        pixels = self.pixel_decoder(maps)
        found = self.transformer(pixels.multi_scale_features, pixels.mask_features, output_hidden_states=True)
        classes = [self.class_predictor(x.transpose(0, 1)) for x in found.intermediate_hidden_states]
        return list(found.masks_queries_logits), classes

    def losses(self, masks: list[Tensor], classes: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted losses for labels ``[B, H, W]``; every class of an image is one target mask.

        Mask and dice loss are divided by the mean number of target masks over ranks, as in the authors' code.
        """
        present = [found[found != IGNORED] for found in (image.unique() for image in labels)]
        wanted = [(image == found[:, None, None]).float() for image, found in zip(labels, present, strict=True)]
        earlier = [
            {"masks_queries_logits": m, "class_queries_logits": c}
            for m, c in zip(masks[:-1], classes[:-1], strict=True)
        ]
        terms = self.criterion(masks[-1], classes[-1], wanted, present, earlier)
        losses = {
            name: self.criterion.weight_dict[key] * sum(term for n, term in terms.items() if n.startswith(key))
            for name, key in _LOSSES.items()
        }
        factor = all_ranks_factor(sum(map(len, present)), labels.device)
        return {name: loss if name == "class" else factor * loss for name, loss in losses.items()}
