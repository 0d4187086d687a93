"""Neighborhood attention of tiles for CPUs, a few images at a time."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..caching import cached_tensors
from ..precision import at_least_float32
from ..tiles import Tiles, tiles_of

SIZES = 48  # cached indices: those of a map of 200 x 334 pixels and 4 heads take about 15 MB
CACHED = 1 << 19  # attention weights of small images computed at a time: 2 MiB, which stay in the CPU cache


class TiledAttention(torch.autograd.Function):
    """Attention of tiles, a few images at a time to stay in the CPU cache. Saves its arguments and the weights.

    With weights ``P = softmax(S)``, ``S = scale Q K^T + bias`` and output ``O = P V`` of every tile, the gradient ``G``
    of ``O`` gives

        dV = P^T G      dP = G V^T      dS = P * (dP - sum over keys of P * dP)
        dQ = scale dS K                 dK = scale dS^T Q               dbias = sum over images of dS

    ``dK`` and ``dV`` of overlapping windows are summed. The gradient of the table is summed in at least float32.
    """

    @staticmethod
    def forward(ctx, q, k, v, rpb, scale, keep):  # noqa: ANN001
        tiles, maps = _choose_tiles(q, rpb)
        bias, out = tiles.bias(rpb).to(q.dtype), q.new_empty(q.shape)
        q, k, v, results = (_stack(x, maps) for x in (q, k, v, out))
        weights = q.new_empty(len(q) if keep else 1, len(bias) * tiles.count, *bias.shape[2:])
        q_rows, k_rows, v_rows, out_rows = (TileRows.of(tiles, x) for x in (q, k, v, results))
        for stack in range(len(q)):
            logits = tiles.expand_bias(bias, out=weights[stack if keep else 0])
            logits.baddbmm_(q_rows.cut(q[stack]), k_rows.windows(k[stack]).mT, alpha=scale)
            torch.softmax(logits, dim=-1, out=logits)
            out_rows.join(torch.bmm(logits, v_rows.windows(v[stack])), out=results[stack])
        if keep:
            ctx.save_for_backward(q, k, v, weights)
            ctx.tiles, ctx.maps, ctx.scale, ctx.table_dtype = tiles, maps, scale, rpb.dtype
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):  # noqa: ANN001
        q, k, v, kept = ctx.saved_tensors
        tiles, scale, shape, grad = ctx.tiles, ctx.scale, grad.shape, _stack(grad, ctx.maps)
        dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))  # [B/maps, maps*H*W, heads, d]
        dbias = kept.new_zeros(kept.shape[1:], dtype=at_least_float32(ctx.table_dtype))
        q_rows, k_rows, v_rows, grad_rows, rows = (TileRows.of(tiles, x) for x in (q, k, v, grad, dq))
        for stack, weights in enumerate(kept):
            grads = grad_rows.cut(grad[stack], zeros_beyond=True)
            dv[stack] = rows.sum_windows(torch.bmm(weights.mT, grads))
            dweights = torch.bmm(grads, v_rows.windows(v[stack]).mT)
            dlogits = torch.ops.aten._softmax_backward_data(dweights, weights, 2, weights.dtype)
            rows.join(torch.bmm(dlogits, k_rows.windows(k[stack])), out=dq[stack])
            dk[stack] = rows.sum_windows(torch.bmm(dlogits.mT, q_rows.cut(q[stack])))
            dbias += dlogits
        dq, dk, dv = (x.view(shape) for x in (dq.mul_(scale), dk.mul_(scale), dv))
        return dq, dk, dv, tiles.sum_by_cell(dbias, q.shape[2]), None, None


def _choose_tiles(q: Tensor, rpb: Tensor) -> tuple[Tiles, int]:
    """Return the tiles of as many images at a time as the cache holds and the batch divides into, and their number."""
    batch, height, width, heads, _ = q.shape
    arguments = (height, width), (rpb.shape[-1] + 1) // 2, q.device
    one = tiles_of(*arguments)
    weights = heads * one.count * one.queries_per_tile * one.keys_per_tile
    maps = max((n for n in range(1, batch + 1) if batch % n == 0 and n * weights <= CACHED), default=1)
    return tiles_of(*arguments, maps), maps


def _stack(x: Tensor, maps: int) -> Tensor:
    """Return maps ``[B, H, W, heads, d]`` as ``[B/maps, maps*H*W, heads, d]``, see `_with_rows`."""
    return _with_rows(x).unflatten(0, (-1, maps)).flatten(1, 2)


def _with_rows(x: Tensor) -> Tensor:
    """Return a map ``[B, H, W, heads, d]`` as ``[B, H*W, heads, d]``, where every head of a pixel is a contiguous row.

    This is a view if the map is contiguous, or one of the queries, keys and values that a joint layer computed.
    """
    x, dim = x.flatten(1, 2), x.shape[-1]
    return x if x.stride()[2:] == (dim, 1) and x.stride(1) % dim == 0 else x.contiguous()


class TileRows:
    """`Tiles` of maps ``[pixels, heads, d]`` for all heads at once: every head of a pixel is copied as a row.

    Args:
        tiles: the tiles of the map.
        heads: number of heads.
        pitch: number of rows from one pixel to the next: ``heads``, or more if other tensors lie in between.
    """

    def __init__(self, tiles: Tiles, heads: int, pitch: int) -> None:
        self._tiles, self._heads, self._pitch = tiles, heads, pitch
        head = torch.arange(heads, device=tiles.keys.device)
        self._queries = (head[:, None] + tiles.queries * pitch).flatten()
        self._keys = (head[:, None] + tiles.keys * pitch).flatten()
        self._places = (tiles.places[:, None] + head * len(tiles.queries)).flatten()

    @staticmethod
    def of(tiles: Tiles, x: Tensor) -> TileRows:
        """Return the rows of the tiles of maps ``[B, H*W, heads, d]``."""
        return _tile_rows(tiles, x.shape[2], x.stride(1) // x.shape[3])

    def cut(self, x: Tensor, *, zeros_beyond: bool = False) -> Tensor:
        """Return the queries of every tile, ``[heads * tiles, queries_per_tile, d]``.

        Queries beyond the map are zero with ``zeros_beyond``, otherwise they repeat its last row and column.
        """
        queries = self._rows(x).index_select(0, self._queries)
        if zeros_beyond and len(self._tiles.beyond):
            queries.view(self._heads, -1, x.shape[-1]).index_fill_(1, self._tiles.beyond, 0.0)
        return queries.view(-1, self._tiles.queries_per_tile, x.shape[-1])

    def join(self, x: Tensor, *, out: Tensor) -> None:
        """Undo `cut`: write ``[heads * tiles, queries_per_tile, d]`` to ``out``, a contiguous ``[H*W, heads, d]``."""
        torch.index_select(x.view(-1, x.shape[-1]), 0, self._places, out=out.view(-1, x.shape[-1]))

    def windows(self, x: Tensor) -> Tensor:
        """Return the keys of every tile, ``[heads * tiles, keys_per_tile, d]``."""
        return self._rows(x).index_select(0, self._keys).view(-1, self._tiles.keys_per_tile, x.shape[-1])

    def sum_windows(self, x: Tensor) -> Tensor:
        """Sum the keys of all tiles by pixel, ``[H*W, heads, d]``: the gradient of `windows`."""
        by_pixel, pixels = _keys_by_pixel(self._tiles, self._heads)
        dim = x.shape[-1]
        return F.embedding_bag(by_pixel, x.view(-1, dim), pixels, mode="sum").view(-1, self._heads, dim)

    def _rows(self, x: Tensor) -> Tensor:
        """Return an image as rows ``[rows, d]``, including those of other tensors in between."""
        pixels, heads, dim = x.shape
        return x.as_strided(((pixels - 1) * self._pitch + heads, dim), (dim, 1))


@partial(cached_tensors, entries=SIZES)
def _tile_rows(tiles: Tiles, heads: int, pitch: int) -> TileRows:
    return TileRows(tiles, heads, pitch)


@partial(cached_tensors, entries=SIZES)
def _keys_by_pixel(tiles: Tiles, heads: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the keys of all tiles, sorted by pixel and head, and where each of these begins."""
    head = torch.arange(heads, device=tiles.keys.device)
    pixels = (head[:, None] + tiles.keys * heads).flatten()
    by_pixel = pixels.argsort(stable=True)
    return by_pixel, torch.searchsorted(pixels[by_pixel], torch.arange(len(tiles.places) * heads, device=head.device))
