"""Linear interpolation as weighted sums of rows of a matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def neighbours(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the two cells next to every position on an axis, and their interpolation weights, zero outside the axis.

    Args:
        position: ``[...]``, in cells; 0 is the first cell.
        length: number of cells.

    Returns:
        Indices, clamped to the axis, and weights, ``[..., 2]`` each.
    """
    first = position.detach().floor()
    fraction = (position - first).masked_fill(first.isinf(), 0.0)  # these are outside, where NaN would be kept
    taps = torch.stack((first, first + 1), dim=-1)
    inside = (taps >= 0) & (taps < length)
    weights = torch.stack((1 - fraction, fraction), dim=-1) * inside
    return cell(taps, length).long(), weights


def cell(position: Tensor, length: int) -> Tensor:
    """Return positions of any shape, rounded down and clamped to the axis; 0 for NaN, whose weights are NaN anyway."""
    return position.detach().floor().nan_to_num(0.0).clamp(0, length - 1)


def weighted_rows(matrix: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of rows, ``(matrix[taps] * weights.unsqueeze(-1)).sum(-2)``.

    Args:
        matrix: ``[rows, columns]``.
        taps: indices of the summed rows, ``[..., n]``.
        weights: ``[..., n]``.

    Returns:
        ``[..., columns]``.
    """
    count = taps.shape[-1]
    rows = _WeightedRows.apply(matrix, taps.reshape(-1, count), weights.reshape(-1, count))
    return rows.view(*taps.shape[:-1], matrix.shape[1])


class _WeightedRows(torch.autograd.Function):
    """`F.embedding_bag` with a backward pass that adds rows directly; PyTorch's dense one sorts the indices first."""

    @staticmethod
    def forward(ctx, matrix, taps, weights):  # noqa: ANN001
        ctx.save_for_backward(matrix, taps, weights)
        return F.embedding_bag(taps, matrix, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        matrix, taps, weights = ctx.saved_tensors
        to_matrix, weighted = torch.zeros_like(matrix), torch.empty_like(grad)
        for tap, weight in zip(taps.unbind(1), weights.unbind(1), strict=True):
            to_matrix.index_add_(0, tap, torch.mul(grad, weight[:, None], out=weighted))
        bags = torch.arange(len(taps), device=taps.device)
        offsets, bag = bags * taps.shape[1], bags.repeat_interleave(taps.shape[1])
        to_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, matrix, taps.flatten(), offsets, bag, 0
        )
        return to_matrix, None, to_weights.view_as(taps)
