"""Neighborhood attention: every query attends to the K x K window around it, moved inwards at the border."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gpu
from .cpu import operators
from .cpu.neighborhood import TiledAttention
from .forms import check_form, is_compiled_for_inference, suits_cpu_forms
from .precision import cast_for_matmul, matmul_dtype
from .products import dot_product_attention
from .tiles import tiles_of

FORMS = ("auto", "reference", "tiles", "tiles_by_hand", "triton")


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    *,
    kernel_size: int,
    scale: float,
    dropout: float = 0.0,
    form: str = "auto",
) -> Tensor:
    """Attend to the neighborhood of every query (Hassani et al., arXiv 2204.07143, section 3).

    Args:
        q: queries ``[B, H, W, heads, d]`` with ``H, W >= kernel_size``.
        k: keys ``[B, H, W, heads, d]``.
        v: values ``[B, H, W, heads, d]``.
        rpb: relative position bias ``[heads, 2*kernel_size-1, 2*kernel_size-1]``, indexed by key minus query, or None.
        kernel_size: odd side of the window; the first row of a query's window is ``clamp(y - K//2, 0, H - K)``.
        scale: factor of the products.
        dropout: probability of dropping an attention weight.
        form: ``reference`` gathers every window. ``tiles`` is dense attention of small tiles of queries, with a mask.
            ``tiles_by_hand`` does the same a few images at a time, with a custom backward pass that saves the weights
            but not their bias. ``triton`` is a GPU kernel that does not write the weights to memory. The last two have
            no dropout. ``auto`` uses `choose_form`.

    Returns:
        ``[B, H, W, heads, d]``.

    Raises:
        ValueError: the form is unknown or does not support the arguments.
    """
    check_form(form, FORMS, "neighborhood attention")
    if form in ("tiles_by_hand", "triton") and dropout:
        raise ValueError(f"form {form!r} of neighborhood attention has no dropout; choose auto, reference or tiles")
    if form == "triton" and not gpu.suits_heads(q):
        raise ValueError(f"form 'triton' of neighborhood attention {gpu.NEEDS}; choose auto, reference or tiles")
    if form == "auto":
        form = choose_form(q, dropout=dropout)
    if form == "triton":
        from .gpu.neighborhood import attention

        return attention(q, k, v, rpb if rpb is None else rpb.contiguous(), kernel_size, scale)[0]
    if form == "reference":
        return _reference(q, k, v, rpb, kernel_size=kernel_size, scale=scale, dropout=dropout)
    if rpb is None:
        rpb = q.new_zeros(q.shape[3], 2 * kernel_size - 1, 2 * kernel_size - 1)
    if form == "tiles_by_hand" and is_compiled_for_inference(q):
        return operators.neighborhood_attention(*(x.to(matmul_dtype(x)) for x in (q, k, v)), rpb, scale)
    if form == "tiles_by_hand":
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, rpb))
        with cast_for_matmul(q, k, v) as (q, k, v):
            return TiledAttention.apply(q, k, v, rpb, scale, keep)
    return _tiled(q, k, v, rpb, kernel_size=kernel_size, scale=scale, dropout=dropout)


def choose_form(q: Tensor, *, dropout: float = 0.0) -> str:
    """Return the form that `neighborhood_attention` uses for ``auto``."""
    if any(isinstance(length, torch.SymInt) for length in q.shape[1:3]):  # tiles need a map of known size
        return "reference"
    if dropout:
        return "tiles"
    if q.is_cuda and gpu.suits_heads(q):
        return "triton"
    return "tiles_by_hand" if suits_cpu_forms(q) or is_compiled_for_inference(q) else "tiles"


def _tiled(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, *, kernel_size: int, scale: float, dropout: float) -> Tensor:
    tiles = tiles_of(tuple(q.shape[1:3]), kernel_size, q.device)
    bias = tiles.expand_bias(tiles.bias(rpb)).to(q.dtype)
    q_maps, k_maps, v_maps = (x.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2) for x in (q, k, v))
    cuts = tiles.cut(q_maps), tiles.windows(k_maps), tiles.windows(v_maps)
    cuts = (x.unflatten(0, (-1, len(bias))) for x in cuts)  # [B, heads * tiles, ...]
    x = dot_product_attention(*cuts, bias[None], scale=scale, dropout=dropout)  # fused kernels need four axes
    # Not len(q), which would be a constant in a graph.
    x = tiles.join(x.flatten(0, 1)).view(q.shape[0], q.shape[3], *q.shape[1:3], -1)
    return x.permute(0, 2, 3, 1, 4)


def window_rows(length: int, kernel_size: int, device: torch.device) -> Tensor:
    """Return the key indices of every query along one axis, ``[length, kernel_size]``."""
    query = torch.arange(length, device=device)
    start = (query - kernel_size // 2).clamp(0, length - kernel_size)
    return start[:, None] + torch.arange(kernel_size, device=device)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, *, kernel_size: int, scale: float, dropout: float
) -> Tensor:
    height, width = q.shape[1:3]
    rows = window_rows(height, kernel_size, q.device)  # [H, K]
    columns = window_rows(width, kernel_size, q.device)  # [W, K]

    def windows(x: Tensor) -> Tensor:  # [B, H, W, heads, d] -> [B, H, W, heads, K*K, d]
        return x[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4).transpose(3, 4)

    logits = (q.unsqueeze(-2) * scale) @ windows(k).transpose(-2, -1)  # [B, H, W, heads, 1, K*K]
    if rpb is not None:
        dy = rows - torch.arange(height, device=q.device)[:, None] + kernel_size - 1
        dx = columns - torch.arange(width, device=q.device)[:, None] + kernel_size - 1
        bias = rpb[:, dy[:, None, :, None], dx[None, :, None, :]]  # [heads, H, W, K, K]
        logits = logits + bias.flatten(3).permute(1, 2, 0, 3).unsqueeze(-2)
    weights = F.dropout(logits.softmax(dim=-1), dropout)
    return (weights.to(v.dtype) @ windows(v)).squeeze(-2)
