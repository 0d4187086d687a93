"""Deformable attention for sequences, images and volumes: the names of the package ``deformable-attention``."""

from .attention.deformable_nd import (
    DeformableAttention,
    DeformableAttention1D,
    DeformableAttention2D,
    DeformableAttention3D,
)

__all__ = ["DeformableAttention", "DeformableAttention1D", "DeformableAttention2D", "DeformableAttention3D"]
