"""Random features whose products approximate the weights of softmax attention (FAVOR+, arXiv 2009.14794, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("positive", "relu")
RELU_EPSILON = 1e-3  # keeps weights positive if no feature is


def orthogonal_directions(count: int, dim: int, seed: int) -> Tensor:
    """Return ``[count, dim]`` Gaussian vectors, orthogonal within every ``dim`` of them, float32 on the CPU.

    Their norms are those of independent Gaussian vectors, so each single vector is Gaussian (section 2.4).
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for first in range(0, count, dim):
        gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        blocks.append((q * r.diagonal().sign()).t()[: count - first])  # of any direction alike
    norms = torch.randn(count, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks) * norms).float()


def features(x: Tensor, directions: Tensor, *, kind: str, role: str) -> Tensor:
    """Return features ``[..., N, m]`` of queries or keys ``[..., N, d]``, at least float32.

    ``positive``: ``exp(w.x - |x|^2 / 2 - c) / sqrt(m)``. The products of queries' and keys' features are unbiased
    estimates of ``exp(q.k)`` times factors that attention divides out: c is the largest exponent, of every query, and
    of all the keys of one image and head. ``relu``: ``relu(w.x) + epsilon``, a kernel different from softmax's.

    Args:
        x: queries or keys, scaled by d^-1/4 for the usual scale of their products.
        directions: ``[m, d]``.
        kind: one of `KINDS`.
        role: ``query`` or ``key``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, directions = x.to(dtype), directions.to(dtype)
    products = x @ directions.t()
    if kind == "relu":
        return products.relu() + RELU_EPSILON
    exponents = products - x.square().sum(-1, keepdim=True) / 2
    largest = exponents.detach().amax(dim=-1 if role == "query" else (-2, -1), keepdim=True)
    return (exponents - largest).exp() * len(directions) ** -0.5
