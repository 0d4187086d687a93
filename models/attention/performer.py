"""Attention in linear time with random features: the Performer's FAVOR+ (arXiv 2009.14794)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.forms import check_form
from ..ops.linear_attention import FORMS, linear_attention
from ..ops.precision import autocast_disabled, widen
from ..ops.random_features import features, orthogonal_directions
from .tokens import TokenAttention


class RandomDirections(nn.Module):
    """Orthogonal Gaussian directions that can be redrawn.

    The state dict holds the seed instead of the directions: averaging the weights of a model, for example, would
    destroy the distribution of the directions. They follow the seed in `draw` and when a state dict is loaded, but not
    when ``source`` is written in place.

    Args:
        count: number of directions.
        dim: size of a direction.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.count, self.dim = count, dim
        seed = int(torch.randint(2**31, (), device="cpu"))
        self.register_buffer("source", torch.tensor([seed, 0]))  # seed, number of the draw
        self.register_buffer("directions", torch.empty(count, dim), persistent=False)
        self.draw(0)
        self.register_load_state_dict_post_hook(_draw_loaded)

    @torch.no_grad()
    def draw(self, number: int) -> None:
        """Draw directions; the same number gives the same directions. On the meta device there are none to draw."""
        if self.source.is_meta:
            return
        self.source[1] = number
        seed = int(self.source[0]) + 2**31 * number
        self.directions.copy_(orthogonal_directions(self.count, self.dim, seed))

    def forward(self) -> Tensor:
        """Return the current directions ``[count, dim]``."""
        return self.directions


def _draw_loaded(module: RandomDirections, _: object) -> None:
    """Draw the directions that belong to loaded weights. A function, because lambdas cannot be pickled."""
    if module.directions.is_meta:  # the module was built on the meta device
        module.directions = torch.empty_like(module.directions, device=module.source.device)
    module.draw(int(module.source[1]))


class PerformerAttention(TokenAttention):
    """Attention whose weights are dot products of random features.

    Args:
        dim: channels.
        num_features: random features per head; 0 for ``d ln d``, with d channels per head.
        feature_kind: ``positive``, which approximates softmax attention, or ``relu``.
        redraw_epochs: interval in epochs at which `set_epoch` redraws the features; 0 for never.
        form: how sums over windows and position terms are computed: ``sums`` in linear time, ``reference`` with an
            N x N matrix, or ``auto``, the cheaper of both.
        **options: see `TokenAttention`.

    Raises:
        ValueError: the form is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_features: int = 0,
        feature_kind: str = "positive",
        redraw_epochs: int = 1,
        form: str = "auto",
        **options: Any,
    ) -> None:
        check_form(form, FORMS, "linear attention")
        super().__init__(dim, **options)
        width = dim // self.heads
        self.form = form
        self.feature_kind = feature_kind
        self.redraw_epochs = redraw_epochs
        self.random = RandomDirections(num_features or max(1, round(width * math.log(width))), width)

    def set_epoch(self, epoch: int) -> None:
        """Draw the features of an epoch, counted from 0.

        Also needed by a copy of a network whose tensors are written in place, such as a moving average of its weights.
        """
        if self.redraw_epochs:
            self.random.draw(epoch // self.redraw_epochs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with autocast_disabled(q.device.type):
            q, k = self.features(q, "query"), self.features(k, "key")
            return linear_attention(q, k, v, grid=self.grid, prefix=self.prefix, window=self.window, form=self.form)

    def features(self, x: Tensor, role: str) -> Tensor:
        """Return the features ``[B, heads, N, m]`` of queries or keys ``[B, heads, N, d]``, at least float32."""
        return features(widen(x) * self.scale, self.random(), kind=self.feature_kind, role=role)

    @property
    def scale(self) -> float:
        """Factor of queries and keys; its square is the usual scale of their products."""
        return (self.qkv.in_features // self.heads) ** -0.25
