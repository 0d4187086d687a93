"""The Deformable Attention Transformer family; importing it registers the published models with timm."""

from . import registry
from .build import build_model
from .dat import DAT

__all__ = ["DAT", "build_model", "registry"]
