"""The Deformable Attention Transformer family."""

from .build import build_model

__all__ = ["build_model"]
