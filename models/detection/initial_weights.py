"""Initialisation of the DETR family for training from scratch."""

from __future__ import annotations

import math

from torch import nn

_PRIOR = 0.01  # initial class probability, so that the many queries without an object do not dominate the loss


def draw_weights(detector: nn.Module) -> None:
    """Initialise a detector of transformers as in the authors' code of DETR and its successors.

    transformers relies on checkpoints: it draws matrices, embeddings and RT-DETR's batch norm scales from a normal
    distribution with standard deviation 0.01 or 0.02. Here, matrices get Xavier's initialisation, embeddings a standard
    deviation of 1, batch norm scales are 1, and the last layers of box heads are 0, so that boxes start at their
    references. Other biases, and matrices that transformers initialises to 0, are not changed.
    """
    for name, module in detector.named_modules():
        if isinstance(module, (nn.Embedding, nn.BatchNorm2d)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and (module.weight.is_meta or module.weight.any()):
            if "bbox" in name and len(module.weight) == 4:  # (cx, cy, w, h)
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            else:
                nn.init.xavier_uniform_(module.weight)


def set_prior(detector: nn.Module, num_classes: int) -> None:
    """Initialise class logits to a small probability (focal loss, arXiv 1708.02002)."""
    for name, module in detector.named_modules():
        if "class" in name and num_classes in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0)):
            nn.init.constant_(module.bias, -math.log((1 - _PRIOR) / _PRIOR))
