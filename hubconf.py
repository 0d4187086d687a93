"""The published models for `torch.hub`: ``torch.hub.load("path/to/this/folder", "dat_tiny", source="local")``."""

from models.registry import ENTRYPOINTS

dependencies = ["torch", "timm", "einops", "yaml"]
globals().update(ENTRYPOINTS)
