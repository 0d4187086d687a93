"""Attention from every pixel to the keys sampled at deformed positions."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .grids import query_grid
from .position_bias import table_bias
from .table_rows import crop_bias, separable_bias, table_columns, table_crops

CACHED = 1 << 20  # logits of the images that are worked on at a time on a CPU: 4 MiB, so that they stay in the cache
FORMS = ("auto", "reference", "crops", "separable")


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, dropout: float = 0.0) -> Tensor:
    """Return ``softmax(scale q k^T + bias) v``.

    Args:
        q: queries ``[B, Nq, heads, d]``.
        k: keys ``[B, Ns, heads, d]``.
        v: values ``[B, Ns, heads, d]``.
        bias: added to the logits, broadcastable to ``[B, heads, Nq, Ns]``, or None.
        scale: factor of the products.
        dropout: probability of dropping an attention weight.

    Returns:
        ``[B, Nq, heads, d]``.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale).transpose(1, 2)


def deformable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    map_size: tuple[int, int],
    coordinates: str,
    scale: float,
    dropout: float = 0.0,
    clamped: bool = False,
    form: str = "auto",
) -> Tensor:
    """Attend to sampled keys with the relative position bias of a table (DAT, arXiv 2201.00520, section 3.2).

    Args:
        q: queries ``[B, H*W, heads, d]``.
        k: keys ``[B, Ns, heads, d]``.
        v: values ``[B, Ns, heads, d]``.
        positions: where the keys were sampled, ``[B, g, Ns, 2]``, (y, x), at least float32.
        table: ``[heads, 2*H0-1, 2*W0-1]``, made for a map of H0 x W0.
        map_size: ``(H, W)`` of the queries.
        coordinates: convention of the query grid, see `models.ops.grids`.
        scale: factor of the products.
        dropout: probability of dropping an attention weight.
        clamped: whether all positions are known to lie in [-1, 1], which ``crops`` needs.
        form: ``reference`` samples the table at every displacement and keeps all of them for the backward pass.
            ``separable`` and, on maps of the size that the table was made for, ``crops`` never hold a displacement, see
            `models.ops.table_rows`, and keep nothing of the size of the attention weights. ``auto`` takes the fastest.

    Returns:
        ``[B, H*W, heads, d]``.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} of deformable attention is unknown; choose one of {', '.join(FORMS)}")
    if form == "auto":
        form = choose_form(map_size, table, coordinates=coordinates, clamped=clamped, dropout=dropout)
    grid = query_grid(map_size, coordinates=coordinates, dtype=positions.dtype, device=positions.device)
    if form == "reference":
        return attention(q, k, v, table_bias(table, grid, positions), scale=scale, dropout=dropout)

    heads_per_group = len(table) // positions.shape[1]
    table = table.to(positions.dtype)
    y, x = positions.repeat_interleave(heads_per_group, dim=1).unbind(-1)  # [B, heads, Ns]
    if form == "crops":
        y, x = _table_axis(grid[0, 0, 0], y, table.shape[1]), _table_axis(grid[0, 0, 1], x, table.shape[2])
        rows, bias = partial(table_crops, map_size=map_size), partial(crop_bias, map_size=map_size)
    else:
        y = _table_axis(grid[:, 0, 0], y.unsqueeze(-1), table.shape[1])  # [B, heads, Ns, H]
        x = _table_axis(grid[0, :, 1], x.unsqueeze(-1), table.shape[2])
        rows, bias = table_columns, separable_bias
    images = max(1, CACHED // (k.shape[1] * q[0, ..., 0].numel())) if q.device.type == "cpu" else len(q)
    return _BiasedAttention.apply(q, k, v, table, y, x, rows, bias, scale, images)


def choose_form(
    map_size: tuple[int, int], table: Tensor, *, coordinates: str, clamped: bool = False, dropout: float = 0.0
) -> str:
    """Return the form that `deformable_attention` takes for ``auto``."""
    if dropout or torch.compiler.is_compiling():
        return "reference"  # a compiler fuses it, and recomputes the displacements by itself
    native = coordinates == "dat++" and table.shape[1:] == tuple(2 * length - 1 for length in map_size)
    return "crops" if native and clamped else "separable"


def _table_axis(query: Tensor, key: Tensor, length: int) -> Tensor:
    """Return the cell of a table's axis that holds the bias of the displacement (query - key) / 2."""
    return ((query - key) / 2 + 1) * ((length - 1) / 2)


class _BiasedAttention(torch.autograd.Function):
    """Attention with a bias made from a table, a few images at a time, that keeps only its arguments for the backward.

    Logits and weights have the keys first, ``[images * heads, Ns, H*W]``, as the bias of a key is a map of the queries.
    With weights ``P = softmax(S)``, ``S = scale K Q^T + bias`` and output ``O = P^T V``, the gradient ``G`` of ``O``
    gives

        dV = P G        dP = V G^T      dS = P * (dP - sum over keys of P * dP)
        dQ = scale dS^T K               dK = scale dS Q                 dbias = dS

    Bias, ``S`` and ``P`` are computed anew; autograd carries ``dbias`` on to the table and the positions.
    """

    @staticmethod
    def forward(ctx, q, k, v, table, y, x, rows, bias, scale, images):  # noqa: ANN001
        ctx.save_for_backward(q, k, v, table, y, x)
        ctx.rows, ctx.bias, ctx.scale, ctx.images = rows, bias, scale, images
        matrix = rows(table)
        out = q.new_empty(q.shape)
        for part in _parts(len(q), images):
            queries, keys, values = (_by_head(tensor[part]) for tensor in (q, k, v))
            weights = _weights(bias(matrix, y[part], x[part]).flatten(0, 1), queries, keys, scale)
            _write(out[part], weights.to(v.dtype).mT @ values)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        q, k, v, table, y, x = ctx.saved_tensors
        scale = ctx.scale
        dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
        dy, dx = torch.empty_like(y), torch.empty_like(x)
        with torch.enable_grad():
            table = table.detach().requires_grad_()
            matrix = ctx.rows(table)
        dmatrix = torch.zeros_like(matrix)
        for part in _parts(len(q), ctx.images):
            queries, keys, values, grads = (_by_head(tensor[part]) for tensor in (q, k, v, grad))
            with torch.enable_grad():
                sources = [tensor.detach().requires_grad_() for tensor in (matrix, y[part], x[part])]
                bias = ctx.bias(*sources).flatten(0, 1)
            weights = _weights(bias.detach(), queries, keys, scale)
            _write(dv[part], weights.to(v.dtype) @ grads)
            dlogits = (values @ grads.mT).to(weights.dtype)
            dlogits = torch._softmax_backward_data(dlogits, weights, 1, weights.dtype)
            to_matrix, dy[part], dx[part] = torch.autograd.grad(bias, sources, dlogits)
            dmatrix += to_matrix
            dlogits = dlogits.to(q.dtype)
            _write(dk[part], dlogits @ queries)
            _write(dq[part], dlogits.mT @ keys)
        (dtable,) = torch.autograd.grad(matrix, table, dmatrix)
        return dq.mul_(scale), dk.mul_(scale), dv, dtable, dy, dx, None, None, None, None


def _parts(batch: int, images: int) -> list[slice]:
    return [slice(first, first + images) for first in range(0, batch, images)]


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # [B, N, heads, d] -> [B * heads, N, d]


def _write(x: Tensor, by_head: Tensor) -> None:
    """Undo `_by_head` into ``x [B, N, heads, d]``."""
    x.transpose(1, 2).copy_(by_head.view(len(x), -1, *by_head.shape[1:]))


def _weights(bias: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the softmax over the keys of ``scale k q^T + bias [B * heads, Ns, Nq]``, in the memory of the bias."""
    if bias.dtype == q.dtype:
        bias.baddbmm_(k, q.mT, alpha=scale)
    else:
        bias.add_(k @ q.mT, alpha=scale)
    return torch.softmax(bias, dim=1, out=bias)
