"""Attention modules: the token mixers, which ``stage_spec`` names by letters, and others.

A mixer maps ``[B, C, H, W]`` to ``[B, C, H, W]``. To add one, write a module that registers its letter (see `letters`)
and import it here. The other modules have no letter: multi-scale deformable attention (`ms_deform_attn`), deformable
attention in 1, 2 and 3 dimensions (`deformable_nd`), and the attentions of the Vision Transformer (`tokens`,
`performer`, `disentangled`, `patch_deformable`).
"""

from . import convnext  # noqa: F401
from .deformable import DeformableAttention
from .ms_deform_attn import MSDeformAttn
from .neighborhood import NeighborhoodAttention
from .pyramid import PyramidAttention
from .qna import QueryAndAttend
from .slide import SlideAttention
from .window import WindowAttention

__all__ = [
    "DeformableAttention",
    "MSDeformAttn",
    "NeighborhoodAttention",
    "PyramidAttention",
    "QueryAndAttend",
    "SlideAttention",
    "WindowAttention",
]
