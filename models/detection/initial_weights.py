"""Initialisation of the DETR family for training from scratch."""

from __future__ import annotations

import math

from torch import nn

_PRIOR = 0.01  # initial probability, so that the many queries without an object do not dominate the loss


def draw_weights(detector: nn.Module) -> None:
    """Initialise a detector of transformers as in the authors' code of DETR and its successors.

    transformers draws matrices and embeddings from a normal distribution of deviation 0.01 or 0.02, and RT-DETR's
    scales of batch norms likewise, to be replaced by those of a checkpoint. Here matrices are Xavier's, embeddings have
    deviation 1, scales are 1, and boxes begin at their references. Other biases, and what begins at 0, stay.
    """
    for name, module in detector.named_modules():
        if isinstance(module, (nn.Embedding, nn.BatchNorm2d)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.any():
            if "bbox" in name and len(module.weight) == len("xywh"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            else:
                nn.init.xavier_uniform_(module.weight)


def set_prior(detector: nn.Module, num_classes: int) -> None:
    """Initialise class logits to a small probability (focal loss, arXiv 1708.02002)."""
    for name, module in detector.named_modules():
        if "class" in name and num_classes in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0)):
            nn.init.constant_(module.bias, -math.log((1 - _PRIOR) / _PRIOR))
