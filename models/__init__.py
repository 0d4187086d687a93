"""The Deformable Attention Transformer family; importing it registers the published models with timm."""

from . import registry
from .dat import DAT

__all__ = ["DAT", "__version__", "registry"]
__version__ = "1.0.0"  # the only declaration; pyproject.toml reads it
