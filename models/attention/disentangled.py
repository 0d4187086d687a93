"""Disentangled attention (DeBERTa, arXiv 2006.03654, section 3.1) on a grid: exact, and with random features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear_attention import in_parts, normalized
from ..ops.locality import range_sum
from ..ops.precision import autocast_disabled, widen
from ..ops.relative_positions import Buckets, Relation, table_index
from .performer import PerformerAttention
from .tokens import TokenAttention

DENSE_SHARE = 8  # cost on a CPU of a number in the sums over patches, relative to one in an N x N matrix


class RelativeKeys(nn.Module):
    """The embeddings of relative positions, and their contribution to the logits.

    Args:
        dim: channels of an embedding.
        grid: number of rows and columns of patches.
        prefix: number of tokens before the patches.
        span: largest displacement with its own embedding, see `models.ops.relative_positions.Buckets`.
    """

    def __init__(self, dim: int, *, grid: tuple[int, int], prefix: int, span: int) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.buckets = Buckets(span, max(grid) - 1)
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(self.buckets.rows, dim), std=0.02))

    def forward(self, qkv: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
        """Return the embeddings as queries and as keys, ``[heads, rows, d]``, projected like the content."""
        q, k, _ = qkv(self.table).unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        return q, k

    def index(self, q: Tensor) -> Tensor:
        """Return the row of the table for each of the queries ``[B, heads, N, ...]`` and keys, ``[B, heads, N, N]``."""
        index = table_index(self.buckets.span, self.buckets.farthest, self.grid, self.prefix, q.device)
        return index.expand(*q.shape[:2], -1, -1)

    def bias(self, q: Tensor, k: Tensor, position_q: Tensor, position_k: Tensor) -> Tensor:
        """Return ``q_i . k(i - j) + k_j . q(j - i)``, ``[B, heads, N, N]``."""
        index = self.index(q)
        to_position = (q @ position_k.mT).gather(-1, index)
        return to_position + (k @ position_q.mT).gather(-1, index).mT


class DisentangledAttention(TokenAttention):
    """Attention whose logits are ``(q_i . k_j + q_i . k(i - j) + k_j . q(j - i)) / sqrt(3 d)``.

    Positions are projected like the content (``share_att_key`` in DeBERTa's code).

    Args:
        dim: channels.
        span: largest displacement with its own embedding.
        **options: see `TokenAttention`.
    """

    def __init__(self, dim: int, *, span: int = 4, **options: Any) -> None:
        super().__init__(dim, **options)
        self.relative = RelativeKeys(dim, grid=self.grid, prefix=self.prefix, span=span)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.mT + self.relative.bias(q, k, *self.relative(self.qkv, self.heads))
        mask = self.mask(q)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        weights = (logits * (3 * q.shape[-1]) ** -0.5).softmax(dim=-1)
        return F.dropout(weights, self.attn_drop, self.training).to(v.dtype) @ v


class DisentangledPerformer(PerformerAttention):
    """Disentangled attention whose content term is approximated by random features; its position terms are exact.

    With features f and the relative position r = r(i - j), the weight of key j for query i is

        f(q_i) . f(k_j)  exp(q_i . k(r) / s)  exp(k_j . q(-r) / s),        s = sqrt(3 d).

    The first exponential depends only on i and r, the second only on j and r. All keys with the same r lie in a
    rectangle of the grid, displaced from i, so sums of ``f(k_j) exp(k_j . q(-r) / s) v_j^T`` over them are computed
    from running sums, see `models.ops.locality`. There is one such sum for each of the R embeddings: time and memory
    are linear in the number of tokens, times R, the number of features and the number of channels. On small grids an
    N x N matrix is cheaper and gives the same result.

    Args:
        dim: channels.
        span: largest displacement with its own embedding; R is at most ``(4 * span - 1)^2 + 3``.
        **options: see `PerformerAttention`.
    """

    def __init__(self, dim: int, *, span: int = 2, **options: Any) -> None:
        super().__init__(dim, **options)
        self.relative = RelativeKeys(dim, grid=self.grid, prefix=self.prefix, span=span)

    @property
    def scale(self) -> float:
        """Factor of queries and keys."""
        return (3 * self.qkv.in_features // self.heads) ** -0.25

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with autocast_disabled(q.device.type):
            q, k, v = (widen(x) for x in (q, k, v))
            position_q, position_k = self.relative(self.qkv, self.heads)
            q_features, k_features = self.features(q, "query"), self.features(k, "key")
            by_query, by_key = (
                x @ positions.to(x.dtype).mT * self.scale**2 for x, positions in ((q, position_k), (k, position_q))
            )  # [B, heads, N, rows]
            # Subtracting a maximum per query, and one per head for all keys, cancels in the quotient.
            by_query = (by_query - by_query.detach().amax(-1, keepdim=True)).exp()
            by_key = (by_key - by_key.detach().amax((-2, -1), keepdim=True)).exp()
            attend = self._sums if self.choose_form(v.shape[2]) == "sums" else self._reference
            return normalized(attend(q_features, k_features, F.pad(v, (0, 1), value=1.0), by_query, by_key))

    def choose_form(self, tokens: int) -> str:
        """Return the form that is used for a number of tokens."""
        if self.form != "auto":
            return self.form
        dense = tokens <= DENSE_SHARE * self.relative.buckets.rows * min(self.random.dim, self.random.count)
        return "reference" if dense else "sums"

    def _reference(self, q: Tensor, k: Tensor, v: Tensor, by_query: Tensor, by_key: Tensor) -> Tensor:
        index = self.relative.index(q)
        weights = q @ k.mT * by_query.gather(-1, index) * by_key.gather(-1, index).mT
        mask = self.mask(q)
        return (weights if mask is None else weights * mask) @ v

    def _sums(self, q: Tensor, k: Tensor, v: Tensor, by_query: Tensor, by_key: Tensor) -> Tensor:
        rows, prefix = self.relative.buckets.rows, self.prefix
        sums = torch.zeros_like(v[:, :, prefix:])
        patches = [x[:, :, prefix:] for x in (q, k, v, by_query, by_key)]
        for relation in self._visible_relations():
            sums = sums + in_parts(partial(self._box, relation), *patches)
        if not prefix:
            return sums
        first = [x[:, :, :prefix] for x in (q, k, v, by_query, by_key)]
        of_prefix = self._pair(first, patches, rows - 3, rows - 2) + self._pair(first, first, rows - 1, rows - 1)
        return torch.cat((of_prefix, sums + self._pair(patches, first, rows - 2, rows - 3)), dim=2)

    @staticmethod
    def _pair(queries: Sequence[Tensor], keys: Sequence[Tensor], row: int, opposite: int) -> Tensor:
        """Return the weighted sums over all keys for all queries, where all pairs have the same relative position."""
        q, _, _, by_query, _ = queries
        _, k, v, _, by_key = keys
        return q @ ((k * by_key[..., opposite, None]).mT @ v) * by_query[..., row, None]

    def _box(self, relation: Relation, q: Tensor, k: Tensor, v: Tensor, by_query: Tensor, by_key: Tensor) -> Tensor:
        """Return the weighted sums over the keys of one relation, for the patches."""
        k = k * by_key[..., relation.opposite, None]
        around = (k.unsqueeze(-1) * v.unsqueeze(-2)).unflatten(-3, self.grid)  # [..., H, W, m, d + 1]
        for axis in (0, 1):
            around = range_sum(around, relation.low[axis], relation.high[axis], around.dim() - 4 + axis)
        around = around.flatten(-4, -3)
        return (q.unsqueeze(-2) @ around).squeeze(-2) * by_query[..., relation.index, None]

    def _visible_relations(self) -> Iterator[Relation]:
        """Yield the relations of the grid, restricted to the window."""
        for relation in self.relative.buckets.relations(self.grid):
            if self.window is None:
                yield relation
            elif self.window.kind == "box":
                yield from _within(relation, *[(-self.window.reach, self.window.reach)] * 2)
            else:  # a distance in the sequence allows other columns in every row
                for y in range(relation.low[0], relation.high[0] + 1):
                    nearest = -y * self.grid[1]
                    columns = nearest - self.window.reach, nearest + self.window.reach
                    yield from _within(relation, (y, y), columns)


def _within(relation: Relation, rows: tuple[int, int], columns: tuple[int, int]) -> Iterator[Relation]:
    """Yield a relation restricted to displacements within ranges, unless it is empty."""
    low = max(relation.low[0], rows[0]), max(relation.low[1], columns[0])
    high = min(relation.high[0], rows[1]), min(relation.high[1], columns[1])
    if low[0] <= high[0] and low[1] <= high[1]:
        yield relation._replace(low=low, high=high)
