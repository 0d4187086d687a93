"""Attention from every pixel to the keys sampled at deformed positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .grids import query_grid
from .position_bias import table_bias
from .table_rows import crop_bias, separable_bias, table_columns, table_crops

KEPT = 1 << 22  # attention weights of a batch that are kept for the backward pass at most: 16 MiB
# Of larger batches, the weights that are made at a time:
CACHED = 1 << 20  # on a CPU, 4 MiB, so that they stay in the cache
AT_ONCE = 1 << 24  # elsewhere, 64 MiB, little beside the network and enough to fill a GPU
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
            `models.ops.table_rows`, and make the attention weights anew in the backward pass; of small batches
            ``crops`` keeps them. They have no dropout. ``auto`` takes `choose_form`.

    Returns:
        ``[B, H*W, heads, d]``.

    Raises:
        ValueError: the form is unknown or cannot do what is asked for.
    """
    if form == "auto":
        form = choose_form(map_size, table, coordinates=coordinates, clamped=clamped, dropout=dropout)
    elif form not in FORMS:
        raise ValueError(f"form {form!r} of deformable attention is unknown; choose one of {', '.join(FORMS)}")
    elif form != "reference" and dropout:
        raise ValueError(f"form {form!r} of deformable attention has no dropout; choose auto or reference")
    elif form == "crops" and not (clamped and _is_native(map_size, table, coordinates)):
        raise ValueError("form 'crops' of deformable attention needs clamped positions and a map as the table's")
    grid = query_grid(map_size, coordinates=coordinates, dtype=positions.dtype, device=positions.device)
    if form == "reference":
        return attention(q, k, v, table_bias(table, grid, positions), scale=scale, dropout=dropout)

    heads_per_group = len(table) // positions.shape[1]
    table = table.to(positions.dtype)
    y, x = positions.repeat_interleave(heads_per_group, dim=1).unbind(-1)  # [B, heads, Ns]
    if form == "crops":
        y, x = _table_axis(grid[0, 0, 0], y, table.shape[1]), _table_axis(grid[0, 0, 1], x, table.shape[2])
        to_matrix, bias = partial(table_crops, map_size=map_size), partial(crop_bias, map_size=map_size)
    else:
        y = _table_axis(grid[:, 0, 0], y.unsqueeze(-1), table.shape[1])  # [B, heads, Ns, H]
        x = _table_axis(grid[0, :, 1], x.unsqueeze(-1), table.shape[2])
        to_matrix, bias = table_columns, separable_bias
    with torch.autocast(q.device.type, enabled=False):
        matrix = to_matrix(table)

        def attend(matrix: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, x: Tensor) -> Tensor:
            return _BiasedAttention.apply(q, k, v, bias(matrix, y, x), scale)

        # What the bias of the separable form is made of takes more memory than the weights.
        if form == "crops" and len(q) * _weights_of_an_image(q, k) <= KEPT:
            return attend(matrix, q, k, v, y, x)
        return _make_anew(attend, matrix, q, k, v, y, x)


def choose_form(
    map_size: tuple[int, int], table: Tensor, *, coordinates: str, clamped: bool = False, dropout: float = 0.0
) -> str:
    """Return the form that `deformable_attention` takes for ``auto``: the fastest on CPUs that keeps no displacement.

    In a compiled graph it is the plain form, which the compiler fuses; what that keeps is the compiler's choice.
    """
    if dropout or torch.compiler.is_compiling():
        return "reference"
    return "crops" if clamped and _is_native(map_size, table, coordinates) else "separable"


def _is_native(map_size: tuple[int, int], table: Tensor, coordinates: str) -> bool:
    return coordinates == "dat++" and table.shape[1:] == tuple(2 * length - 1 for length in map_size)


def _table_axis(query: Tensor, key: Tensor, length: int) -> Tensor:
    """Return the cell of a table's axis that holds the bias of the displacement (query - key) / 2."""
    return ((query - key) / 2 + 1) * ((length - 1) / 2)


def _weights_of_an_image(q: Tensor, k: Tensor) -> int:
    return k.shape[1] * q.shape[1:3].numel()


def _make_anew(attend: Callable[..., Tensor], matrix: Tensor, q: Tensor, k: Tensor, *tensors: Tensor) -> Tensor:
    """Return ``attend(matrix, q, k, ...)``, a few images at a time, each part of which is made anew in the backward."""
    images = max(1, (CACHED if q.device.type == "cpu" else AT_ONCE) // _weights_of_an_image(q, k))
    parts = zip(*(tensor.split(images) for tensor in (q, k, *tensors)), strict=True)
    anew = partial(checkpoint, attend, matrix, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([anew(*part) for part in parts])


class _BiasedAttention(torch.autograd.Function):
    """Attention with a bias ``[B, heads, Ns, H*W]``, in whose memory the weights are written, that keeps the weights.

    They have the keys first, as the bias of a key is a map of the queries. A CPU works on an image at a time, to stay
    in the cache.

    With weights ``P = softmax(S)``, ``S = scale K Q^T + bias`` and output ``O = P^T V``, the gradient ``G`` of ``O``
    gives

        dV = P G        dP = V G^T      dS = P * (dP - sum over keys of P * dP)
        dQ = scale dS^T K               dK = scale dS Q                 dbias = dS

    Logits, and what meets them in the softmax's backward, have the precision of the bias, at least float32.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):  # noqa: ANN001
        weights, out = bias.detach(), torch.empty_like(q)
        for part in _parts(q):
            queries, keys, values = (_by_head(tensor[part]) for tensor in (q, k, v))
            part_weights = _weights(weights[part].flatten(0, 1), queries, keys, scale)
            _multiply(part_weights.to(v.dtype).mT, values, out[part])
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        q, k, v, weights = ctx.saved_tensors
        dq, dk, dv, dbias = (torch.empty_like(tensor) for tensor in (q, k, v, weights))
        for part in _parts(q):
            queries, keys, values, grads = (_by_head(tensor[part]) for tensor in (q, k, v, grad))
            part_weights = weights[part].flatten(0, 1)
            _multiply(part_weights.to(v.dtype), grads, dv[part])
            dweights = _product(values, grads.mT, weights.dtype)
            dlogits = torch.ops.aten._softmax_backward_data.out(
                dweights, part_weights, 1, weights.dtype, grad_input=dbias[part].flatten(0, 1)
            ).to(q.dtype)
            _multiply(dlogits, queries, dk[part])
            _multiply(dlogits.mT, keys, dq[part])
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, dbias, None


def _parts(x: Tensor) -> list[slice]:
    """Return the images of a batch that are worked on at a time."""
    images = 1 if x.device.type == "cpu" else max(1, len(x))
    return [slice(first, first + images) for first in range(0, len(x), images)]


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # [B, N, heads, d] -> [B * heads, N, d]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a @ b [B * heads, N, d]`` to ``out [B, N, heads, d]``."""
    if len(out) == 1:
        torch.bmm(a, b, out=out[0].transpose(0, 1))
    else:
        out.transpose(1, 2).copy_((a @ b).unflatten(0, (len(out), -1)))


def _weights(bias: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the softmax over the keys of ``scale k q^T + bias [B * heads, Ns, Nq]``, in the memory of the bias."""
    if bias.dtype == q.dtype:
        bias.baddbmm_(k, q.mT, alpha=scale)
    else:
        bias.add_(_product(k, q.mT, bias.dtype), alpha=scale)
    return torch.softmax(bias, dim=1, out=bias)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a @ b`` that is never rounded to less than ``dtype``."""
    if a.is_cuda and a.dtype != dtype:
        return torch.bmm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
