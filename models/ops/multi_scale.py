"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import forms, gpu
from .caching import cached_tensors
from .cpu import multi_scale as cpu
from .forms import check_form, is_transformed, operator
from .precision import at_least_float32
from .rows import neighbours

FORMS = ("auto", "reference", "op")
Levels = Sequence[Sequence[int]]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Levels,
    level_start_index: Tensor | Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
    *,
    form: str = "auto",
) -> Tensor:
    """Return, for every query and head, the weighted sum of values sampled from several feature maps.

    Args:
        value: values of all levels, flattened and concatenated, ``[B, S, heads, C]``.
        spatial_shapes: height and width of every level, ``[levels, 2]``. ``op`` synchronises with a GPU only to copy
            lists there, at the first call with them, or tensors on a CPU; ``reference`` at every call with tensors.
        level_start_index: index of the first value of every level, ``[levels]``; levels follow each other without gaps.
            Like ``spatial_shapes``, a tensor, an array or a list.
        sampling_locations: ``[B, Q, heads, levels, points, 2]``, (x, y). The edges of a level are at 0 and 1, the
            centre of pixel i of n at (i + 0.5) / n. Values are zero outside. Cast to at least float32.
        attention_weights: ``[B, Q, heads, levels, points]``.
        im2col_step: number of images processed at a time, which bounds the memory; the result does not depend on it.
        form: ``op`` is a custom operator, ``ms_deform_attn`` in `torch.ops`, which compiler, export and profiler see as
            one node: sums of rows on a CPU, Triton kernels on a GPU. It is deterministic and has no second derivatives.
            ``reference`` consists of PyTorch's own operations and can be differentiated any number of times, also by
            transforms of `torch.func`. ``auto`` uses `choose_form`.

    Returns:
        ``[B, Q, heads * C]`` in the dtype of ``value``.

    Raises:
        ValueError: shapes do not fit, or the form is unknown or does not support the arguments. Levels are not checked
            if a tensor on a GPU gives them.
    """
    check_form(form, FORMS, "multi-scale attention")
    if form == "op" and not _has_op(value):
        raise ValueError(
            "form 'op' of multi-scale attention needs a CPU, or a GPU and Triton, and supports no transforms of "
            "torch.func; choose auto or reference"
        )
    spatial_shapes, level_start_index = _plain(spatial_shapes), _plain(level_start_index)
    _check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step)
    dtype = at_least_float32(sampling_locations.dtype)
    sampling_locations, attention_weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    if (choose_form(value) if form == "auto" else form) == "reference":
        levels, starts = (x.tolist() if isinstance(x, Tensor) else x for x in (spatial_shapes, level_start_index))
        check_levels(levels, starts, value.shape[1])
        return _reference(value, levels, starts, sampling_locations, attention_weights)
    shapes, starts = (integers(numbers, value.device) for numbers in (spatial_shapes, level_start_index))
    return _op(value, shapes, starts, sampling_locations, attention_weights, im2col_step)


def choose_form(value: Tensor) -> str:
    """Return the form that `ms_deform_attn` uses for ``auto``: ``op`` if possible. ONNX has no such operator."""
    return "op" if _has_op(value) and not forms.PLAIN and not torch.onnx.is_in_onnx_export() else "reference"


def _has_op(value: Tensor) -> bool:
    """Return whether the operator can process a tensor of any shape; on the meta device, it returns shapes."""
    if is_transformed():
        return False
    return gpu.has_triton(value) if value.is_cuda else value.device.type in ("cpu", "meta")


def integers(numbers: Tensor | Sequence, device: torch.device) -> Tensor:
    """Return sizes or indices as a tensor on a device.

    The copy of a list to a GPU waits for the GPU and cannot be captured in a CUDA graph, so it is made only once.
    """
    numbers = _plain(numbers)
    if isinstance(numbers, Tensor):
        return numbers.to(device, torch.int64)
    return _copied(tuple(tuple(row) if isinstance(row, (list, tuple)) else row for row in numbers), device)


@cached_tensors
def _copied(numbers: tuple, device: torch.device) -> Tensor:
    return torch.as_tensor(numbers, dtype=torch.int64, device=device)


def _plain(numbers: Tensor | Sequence) -> Tensor | list:
    """Return sizes or indices as they are if they are a tensor, otherwise as a list of Python's numbers or of lists."""
    if isinstance(numbers, Tensor):
        return numbers
    return [row.tolist() if hasattr(row, "tolist") else row for row in numbers]  # rows of NumPy, or tensors


def _check(
    value: Tensor,
    spatial_shapes: Tensor | Levels,
    level_start_index: Tensor | Sequence[int],
    locations: Tensor,
    weights: Tensor,
    im2col_step: int,
) -> None:
    levels = len(spatial_shapes)
    if value.dim() != 4 or locations.dim() != 6 or locations.shape[-1] != 2:
        raise ValueError(
            f"value {list(value.shape)} and sampling_locations {list(locations.shape)} do not fit; give "
            "[batch, pixels, heads, channels] and [batch, queries, heads, levels, points, 2]"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f"attention_weights {list(weights.shape)} must have the shape {list(locations.shape[:-1])}")
    if (value.shape[0], value.shape[2], levels, levels) != (
        locations.shape[0],
        *locations.shape[2:4],
        len(level_start_index),
    ):
        raise ValueError(
            f"value {list(value.shape)}, spatial_shapes [{levels}, 2], level_start_index [{len(level_start_index)}] "
            f"and sampling_locations {list(locations.shape)} must agree in batch, heads and levels"
        )
    if im2col_step < 1:
        raise ValueError(f"im2col_step = {im2col_step} is not allowed; give at least 1")
    # Reading a tensor could synchronise with a GPU. If one is on a CPU, the operator checks.
    if not isinstance(spatial_shapes, Tensor) and not isinstance(level_start_index, Tensor):
        check_levels(spatial_shapes, level_start_index, value.shape[1])


def check_levels(levels: Levels, starts: Sequence[int], pixels: int) -> None:
    """Raise ValueError if the levels do not follow each other from the first value to the last."""
    end = 0
    for (height, width), start in zip(levels, starts, strict=True):
        if height < 1 or width < 1 or start != end:
            raise ValueError(
                f"a level of {height} x {width} from {start} on does not follow the one that ends at {end}; "
                "check spatial_shapes and level_start_index"
            )
        end += height * width
    if end != pixels:
        raise ValueError(f"levels of {end} pixels do not fit to {pixels} values; check spatial_shapes")


def _reference(value: Tensor, levels: Levels, starts: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    values = value.transpose(1, 2).to(weights.dtype)  # [B, heads, S, C]
    locations, weights = locations.permute(3, 5, 0, 2, 1, 4), weights.permute(3, 0, 2, 1, 4)
    out = torch.zeros((), dtype=weights.dtype, device=value.device)
    for (height, width), start, (x, y), weight in zip(levels, starts, locations, weights, strict=True):
        rows, row_weights = neighbours(y * height - 0.5, height)  # [B, heads, Q, points, 2]
        columns, column_weights = neighbours(x * width - 0.5, width)
        pixels = start + rows.unsqueeze(-1) * width + columns.unsqueeze(-2)
        corners = row_weights.unsqueeze(-1) * column_weights.unsqueeze(-2) * weight[..., None, None]
        index = pixels.flatten(2).unsqueeze(-1).expand(-1, -1, -1, values.shape[-1])
        samples = values.gather(2, index).unflatten(2, pixels.shape[2:]) * corners.unsqueeze(-1)
        out = out + samples.sum(dim=(3, 4, 5))
    return out.transpose(1, 2).flatten(2).to(value.dtype)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.library.custom_op(operator("ms_deform_attn"), mutates_args=(), device_types="cpu")
def _op(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    levels, starts = spatial_shapes.tolist(), level_start_index.tolist()
    check_levels(levels, starts, value.shape[1])
    parts = zip(*(x.split(im2col_step) for x in (value, sampling_locations, attention_weights)), strict=True)
    return _joined([cpu.forward(levels, starts, *part) for part in parts])


@torch.library.custom_op(operator("ms_deform_attn_backward"), mutates_args=(), device_types="cpu")
def _op_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    levels, starts = spatial_shapes.tolist(), level_start_index.tolist()
    parts = zip(*(x.split(im2col_step) for x in (grad, value, sampling_locations, attention_weights)), strict=True)
    grads = [cpu.backward(levels, starts, *part) for part in parts]
    return tuple(_joined(column) for column in zip(*grads, strict=True))


@_op.register_kernel("cuda")
def _op_cuda(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    from .gpu import multi_scale as kernels  # needs Triton, which only GPU builds of torch include

    parts = zip(*(x.split(im2col_step) for x in (value, locations, weights)), strict=True)
    return _joined([kernels.forward(shapes, starts, *part) for part in parts])


@_op_backward.register_kernel("cuda")
def _op_backward_cuda(
    grad: Tensor, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> tuple[Tensor, Tensor, Tensor]:
    from .gpu import multi_scale as kernels

    parts = zip(*(x.split(im2col_step) for x in (grad, value, locations, weights)), strict=True)
    grads = [kernels.backward(shapes, starts, *part) for part in parts]
    return tuple(_joined(column) for column in zip(*grads, strict=True))


@_op.register_fake
def _op_fake(value: Tensor, _shapes: Tensor, _starts: Tensor, locations: Tensor, *_: object) -> Tensor:
    return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])


@_op_backward.register_fake
def _op_backward_fake(
    _grad: Tensor, value: Tensor, _shapes: Tensor, _starts: Tensor, locations: Tensor, weights: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights))


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001, ARG001
    *tensors, ctx.im2col_step = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    value, shapes, starts, locations, weights = ctx.saved_tensors
    to_value, to_locations, to_weights = _op_backward(
        grad.contiguous(), value, shapes, starts, locations, weights, ctx.im2col_step
    )
    return to_value, None, None, to_locations, to_weights, None


def _refuse(ctx, *grads: Tensor) -> None:  # noqa: ANN001, ARG001
    raise RuntimeError("the operator ms_deform_attn has no second derivatives; use form='reference'")


_op.register_autograd(_differentiate, setup_context=_setup_context)
_op_backward.register_autograd(_refuse)
