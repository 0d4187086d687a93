"""Initialisation of the DETR family for training from scratch."""

from __future__ import annotations

import math

from torch import nn

_PRIOR = 0.01  # initial class probability, so that the many queries without an object do not dominate the loss


def draw_weights(detector: nn.Module, size_bias: float | None = 0.0) -> None:
    """Initialise a detector of transformers as in the authors' code of DETR and its successors.

    transformers relies on checkpoints: it draws matrices, embeddings and RT-DETR's batch norm scales from a normal
    distribution with standard deviation 0.01 or 0.02. Here, matrices get Xavier's initialisation, embeddings a standard
    deviation of 1, and batch norm scales are 1. The last layers of box heads are 0, so that boxes start at their
    references. Other biases, and matrices that transformers initialises to 0, are not changed.

    Args:
        detector: the detector.
        size_bias: bias of width and height, before the sigmoid, in the box head of the first decoder layer, or in that
            of all layers if they share it. Deformable DETR without proposals has -2, for boxes of 0.12 of the image.
            None: the last layers of box heads get PyTorch's initialisation, as in DETR, which has no references.
    """
    for name, module in detector.named_modules():
        if isinstance(module, (nn.Embedding, nn.BatchNorm2d)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and (module.weight.is_meta or module.weight.any()):
            if "bbox" in name and len(module.weight) == 4:  # (cx, cy, w, h)
                first = "bbox_embed.0." in name
                _draw_box_layer(module, size_bias if first or size_bias is None else 0.0)
            else:
                nn.init.xavier_uniform_(module.weight)


def _draw_box_layer(layer: nn.Linear, size_bias: float | None) -> None:
    if size_bias is None:
        layer.reset_parameters()
    else:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        nn.init.constant_(layer.bias[2:], size_bias)


def set_prior(detector: nn.Module, num_classes: int) -> None:
    """Initialise class logits to a small probability (focal loss, arXiv 1708.02002)."""
    for name, module in detector.named_modules():
        if "class" in name and num_classes in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0)):
            nn.init.constant_(module.bias, -math.log((1 - _PRIOR) / _PRIOR))
