"""Pure functions on tensors. Every operation has a reference form and may have faster ones."""

from .multi_scale import ms_deform_attn

__all__ = ["ms_deform_attn"]
