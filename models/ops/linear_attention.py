"""Attention whose weights are products of features of queries and keys, in time linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .forms import check_form
from .locality import Window, window_mask, window_sum

FORMS = ("auto", "sums", "reference")
SMALLEST_SUM = 1e-30  # smallest divisor: below it the quotient is meaningless and its gradient not finite
AT_ONCE = 1 << 22  # numbers in the sums over windows that are held at a time: 16 MiB in float32
SUM_OVER_WEIGHT = 8  # an N x N matrix is used if the sums over windows have at least this many times its numbers


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
    """Return ``sum_j (q_i . k_j) v_j / sum_j (q_i . k_j)`` over the keys j that query i attends to.

    Without a window, the sum of ``k_j v_j^T`` over all keys is computed once. With a window, every patch has its own
    sum, see `models.ops.locality`.

    Args:
        q: features of the queries, ``[B, heads, N, m]``, not negative.
        k: features of the keys, ``[B, heads, N, m]``, not negative.
        v: values ``[B, heads, N, d]``.
        grid: height and width of the grid of patches.
        prefix: number of tokens before the patches.
        window: keys visible to a patch, or None for all.
        form: how sums over windows are computed: ``sums`` in linear time, ``reference`` with an N x N matrix. ``auto``
            uses `choose_form`.

    Returns:
        ``[B, heads, N, d]`` in the dtype of the features.

    Raises:
        ValueError: the form is unknown.
    """
    check_form(form, FORMS, "linear attention")
    v = F.pad(v.to(k.dtype), (0, 1), value=1.0)  # the last channel sums the weights
    if window is None:
        return normalized(q @ (k.mT @ v))
    if (choose_form(*q.shape[2:], v.shape[3]) if form == "auto" else form) == "reference":
        return normalized((q @ k.mT * window_mask(grid, prefix, window, device=q.device)) @ v)
    return normalized(in_parts(partial(_windowed, grid=grid, prefix=prefix, window=window), q, k, v))


def choose_form(tokens: int, features: int, channels: int) -> str:
    """Return the form that `linear_attention` uses for ``auto`` and a window.

    ``reference`` if the sums would hold at least `SUM_OVER_WEIGHT` times as many numbers as the N x N matrix, else
    ``sums``.
    """
    return "reference" if SUM_OVER_WEIGHT * tokens <= features * channels else "sums"


def in_parts(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
    """Return ``attend(q, k, v, *others)``, computed for a few images, heads and features at a time to save memory.

    The parts are recomputed in the backward pass. If everything fits into `AT_ONCE`, ``attend`` is called once.

    Args:
        attend: returns weighted sums of the values, ``[..., N, d]``, which are sums over features; needs ``m * d``
            numbers for each token.
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
    recomputed = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
    sums = []
    for q_part, k_part, *rest in zip(*(x.flatten(0, 1).split(count) for x in (q, k, v, *others)), strict=True):
        pieces = zip(q_part.split(at_once, dim=-1), k_part.split(at_once, dim=-1), strict=True)
        sums.append(sum(recomputed(q_piece, k_piece, *rest) for q_piece, k_piece in pieces))
    return torch.cat(sums).view(v.shape)


def normalized(sums: Tensor) -> Tensor:
    """Divide weighted sums ``[..., d+1]`` by the sum of the weights, their last channel; 0 where all weights are 0."""
    return sums[..., :-1] / sums[..., -1:].clamp_min(SMALLEST_SUM)


def _windowed(q: Tensor, k: Tensor, v: Tensor, *, grid: tuple[int, int], prefix: int, window: Window) -> Tensor:
    products = k.unsqueeze(-1) * v.unsqueeze(-2)  # [..., N, m, d + 1]
    dim = products.dim() - 3
    around = window_sum(products.narrow(dim, prefix, products.shape[dim] - prefix), grid, window, dim)
    if not prefix:
        return (q.unsqueeze(-2) @ around).squeeze(-2)
    around = around + products.narrow(dim, 0, prefix).sum(dim, keepdim=True)
    of_prefix, of_patches = q.split((prefix, q.shape[-2] - prefix), dim=-2)
    return torch.cat((of_prefix @ products.sum(dim), (of_patches.unsqueeze(-2) @ around).squeeze(-2)), dim=-2)
