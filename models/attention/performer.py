"""Attention in linear time by random features: Performer, FAVOR+ (arXiv 2009.14794)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear_attention import FORMS, linear_attention
from ..ops.random_features import features, orthogonal_directions
from .tokens import TokenAttention


class RandomDirections(nn.Module):
    """Orthogonal Gaussian directions that can be redrawn.

    The checkpoint stores the seed instead of the directions, because averaging weights, for one, would corrupt them.

    Args:
        count: number of directions.
        dim: length of each.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.count, self.dim = count, dim
        self.register_buffer("source", torch.tensor([int(torch.randint(2**31, ())), 0]))  # seed, drawing
        self.register_buffer("directions", torch.empty(count, dim), persistent=False)
        self.draw(0)
        self.register_load_state_dict_post_hook(lambda module, _: module.draw(int(module.source[1])))

    @torch.no_grad()
    def draw(self, drawing: int) -> None:
        """Draw the directions of the given number, the same each time."""
        self.source[1] = drawing
        seed = int(self.source[0]) + 2**31 * drawing
        self.directions.copy_(orthogonal_directions(self.count, self.dim, seed))

    def forward(self) -> Tensor:
        return self.directions


class PerformerAttention(TokenAttention):
    """Attention with products of random features as weights.

    Args:
        num_features: random features per head; ``d ln d`` if None, with d channels per head.
        feature_kind: ``positive``, which approximates softmax attention, or ``relu``.
        redraw_epochs: interval in epochs at which the features are redrawn; 0 for never; never in evaluation.
        form: of sums over windows and position terms: ``sums`` in linear time, ``reference`` with a matrix of tokens,
            or ``auto``, the cheaper.
        **options: see `TokenAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_features: int | None = None,
        feature_kind: str = "positive",
        redraw_epochs: int = 1,
        form: str = "auto",
        **options: Any,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form {form!r} of attention is unknown; choose one of {', '.join(FORMS)}")
        super().__init__(dim, **options)
        width = dim // self.heads
        self.form = form
        self.feature_kind = feature_kind
        self.redraw_epochs = redraw_epochs
        self.random = RandomDirections(num_features or max(1, round(width * math.log(width))), width)

    def set_epoch(self, epoch: int) -> None:
        """Draw the features of this epoch."""
        if self.redraw_epochs:
            self.random.draw(epoch // self.redraw_epochs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q, k = self.features(q, "query"), self.features(k, "key")
            return linear_attention(q, k, v, grid=self.grid, prefix=self.prefix, window=self.window, form=self.form)

    def features(self, x: Tensor, role: str) -> Tensor:
        """Return the features ``[B, heads, N, m]`` of queries or keys ``[B, heads, N, d]``, at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return features(x.to(dtype) * self.scale, self.random(), kind=self.feature_kind, role=role)

    @property
    def scale(self) -> float:
        """Factor of queries and keys."""
        return (self.qkv.in_features // self.heads) ** -0.25
