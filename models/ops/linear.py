"""Linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import operators
from .cpu.onednn import multiply, product, suits, supports
from .forms import check_form, is_compiled_for_inference, is_transformed, suits_cpu_forms
from .precision import matmul_dtype

FORMS = ("auto", "reference", "onednn")
LARGE = 1 << 18  # numbers of a float32 input from which on a custom operator pays in a compiled graph


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, form: str = "auto") -> Tensor:
    """Return ``x weight^T + bias``.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        form: ``reference`` is `F.linear`. ``onednn`` computes the output and the gradient of ``x`` with oneDNN; it
            needs an x86 CPU and float32, or bfloat16 as tensor or autocast dtype, and supports no transforms of
            `torch.func`. ``auto`` uses `choose_form`.

    Returns:
        ``[..., out]``.

    Raises:
        ValueError: the form is unknown or does not support the arguments.
    """
    check_form(form, FORMS, "a linear layer")
    if form == "auto" and is_compiled_for_inference(x) and _operator_pays(x):
        return operators.linear(
            *(None if tensor is None else tensor.to(matmul_dtype(x)) for tensor in (x, weight, bias))
        )
    if form == "onednn" and (is_transformed() or not _is_possible(x, weight, bias)):
        raise ValueError(
            "form 'onednn' of a linear layer needs matching shapes, float32 or bfloat16 and an x86 CPU, and supports "
            "no transforms of torch.func; choose auto or reference"
        )
    if (choose_form(x, weight, bias) if form == "auto" else form) == "reference":
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = (None if tensor is None else tensor.to(matmul_dtype(tensor)) for tensor in (x, weight, bias))
    # In inference mode nothing is differentiated, and the call of the autograd function can be saved.
    return multiply(x, weight, bias) if torch.is_inference_mode_enabled() else _Linear.apply(x, weight, bias)


def choose_form(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Return the form that `linear` uses for ``auto``."""
    return "onednn" if suits_cpu_forms(x) and _is_possible(x, weight, bias) else "reference"


def _operator_pays(x: Tensor) -> bool:
    """Return whether oneDNN saves more time than the call of a custom operator takes."""
    dtype = matmul_dtype(x)
    return supports(dtype) and (dtype == torch.bfloat16 or x.numel() >= LARGE)


def _is_possible(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    dtype = matmul_dtype(x)
    if not suits(dtype, x, weight, bias) or x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        return False
    return all(tensor is None or matmul_dtype(tensor) == dtype for tensor in (weight, bias))


class _Linear(torch.autograd.Function):
    """`F.linear` by oneDNN, with first and higher derivatives in reverse mode."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001, ARG004
        x, weight, _ = inputs
        to_x, to_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)

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
