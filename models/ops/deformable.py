"""Attention of every pixel to keys that are sampled at deformed positions."""

from __future__ import annotations

from torch import Tensor

from . import gpu
from .cpu import deformable as cpu
from .cpu import operators
from .forms import check_form, is_compiled_for_inference, needs_plain_operations
from .grids import query_grid, query_steps
from .position_bias import table_bias
from .products import dot_product_attention

FORMS = ("auto", "reference", "crops", "separable", "triton")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
    plain: bool = False,
) -> Tensor:
    """Return ``softmax(scale q k^T + bias) v``.

    Args:
        q: queries ``[B, Nq, heads, d]``.
        k: keys ``[B, Ns, heads, d]``.
        v: values ``[B, Ns, heads, d]``.
        bias: added to the logits, broadcastable to ``[B, heads, Nq, Ns]``, or None.
        scale: factor of the products.
        dropout: probability of dropping an attention weight.
        plain: see `dot_product_attention`.

    Returns:
        ``[B, Nq, heads, d]``.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype)
    return dot_product_attention(q, k, v, bias, scale=scale, dropout=dropout, plain=plain).transpose(1, 2)


def deformable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    map_size: tuple[int, int],
    coordinates: str,
    scale: float,
    dropout: float = 0.0,
    clamped: bool = False,
    form: str = "auto",
) -> Tensor:
    """Attend to sampled keys, with a relative position bias sampled from a table (DAT, arXiv 2201.00520, section 3.2).

    Args:
        q: queries ``[B, H*W, heads, d]``.
        k: keys ``[B, Ns, heads, d]``.
        v: values ``[B, Ns, heads, d]``.
        positions: positions of the keys, ``[B, g, Ns, 2]``, (y, x), at least float32.
        table: ``[heads, 2*H0-1, 2*W0-1]`` for a map of native size H0 x W0.
        map_size: ``(H, W)`` of the queries.
        coordinates: convention of the query grid, see `models.ops.grids`.
        scale: factor of the products.
        dropout: probability of dropping an attention weight.
        clamped: whether all positions are known to lie in [-1, 1], which ``crops`` needs.
        form: ``reference`` samples the table at every displacement and saves all of them for the backward pass. If it
            is given, not chosen, it can be differentiated any number of times.
            ``separable`` and, on maps of native size, ``crops`` store no displacements, see
            `models.ops.cpu.table_rows`. They recompute the attention weights in the backward pass, except ``crops`` on
            small batches. ``triton`` is a GPU kernel that writes neither weights nor bias to memory. These three have
            no dropout. ``auto`` uses `choose_form`.

    Returns:
        ``[B, H*W, heads, d]``.

    Raises:
        ValueError: the form is unknown or does not support the arguments.
    """
    native, plain = clamped and coordinates == "dat++" and _is_native(map_size, table), form == "reference"
    check_form(form, FORMS, "deformable attention")
    if form not in ("auto", "reference") and dropout:
        raise ValueError(f"form {form!r} of deformable attention has no dropout; choose auto or reference")
    if form == "crops" and not native:
        raise ValueError(
            "form 'crops' of deformable attention needs clamped positions, coordinates 'dat++' and a map of native size"
        )
    if form == "triton" and not gpu.suits_heads(q):
        raise ValueError(f"form 'triton' of deformable attention {gpu.NEEDS}; choose auto or reference")
    if form == "auto":
        form = choose_form(q, native=native, dropout=dropout)
    if form == "triton":
        return _on_gpu(q, k, v, positions, table, map_size=map_size, coordinates=coordinates, scale=scale)
    if form in ("crops", "separable"):
        attend = operators.deformable_attention if is_compiled_for_inference(q) else cpu.attention
        return attend(q, k, v, positions, table, map_size=map_size, coordinates=coordinates, scale=scale, form=form)
    grid = query_grid(map_size, coordinates=coordinates, dtype=positions.dtype, device=positions.device)
    bias = table_bias(table, grid, positions)
    return attention(q, k, v, bias, scale=scale, dropout=dropout, plain=plain)


def choose_form(q: Tensor, *, native: bool, dropout: float = 0.0) -> str:
    """Return the form that `deformable_attention` uses for ``auto``.

    GPUs use the fused kernel, CPUs the faster of the forms that store no displacements. Graphs for training and the
    transforms of `torch.func` need the plain form.

    Args:
        q: queries ``[B, H*W, heads, d]``.
        native: whether ``crops`` is possible: the map has the native size of the table, and no position lies outside.
        dropout: probability of dropping an attention weight.
    """
    if dropout:
        return "reference"
    if q.is_cuda:
        return "triton" if gpu.suits_heads(q) else "reference"
    if is_compiled_for_inference(q) or (q.device.type == "cpu" and not needs_plain_operations()):
        return "crops" if native else "separable"
    return "reference"


def _is_native(map_size: tuple[int, int], table: Tensor) -> bool:
    return table.shape[1:] == tuple(2 * length - 1 for length in map_size)


def _on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    map_size: tuple[int, int],
    coordinates: str,
    scale: float,
) -> Tensor:
    from .gpu.deformable import attention

    steps = query_steps(map_size, coordinates=coordinates)
    tensors = (x.contiguous() for x in (q, k.to(q.dtype), v.to(q.dtype), positions.float(), table))
    return attention(*tensors, map_size, steps, scale)[0]
