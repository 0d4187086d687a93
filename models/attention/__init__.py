"""The token mixers, each of which ``stage_spec`` names by a letter.

A mixer maps ``[B, C, H, W]`` to ``[B, C, H, W]``. To add one, write a module that registers its letter (see `letters`)
and import it here.
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
