"""Attention whose weights are products of features of queries and keys, in time linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .locality import Window, window_mask, window_sum

FORMS = ("auto", "sums", "reference")
VANISHED = 1e-30  # sum of weights below which the quotient is meaningless and its gradient not finite
AT_ONCE = 1 << 22  # numbers of the sums around all patches held at a time: 16 MiB in float32
SUM_OVER_WEIGHT = 8  # a matrix of tokens may have one number for so many of the sums around patches


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int = 0,
    window: Window | None = None,
    form: str = "auto",
) -> Tensor:
    """Return ``sum_j (q_i . k_j) v_j / sum_j (q_i . k_j)`` over the keys j that query i sees.

    Without a window, the sums of ``k_j v_j^T`` over all keys are computed once. With a window, there is one for every
    patch, see `models.ops.locality`.

    Args:
        q: features of the queries, ``[B, heads, N, m]``, not negative.
        k: features of the keys, ``[B, heads, N, m]``, not negative.
        v: values ``[B, heads, N, d]``.
        grid: height and width of the grid of patches.
        prefix: number of tokens before the patches.
        window: keys visible to a patch, or None for all.
        form: how sums over windows are computed: ``sums`` in linear time, ``reference`` with a matrix of tokens, and
            ``auto`` uses `choose_form`.

    Returns:
        ``[B, heads, N, d]`` in the dtype of the features.
    """
    v = F.pad(v.to(k.dtype), (0, 1), value=1.0)  # the last channel adds up the weights
    if window is None:
        return normalized(q @ (k.mT @ v))
    if (choose_form(*q.shape[2:], v.shape[3]) if form == "auto" else form) == "reference":
        return normalized((q @ k.mT * window_mask(grid, prefix, window, device=q.device)) @ v)
    return normalized(in_parts(partial(_windowed, grid=grid, prefix=prefix, window=window), q, k, v))


def choose_form(tokens: int, features: int, channels: int) -> str:
    """Return the form for sums over windows: a matrix only where its rows are far shorter than the sums are large."""
    return "reference" if SUM_OVER_WEIGHT * tokens <= features * channels else "sums"


def in_parts(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
    """Return ``attend(q, k, v, *others)``, some heads, images and features at a time if it needs much memory.

    Each part is recomputed in the backward pass.

    Args:
        attend: returns weighted sums of the values, ``[..., N, d]``, as a sum over features; uses ``m * d`` numbers for
            each token.
        q: features of the queries, ``[B, heads, N, m]``.
        k: features of the keys, ``[B, heads, N, m]``.
        v: values ``[B, heads, N, d]``.
        *others: further tensors, ``[B, heads, ...]``.
    """
    heads, per_feature = q.shape[:2].numel(), q.shape[2] * v.shape[3]
    at_once = max(1, min(k.shape[3], AT_ONCE // max(per_feature, 1)))
    count = max(1, AT_ONCE // max(per_feature * at_once, 1))
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or (at_once == k.shape[3] and count >= heads):
        return attend(q, k, v, *others)
    anew = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
    sums = []
    for q_part, k_part, *rest in zip(*(x.flatten(0, 1).split(count) for x in (q, k, v, *others)), strict=True):
        pieces = zip(q_part.split(at_once, dim=-1), k_part.split(at_once, dim=-1), strict=True)
        sums.append(sum(anew(q_piece, k_piece, *rest) for q_piece, k_piece in pieces))
    return torch.cat(sums).view(v.shape)


def normalized(sums: Tensor) -> Tensor:
    """Divide weighted sums ``[..., d+1]`` by the sum of weights, their last channel; 0 where all weights vanished."""
    return sums[..., :-1] / sums[..., -1:].clamp_min(VANISHED)


def _windowed(q: Tensor, k: Tensor, v: Tensor, *, grid: tuple[int, int], prefix: int, window: Window) -> Tensor:
    products = k.unsqueeze(-1) * v.unsqueeze(-2)  # [..., N, m, d + 1]
    dim = products.dim() - 3
    around = window_sum(products.narrow(dim, prefix, products.shape[dim] - prefix), grid, window, dim)
    if not prefix:
        return (q.unsqueeze(-2) @ around).squeeze(-2)
    around = around + products.narrow(dim, 0, prefix).sum(dim, keepdim=True)
    of_prefix, of_patches = q.split((prefix, q.shape[-2] - prefix), dim=-2)
    return torch.cat((of_prefix @ products.sum(dim), (of_patches.unsqueeze(-2) @ around).squeeze(-2)), dim=-2)
