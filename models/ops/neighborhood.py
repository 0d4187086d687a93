"""Neighborhood attention: every query attends to the K x K window around it, moved inwards at the border."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("auto", "reference")


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
        form: ``reference`` gathers every window; ``auto`` takes the fastest form for the shape.

    Returns:
        ``[B, H, W, heads, d]``.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} of neighborhood attention is unknown; choose one of {', '.join(FORMS)}")
    return _reference(q, k, v, rpb, kernel_size=kernel_size, scale=scale, dropout=dropout)


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
