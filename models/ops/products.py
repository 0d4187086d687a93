"""Scaled dot-product attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .forms import is_transformed


def dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    plain: bool = False,
) -> Tensor:
    """Return ``softmax(scale q k^T + bias) v``, with support for all transforms of `torch.func`.

    Args:
        q: queries ``[..., Nq, d]``.
        k: keys ``[..., Nk, d]``.
        v: values ``[..., Nk, d]``.
        bias: added to the logits, broadcastable to ``[..., Nq, Nk]``; or bool, false for keys that a query does not
            attend to; or None.
        scale: factor of the products, ``d ** -0.5`` if None.
        dropout: probability of dropping an attention weight.
        plain: use plain operations, which can be differentiated any number of times, unlike PyTorch's fused kernels.

    Returns:
        ``[..., Nq, d]``.
    """
    arguments = {"attn_mask": bias, "dropout_p": dropout, "scale": scale}
    if not (plain or is_transformed()):
        x = F.scaled_dot_product_attention(q, k, v, **arguments)
        if torch.compiler.is_exporting() and torch.is_grad_enabled():
            # The decomposition of the ONNX exporter has another memory layout than the kernel, so that a view recorded
            # after the kernel would be impossible.
            return x.clone(memory_format=torch.contiguous_format)
        return x
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels do not support forward-mode derivatives
        return F.scaled_dot_product_attention(q, k, v, **arguments)
