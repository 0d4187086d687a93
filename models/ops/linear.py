"""Linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .forms import runs_by_hand
from .onednn import product, suits

FORMS = ("auto", "reference", "onednn")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, form: str = "auto") -> Tensor:
    """Return ``x weight^T + bias``.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        form: ``reference`` is PyTorch's own; ``onednn`` takes the products of forward and backward that gain by it to
            oneDNN. ``auto`` takes `choose_form`.

    Returns:
        ``[..., out]``.

    Raises:
        ValueError: the form is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} of a linear layer is unknown; choose one of {', '.join(FORMS)}")
    if (choose_form(x) if form == "auto" else form) == "reference":
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


def choose_form(x: Tensor) -> str:
    """Return the form that `linear` takes for ``auto``."""
    return "onednn" if suits(x) and runs_by_hand(x) else "reference"


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001, ARG004
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows = torch.atleast_2d(grad).flatten(0, -2)
        return (
            linear(grad, weight.t(), None) if to_x else None,
            rows.t() @ torch.atleast_2d(x).flatten(0, -2) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )
