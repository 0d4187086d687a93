"""Pure functions on tensors: every operation has a plain reference form and, if worthwhile, faster forms."""

from .multi_scale import ms_deform_attn

__all__ = ["ms_deform_attn"]
