"""Conversion of weights of mmdetection 2 to the names and layouts of these detectors."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# mmdetection's names and ours; `{}` stands for a matched group.
_NAMES = (
    (r"neck\.lateral_convs\.(\d+)\.conv", "neck.fpn.inner_blocks.{}.0"),
    (r"neck\.fpn_convs\.(\d+)\.conv", "neck.fpn.layer_blocks.{}.0"),
    (r"rpn_head\.rpn_conv", "rpn.head.conv.0.0"),
    (r"rpn_head\.rpn_cls", "rpn.head.cls_logits"),
    (r"rpn_head\.rpn_reg", "rpn.head.bbox_pred"),
    (r"bbox_head\.cls_convs\.(\d+)\.conv", "head.classification_head.conv.{}.0"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv", "head.regression_head.conv.{}.0"),
    (r"bbox_head\.retina_cls", "head.classification_head.cls_logits"),
    (r"bbox_head\.retina_reg", "head.regression_head.bbox_reg"),
    (r"roi_head\.bbox_head\.shared_fcs\.0", "roi_heads.box_head.fc6"),
    (r"roi_head\.bbox_head\.shared_fcs\.1", "roi_heads.box_head.fc7"),
    (r"roi_head\.bbox_head\.fc_cls", "roi_heads.box_predictor.cls_score"),
    (r"roi_head\.bbox_head\.fc_reg", "roi_heads.box_predictor.bbox_pred"),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv", "roi_heads.mask_head.{}.0"),
    (r"roi_head\.mask_head\.upsample", "roi_heads.mask_predictor.conv5_mask"),
    (r"roi_head\.mask_head\.conv_logits", "roi_heads.mask_predictor.mask_fcn_logits"),
    (r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.0", "roi_heads.stages.{}.box_head.fc6"),
    (r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.1", "roi_heads.stages.{}.box_head.fc7"),
    (r"roi_head\.bbox_head\.(\d+)\.fc_cls", "roi_heads.stages.{}.cls_score"),
    (r"roi_head\.bbox_head\.(\d+)\.fc_reg", "roi_heads.stages.{}.bbox_pred"),
    (r"roi_head\.mask_head\.(\d+)\.convs\.(\d+)\.conv", "roi_heads.stages.{}.mask_head.{}.0"),
    (r"roi_head\.mask_head\.(\d+)\.upsample", "roi_heads.stages.{}.mask_predictor.conv5_mask"),
    (r"roi_head\.mask_head\.(\d+)\.conv_logits", "roi_heads.stages.{}.mask_predictor.mask_fcn_logits"),
)


def is_mmdetection(weights: dict[str, Tensor]) -> bool:
    """Return whether weights have the names of mmdetection."""
    return any(name.startswith("neck.lateral_convs.") for name in weights)


def from_mmdetection(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights of mmdetection; unknown names are not changed.

    The background is the last class in mmdetection. Here it is the first, with an unused box and mask.
    """
    laterals = sum(bool(re.fullmatch(r"neck\.lateral_convs\.\d+\.conv\.weight", name)) for name in weights)
    renamed = {}
    for name, value in weights.items():
        new = _renamed(name, laterals)
        if new.startswith("roi_heads."):
            value = _with_background_first(name, value)
        renamed[new] = value
    return renamed


def _renamed(name: str, laterals: int) -> str:
    module, _, kind = name.rpartition(".")
    for pattern, new in _NAMES:
        if match := re.fullmatch(pattern, module):
            module = new.format(*match.groups())
            break
    for level, extra in enumerate(("p6", "p7"), laterals):
        module = module.replace(f"neck.fpn.layer_blocks.{level}.0", f"neck.fpn.extra_blocks.{extra}")
    return f"{module}.{kind}"


def _with_background_first(name: str, value: Tensor) -> Tensor:
    if ".fc_cls." in name:
        return value.roll(1, dims=0)
    # Mask R-CNN has a box per class; the stages of a cascade, which have numbers, have one for all classes.
    rows = 1 if ".conv_logits." in name else 4 if ".bbox_head.fc_reg." in name else 0
    return torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
