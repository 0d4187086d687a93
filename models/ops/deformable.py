"""Attention from every pixel to the keys sampled at deformed positions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .grids import query_grid
from .position_bias import table_bias


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
        form: ``reference`` samples the table at every displacement; ``auto`` takes the fastest form for the shape.

    Returns:
        ``[B, H*W, heads, d]``.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} of deformable attention is unknown; choose one of {', '.join(FORMS)}")
    grid = query_grid(map_size, coordinates=coordinates, dtype=positions.dtype, device=positions.device)
    return attention(q, k, v, table_bias(table, grid, positions), scale=scale, dropout=dropout)


FORMS = ("auto", "reference")
