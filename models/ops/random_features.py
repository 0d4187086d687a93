"""Random features whose products approximate the weights of softmax attention (FAVOR+, arXiv 2009.14794, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import widen

KINDS = ("positive", "relu")
RELU_EPSILON = 1e-3  # keeps weights positive if all features are zero


def orthogonal_directions(count: int, dim: int, seed: int) -> Tensor:
    """Return ``[count, dim]`` Gaussian vectors, orthogonal within every ``dim`` of them, float32 on the CPU.

    Their norms are those of independent Gaussian vectors, so each single vector is Gaussian (section 2.4).
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for first in range(0, count, dim):
        gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(gaussian)
        blocks.append((q * r.diagonal().sign()).t()[: count - first])  # the signs make q uniformly distributed
    norms = torch.randn(count, dim, generator=generator, dtype=torch.float64, device="cpu").norm(dim=1, keepdim=True)
    return (torch.cat(blocks) * norms).float()


def features(x: Tensor, directions: Tensor, *, kind: str, role: str) -> Tensor:
    """Return features ``[..., N, m]`` of queries or keys ``[..., N, d]``, at least float32.

    ``positive``: ``exp(w.x - |x|^2 / 2 - c) / sqrt(m)``. The dot product of a query's and a key's features is an
    unbiased estimate of ``exp(q.k)``, up to factors that cancel in the attention: c is the largest exponent, taken per
    query, and for keys over all keys of an image and head. ``relu``: ``relu(w.x) + epsilon``, which approximates a
    kernel other than softmax's.

    Args:
        x: queries or keys, scaled by d^-1/4 for the usual scale of their products.
        directions: the vectors w, ``[m, d]``.
        kind: one of `KINDS`.
        role: ``query`` or ``key``.
    """
    x = widen(x)
    products = x @ directions.to(x.dtype).t()
    if kind == "relu":
        return products.relu() + RELU_EPSILON
    exponents = products - x.square().sum(-1, keepdim=True) / 2
    largest = exponents.detach().amax(dim=-1 if role == "query" else (-2, -1), keepdim=True)
    return (exponents - largest).exp() * len(directions) ** -0.5
