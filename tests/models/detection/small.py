"""Arguments of small DETR detectors, and images with objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.backbone import DATBackbone
from models.detection.transformers_kinds import KINDS
from tests.models.small import SMALL

CLASSES = 3
DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


def small_arguments(name: str) -> dict[str, Any]:
    """Return the arguments of a small detector; some detectors name the width differently."""
    arguments = dict(DECODER)
    if name == "dab_detr":
        arguments["hidden_size"] = arguments.pop("d_model")
    if name in KINDS and KINDS[name].pyramid:
        arguments["encoder_hidden_dim"] = 32
    return {**arguments, ("two_stage_num_proposals" if name.endswith("two_stage") else "num_queries"): 20}


def small_backbone(*out_indices: int, **options: Any) -> DATBackbone:
    """Return a DAT with a neighborhood attention and a deformable attention."""
    return DATBackbone(**{**SMALL, "stage_spec": ["N", "N", "D", "D"], **options}, out_indices=out_indices)


def two_images() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return two images of different sizes, the second without an object."""
    images = [torch.rand(3, 64, 48), torch.rand(3, 60, 64)]
    boxes = torch.tensor([[4.0, 5.0, 30.0, 40.0], [20.0, 20.0, 40.0, 60.0]])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return images, [{"boxes": boxes, "labels": torch.tensor([0, 2])}, nothing]
