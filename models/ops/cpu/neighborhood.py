"""Neighborhood attention of tiles for CPUs, one image at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..caching import cached_tensors
from ..tiles import Tiles


class TiledAttention(torch.autograd.Function):
    """Attention of tiles, one image at a time, so that it stays in the CPU cache. Saves its arguments and the weights.

    With weights ``P = softmax(S)``, ``S = scale Q K^T + bias`` and output ``O = P V`` of every tile, the gradient ``G``
    of ``O`` gives

        dV = P^T G      dP = G V^T      dS = P * (dP - sum over keys of P * dP)
        dQ = scale dS K                 dK = scale dS^T Q               dbias = sum over images of dS

    ``dK`` and ``dV`` of overlapping windows are summed. Sums over images have the precision of the table.
    """

    @staticmethod
    def forward(ctx, q, k, v, rpb, tiles, scale, keep):  # noqa: ANN001
        bias, out = tiles.bias(rpb).to(q.dtype), q.new_empty(q.shape)
        q, k, v, results = (_with_rows(x) for x in (q, k, v, out))
        weights = q.new_empty(len(q) if keep else 1, len(bias) * tiles.count, *bias.shape[2:])
        q_rows, k_rows, v_rows, out_rows = (TileRows.of(tiles, x) for x in (q, k, v, results))
        for image in range(len(q)):
            logits = tiles.expand_bias(bias, out=weights[image if keep else 0])
            logits.baddbmm_(q_rows.cut(q[image]), k_rows.windows(k[image]).mT, alpha=scale)
            torch.softmax(logits, dim=-1, out=logits)
            out_rows.join(torch.bmm(logits, v_rows.windows(v[image])), out=results[image])
        if keep:
            ctx.save_for_backward(q, k, v, weights)
            ctx.tiles, ctx.scale, ctx.table_dtype = tiles, scale, rpb.dtype
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):  # noqa: ANN001
        q, k, v, kept = ctx.saved_tensors
        tiles, scale, grad = ctx.tiles, ctx.scale, _with_rows(grad)
        dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))  # [B, H*W, heads, d]
        dbias = kept.new_zeros(kept.shape[1:], dtype=ctx.table_dtype)
        q_rows, k_rows, v_rows, grad_rows, rows = (TileRows.of(tiles, x) for x in (q, k, v, grad, dq))
        for image, weights in enumerate(kept):
            grads = grad_rows.cut(grad[image], zeros_beyond=True)
            dv[image] = rows.sum_windows(torch.bmm(weights.mT, grads))
            dweights = torch.bmm(grads, v_rows.windows(v[image]).mT)
            dlogits = torch._softmax_backward_data(dweights, weights, 2, weights.dtype)
            rows.join(torch.bmm(dlogits, k_rows.windows(k[image])), out=dq[image])
            dk[image] = rows.sum_windows(torch.bmm(dlogits.mT, q_rows.cut(q[image])))
            dbias += dlogits
        dq, dk, dv = (x.unflatten(1, tiles.size) for x in (dq.mul_(scale), dk.mul_(scale), dv))
        return dq, dk, dv, tiles.sum_by_cell(dbias, q.shape[2]), None, None, None


def _with_rows(x: Tensor) -> Tensor:
    """Return a map ``[B, H, W, heads, d]`` as ``[B, H*W, heads, d]``, where every head of a pixel is a contiguous row.

    This is a view if the map is contiguous, or one of the queries, keys and values that a joint layer computed.
    """
    x, dim = x.flatten(1, 2), x.shape[-1]
    return x if x.stride()[2:] == (dim, 1) and x.stride(1) % dim == 0 else x.contiguous()


class TileRows:
    """`Tiles` of one image ``[H*W, heads, d]`` for all heads at once: every head of a pixel is copied as a row.

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
        pixels = (head[:, None] + tiles.keys * heads).flatten()
        self._by_pixel = pixels.argsort(stable=True)
        self._pixels = torch.searchsorted(pixels[self._by_pixel], torch.arange(len(self._places), device=head.device))

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
        dim = x.shape[-1]
        return F.embedding_bag(self._by_pixel, x.view(-1, dim), self._pixels, mode="sum").view(-1, self._heads, dim)

    def _rows(self, x: Tensor) -> Tensor:
        """Return an image as rows ``[rows, d]``, including those of other tensors in between."""
        pixels, heads, dim = x.shape
        return x.as_strided(((pixels - 1) * self._pitch + heads, dim), (dim, 1))


@cached_tensors
def _tile_rows(tiles: Tiles, heads: int, pitch: int) -> TileRows:
    return TileRows(tiles, heads, pitch)
