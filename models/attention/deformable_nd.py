"""Deformable attention for sequences, images and volumes.

The attention of DAT (arXiv 2201.00520, section 3) with the continuous position bias of Swin V2 (arXiv 2111.09883,
section 3.3) instead of a table, so inputs may have any size. Arguments and parameter names are those of the package
``deformable-attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Float32Conv2d, Float32Linear
from ..ops.points import cell_grid, sample_points
from ..ops.products import dot_product_attention
from ..options import check_divisible

COORDINATES = ("pixel", "package")
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# The axis of the map to which each coordinate of an offset belongs. Trained weights depend on this order.
AXES = {1: (0,), 2: (1, 0), 3: (0, 1, 2)}  # (n), (x, y), (frame, y, x)


class Float32Conv1d(nn.Conv1d):
    """`Float32Conv2d` for sequences."""

    forward = Float32Conv2d.forward


class Float32Conv3d(nn.Conv3d):
    """`Float32Conv2d` for volumes."""

    forward = Float32Conv2d.forward


FLOAT32_CONVS = {1: Float32Conv1d, 2: Float32Conv2d, 3: Float32Conv3d}


class OffsetScale(nn.Module):
    """Multiplies offsets ``[B, axes, ...]`` by one factor per coordinate.

    Args:
        scale: the factors.
        saved: whether the state dict holds them, as that of the package does for volumes.
    """

    def __init__(self, scale: Sequence[float], *, saved: bool) -> None:
        super().__init__()
        if saved:
            self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        else:  # not a buffer: loading weights would not fill it in a module built on the meta device
            self.scale = tuple(scale)

    def forward(self, x: Tensor) -> Tensor:
        return _scaled(x, self.scale, dim=1)


class ContinuousPositionBias(nn.Module):
    """An MLP from the displacement between query and key to the biases of the heads of a group.

    Args:
        dim: width of the hidden layers.
        axes: number of coordinates of a displacement.
        heads: number of heads per group.
        log_distance: whether displacements are spaced logarithmically.
    """

    def __init__(self, dim: int, *, axes: int, heads: int, log_distance: bool) -> None:
        super().__init__()
        self.log_distance = log_distance
        # Displacements would lose digits in lower precision; hidden values need not be exact, and are many.
        first, second = Float32Linear(axes, dim), nn.Linear(dim, dim)
        hidden = (nn.Sequential(layer, nn.ReLU()) for layer in (first, second))
        self.mlp = nn.ModuleList([*hidden, nn.Linear(dim, heads)])

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the bias ``[B, heads, Nq, Nk]`` of queries at ``[Nq, axes]`` and keys at ``[B, Nk, axes]``."""
        bias = queries[:, None] - keys[:, None]
        if self.log_distance:
            bias = bias.sign() * bias.abs().log1p()
        bias = self.mlp[0](bias).to(self.mlp[1][0].weight.dtype)
        for layer in self.mlp[1:]:
            bias = layer(bias)
        return bias.permute(0, 3, 1, 2)


class _DeformableAttentionND(nn.Module):
    """Every cell of a map attends to keys that are sampled from the map, at positions predicted from the queries.

    Args:
        dim: channels C.
        dim_head: channels per head.
        heads: attention heads.
        dropout: probability of dropping an attention weight.
        downsample_factor: cells of the map per key, one number or one per axis.
        offset_scale: largest offset in distances between keys, one number or one per axis; ``downsample_factor`` if
            None.
        offset_groups: offset groups g, each of which samples its channels at its own positions; divides ``heads`` and
            ``dim``. One group per head if None.
        offset_kernel_size: kernel of the offset network, one number or one per axis; at least ``downsample_factor``.
        cpb_log_distance: whether the position bias spaces displacements logarithmically.
        group_queries: whether a group computes its queries only from its own channels.
        group_key_values: the same for keys and values.
        coordinates: ``pixel`` places every key at the centre of its part of the map, whatever the size of the map.
            ``package`` reproduces the package ``deformable-attention`` 0.0.20, which normalises positions for aligned
            corners but samples without. On rectangles it also divides x by the height, and on volumes it passes
            (frame, y, x) where `F.grid_sample` expects (x, y, frame).

    Raises:
        ValueError: an argument is not allowed or contradicts another.
    """

    axes: int

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        downsample_factor: int | Sequence[int] = 4,
        offset_scale: float | Sequence[float] | None = None,
        offset_groups: int | None = None,
        offset_kernel_size: int | Sequence[int] = 6,
        cpb_log_distance: bool = True,
        group_queries: bool = True,
        group_key_values: bool = True,
        coordinates: str = "pixel",
    ) -> None:
        super().__init__()
        axes = self.axes
        groups = heads if offset_groups is None else offset_groups
        factors = _per_axis("downsample_factor", downsample_factor, axes)
        kernels = _per_axis("offset_kernel_size", offset_kernel_size, axes)
        scales = factors if offset_scale is None else _per_axis("offset_scale", offset_scale, axes)
        _check(dim, dim_head, heads, groups, factors, kernels, coordinates)
        self.dim = dim
        self.heads = heads
        self.offset_groups = groups
        self.downsample_factor = factors
        self.offset_kernel_size = kernels
        self.coordinates = coordinates
        inner, conv, float32_conv = dim_head * heads, CONVS[axes], FLOAT32_CONVS[axes]
        width = inner // groups
        self.to_offsets = nn.Sequential(
            float32_conv(width, width, kernels, stride=factors, groups=width),
            nn.GELU(),
            float32_conv(width, axes, 1, bias=False),
            nn.Tanh(),
            OffsetScale([scales[axis] for axis in AXES[axes]], saved=axes == 3),
        )
        self.rel_pos_bias = ContinuousPositionBias(
            max(dim // 4, 1), axes=axes, heads=heads // groups, log_distance=cpb_log_distance
        )
        self.dropout = nn.Dropout(dropout)
        self.to_q = conv(dim, inner, 1, groups=groups if group_queries else 1, bias=False)
        self.to_k = conv(dim, inner, 1, groups=groups if group_key_values else 1, bias=False)
        self.to_v = conv(dim, inner, 1, groups=groups if group_key_values else 1, bias=False)
        self.to_out = conv(inner, dim, 1)

    def forward(self, x: Tensor, return_vgrid: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map ``[B, C, *size]`` to the same shape.

        Args:
            x: sequence, image or volume.
            return_vgrid: also return the key positions in cells of the key grid: ``[B*g, Nk]`` for a sequence; (x, y)
                for an image, ``[B*g, 2, Hk, Wk]``; (frame, y, x) for a volume, ``[B*g, 3, Fk, Hk, Wk]``.

        Raises:
            ValueError: the input has the wrong number of axes or channels.
        """
        if x.dim() != self.axes + 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"an input of shape {list(x.shape)} does not fit; give [batch, {self.dim}, "
                f"{', '.join(['length'] if self.axes == 1 else ['frames', 'height', 'width'][-self.axes :])}]"
            )
        size, q = x.shape[2:], self.to_q(x)
        cells = self._key_cells(q)
        keys, queries = self._positions(cells), self._positions(self._cells(size, cells))
        samples = sample_points(self._by_group(x), self._as_sampled(keys))  # [B*g, C/g, *key_size]
        samples = samples.unflatten(0, (x.shape[0], self.offset_groups)).flatten(1, 2)
        k, v = self.to_k(samples), self.to_v(samples)
        bias = self.rel_pos_bias(queries.flatten(0, -2), keys.flatten(1, -2))  # [B*g, heads/g, Nq, Nk]
        q, k, v = (y.flatten(2).unflatten(1, (self.heads, -1)).mT for y in (q, k, v))  # [B, heads, N, d]
        bias = bias.unflatten(0, (x.shape[0], self.offset_groups)).flatten(1, 2).to(q.dtype)
        out = dot_product_attention(q, k, v, bias, dropout=self.dropout.p if self.training else 0.0)
        out = self.to_out(out.mT.flatten(1, 2).unflatten(2, size))
        if return_vgrid:
            return out, cells.squeeze(-1) if self.axes == 1 else cells.movedim(-1, 1)
        return out

    def _key_cells(self, q: Tensor) -> Tensor:
        """Return the key positions in cells of the key grid, ``[B*g, *key_size, axes]``, at least float32.

        The map of queries is padded or cropped so that there is one kernel of the offset network per key. In ``pixel``,
        the kernels together are centred on the map.
        """
        package, padding = self.coordinates == "package", []
        for length, factor, kernel in zip(q.shape[2:], self.downsample_factor, self.offset_kernel_size, strict=True):
            count = max(length // factor, 1) if package else -(-length // factor)
            total = count * factor + kernel - factor - length
            first = (kernel - factor if package else total) // 2
            padding = [first, total - first, *padding]
        offsets = self.to_offsets(F.pad(self._by_group(q), padding)).movedim(1, -1)
        return self._cells(offsets.shape[1:-1], offsets) + offsets

    def _by_group(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.offset_groups, -1)).flatten(0, 1)

    def _cells(self, size: Sequence[int], like: Tensor) -> Tensor:
        """Return the indices of all cells of a map, ``[*size, axes]``."""
        grid = cell_grid(tuple(size), dtype=like.dtype, device=like.device)
        return torch.stack([grid[axis] for axis in AXES[self.axes]], dim=-1)

    def _positions(self, cells: Tensor) -> Tensor:
        """Scale positions ``[..., *size, axes]``, in cells of a map of that size, to [-1, 1]."""
        size = cells.shape[-1 - self.axes : -1]
        if self.coordinates == "package":
            return _scaled(cells, [2 / max(length - 1, 1) for length in size], dim=-1) - 1
        return _scaled(2 * cells + 1, [1 / size[axis] for axis in AXES[self.axes]], dim=-1) - 1

    def _as_sampled(self, positions: Tensor) -> Tensor:
        """Return positions in the order of `F.grid_sample`: the coordinate of the last axis first."""
        in_order = self.axes < 3 or self.coordinates == "package"
        return positions if in_order else positions.flip(-1)


class DeformableAttention1D(_DeformableAttentionND):
    """Deformable attention of a sequence ``[B, C, N]``; offsets are (n)."""

    axes = 1


class DeformableAttention2D(_DeformableAttentionND):
    """Deformable attention of an image ``[B, C, H, W]``; offsets are (x, y)."""

    axes = 2


class DeformableAttention3D(_DeformableAttentionND):
    """Deformable attention of a volume ``[B, C, F, H, W]``; offsets are (frame, y, x)."""

    axes = 3


DeformableAttention = DeformableAttention2D


def _scaled(x: Tensor, factors: Sequence[float | Tensor], *, dim: int) -> Tensor:
    """Multiply the coordinates along one dimension of a tensor by one factor each."""
    # Number by number: a tensor made here would be copied to the device in every step.
    return torch.stack([part * factor for part, factor in zip(x.unbind(dim), factors, strict=True)], dim=dim)


def _per_axis(name: str, value: float | Sequence[float], axes: int) -> tuple:
    if not isinstance(value, Sequence):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(f"{name} = {tuple(value)} must be one number, or one per axis, {axes}")
    return tuple(value)


def _check(
    dim: int,
    dim_head: int,
    heads: int,
    groups: int,
    factors: Sequence[int],
    kernels: Sequence[int],
    coordinates: str,
) -> None:
    numbers = {"dim": [dim], "dim_head": [dim_head], "heads": [heads], "offset_groups": [groups]}
    numbers |= {"downsample_factor": factors, "offset_kernel_size": kernels}
    for name, values in numbers.items():
        for value in values:
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} = {value} is not allowed; give a whole number of at least 1")
    for name, value in (("heads", heads), ("dim", dim)):
        check_divisible(name, value, "offset_groups", groups)
    if any(kernel < factor for kernel, factor in zip(kernels, factors, strict=True)):
        raise ValueError(
            f"offset_kernel_size = {tuple(kernels)} leaves pixels out between keys; "
            f"give at least downsample_factor = {tuple(factors)}"
        )
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates = {coordinates!r} is unknown; choose one of {', '.join(COORDINATES)}")
