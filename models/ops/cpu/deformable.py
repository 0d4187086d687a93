"""Deformable attention for CPUs: the bias as sums of rows of the table, the attention a few images at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..grids import query_grid
from ..precision import autocast_disabled
from .table_rows import crop_bias, separable_bias, table_columns, table_crops

SAVED = 1 << 22  # largest number of attention weights of a batch that is saved for the backward pass: 16 MiB
CACHED = 1 << 20  # attention weights of larger batches computed at a time: 4 MiB, which stay in the CPU cache
TOGETHER = 1 << 17  # attention weights of small images in one matrix product: 512 KiB
BLOCK = 1 << 23  # attention weights of a large image computed at a time: 32 MiB, or those of COLUMNS columns of queries
COLUMNS = 32  # the bias of a block is a sum of rows of a matrix with as many columns: shorter rows are slower


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    map_size: tuple[int, int],
    coordinates: str,
    scale: float,
    form: str,
) -> Tensor:
    """Compute `models.ops.deformable.deformable_attention` in the ``form`` ``crops`` or ``separable``."""
    table = table.to(positions.dtype)
    if form == "crops":
        places = (positions,)
        to_matrix, bias = partial(table_crops, map_size=map_size), partial(crop_bias, map_size=map_size)
    else:
        grid = query_grid(map_size, coordinates=coordinates, dtype=positions.dtype, device=positions.device)
        y, x = positions.repeat_interleave(len(table) // positions.shape[1], dim=1).unsqueeze(-1).unbind(-2)
        y = _table_axis(grid[:, 0, 0], y, table.shape[1])  # [B, heads, Ns, H]
        x = _table_axis(grid[0, :, 1], x, table.shape[2])
        places = (y, x)
        to_matrix, bias = table_columns, separable_bias
    with autocast_disabled(q.device.type):
        matrix = to_matrix(table)

        def attend(matrix: Tensor, q: Tensor, k: Tensor, v: Tensor, *places: Tensor) -> Tensor:
            return _BiasedAttention.apply(q, k, v, bias(matrix, *places), scale)

        # The intermediates of the separable bias need more memory than the weights.
        if form == "crops" and len(q) * _weights_per_image(q, k) <= SAVED:
            return attend(matrix, q, k, v, *places)
        if form == "separable":
            return _by_columns(partial(_checkpointed, attend, matrix), q, k, v, *places)
        return _checkpointed(attend, matrix, q, k, v, *places)


def _table_axis(query: Tensor, key: Tensor, length: int) -> Tensor:
    """Return the position on a table's axis for the displacement (query - key) / 2."""
    return ((query - key) / 2 + 1) * ((length - 1) / 2)


def _weights_per_image(q: Tensor, k: Tensor) -> int:
    return k.shape[1] * q.shape[1:3].numel()


def _by_columns(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return ``attend(q, k, v, y, x)``, for large images computed for some columns of queries at a time."""
    height, width = y.shape[-1], x.shape[-1]
    columns = max(COLUMNS, BLOCK * width // _weights_per_image(q, k))
    maps = q.unflatten(1, (height, width)).split(columns, dim=2)
    parts = [attend(part.flatten(1, 2), k, v, y, at) for part, at in zip(maps, x.split(columns, dim=-1), strict=True)]
    return torch.cat([part.unflatten(1, (height, -1)) for part in parts], dim=2).flatten(1, 2)


def _checkpointed(attend: Callable[..., Tensor], matrix: Tensor, q: Tensor, k: Tensor, *tensors: Tensor) -> Tensor:
    """Return ``attend(matrix, q, k, ...)``, computed for a few images at a time and recomputed in the backward pass."""
    images = max(1, CACHED // _weights_per_image(q, k))
    parts = zip(*(tensor.split(images) for tensor in (q, k, *tensors)), strict=True)
    return torch.cat(
        [checkpoint(attend, matrix, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    )


class _BiasedAttention(torch.autograd.Function):
    """Attention with a bias ``[B, heads, Ns, H*W]``, which is overwritten by the attention weights and saved.

    The axis of the keys comes before that of the queries, because the bias of a key is a map over the queries. A few
    images are processed at a time, so that their weights stay in the CPU cache.

    With weights ``P = softmax(S)``, ``S = scale K Q^T + bias`` and output ``O = P^T V``, the gradient ``G`` of ``O``
    gives

        dV = P G        dP = V G^T      dS = P * (dP - sum over keys of P * dP)
        dQ = scale dS^T K               dK = scale dS Q                 dbias = dS

    Logits and the tensors of the softmax backward have the precision of the bias, at least float32.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):  # noqa: ANN001
        weights, out = bias.detach(), torch.empty_like(q)
        for queries, keys, values, image_weights, result in _few_images(q, k, v, weights, out):
            maps, values = image_weights.flatten(0, 1), _by_head(values)
            _biased_softmax_(maps, _by_head(queries), _by_head(keys), scale)
            _write(torch.bmm(maps.to(v.dtype).mT, values), result)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):  # noqa: ANN001
        q, k, v, weights = ctx.saved_tensors
        dq, dk, dv, dbias = (torch.empty_like(tensor) for tensor in (q, k, v, weights))
        for *inputs, image_weights, to_q, to_k, to_v, to_bias in _few_images(q, k, v, grad, weights, dq, dk, dv, dbias):
            queries, keys, values, grads = map(_by_head, inputs)
            maps = image_weights.flatten(0, 1)
            _write(torch.bmm(maps.to(v.dtype), grads), to_v)
            dweights = values.to(weights.dtype) @ grads.to(weights.dtype).mT
            dlogits = torch.ops.aten._softmax_backward_data.out(
                dweights, maps, 1, weights.dtype, grad_input=to_bias.flatten(0, 1)
            ).to(q.dtype)
            _write(torch.bmm(dlogits, queries), to_k)
            _write(torch.bmm(dlogits.mT, keys), to_q)
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, dbias, None


def _few_images(q: Tensor, k: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return an iterator over a few images of all tensors at a time: as many as a cache of a core holds."""
    images = max(1, TOGETHER // _weights_per_image(q, k))
    return zip(*(tensor.split(images) for tensor in (q, k, *tensors)), strict=True)


def _by_head(x: Tensor) -> Tensor:
    """Return ``[images, N, heads, d]`` as ``[images * heads, N, d]``: a view of one image, a copy of several."""
    return x.transpose(1, 2).flatten(0, 1)


def _write(x: Tensor, out: Tensor) -> None:
    """Write ``[images * heads, N, d]`` to ``[images, N, heads, d]``."""
    out.transpose(1, 2).copy_(x.view(len(out), out.shape[2], *x.shape[1:]))


def _biased_softmax_(bias: Tensor, q: Tensor, k: Tensor, scale: float) -> None:
    """Replace a bias ``[images * heads, Ns, Nq]`` in place by the softmax over the keys of ``scale k q^T + bias``."""
    if bias.dtype == q.dtype:
        bias.baddbmm_(k, q.mT, alpha=scale)
    else:
        bias.add_(k.to(bias.dtype) @ q.to(bias.dtype).mT, alpha=scale)
    torch.softmax(bias, dim=1, out=bias)
