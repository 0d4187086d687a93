"""Deformable attention (DAT, arXiv 2201.00520; DAT++, arXiv 2309.01430), letter D."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..fusing import have_biases, may_fuse
from ..layers import Float32Conv2d, Float32Linear, LayerNorm, as_pair, check_map, pad_small, pointwise
from ..ops.deformable import attention, deformable_attention
from ..ops.forms import is_checkpointed, needs_plain_operations
from ..ops.grids import COORDINATES, query_grid, reference_points
from ..ops.position_bias import fixed_bias, log_continuous_bias, table_bias
from ..ops.precision import at_least_float32, autocast_disabled
from ..ops.sampling import sample
from ..options import OFF, Option, StageOption, StageOptions, at_least, check_divisible, one_of, positive_count, rate
from ..tables import Resize, between_corners, per_query_and_key
from .letters import Mixer, register

Size = tuple[int, int]

OPTIONS = {
    "groups": StageOption((1, 1, 3, 6), "Offset groups of D; the channels of a group share offsets.", each=at_least(1)),
    "strides": StageOption((1, 1, 1, 1), "Stride of the offset network of D: pixels per key.", each=at_least(1)),
    "ksizes": StageOption((9, 7, 5, 3), "Kernel size of the offset network of D.", each=at_least(1)),
    "offset_range_factor": StageOption(
        (1.0, 2.0, 3.0, 4.0),
        "Largest offset of D, in halves of the distance between keys; if negative, offsets are unbounded and positions "
        "are limited to the map. With `coordinates: cvpr22`, 0 means unbounded offsets.",
    ),
    "no_offs": StageOption(OFF, "D pools the map instead of sampling it; no offsets and no position bias."),
    "use_pes": StageOption(OFF, "D has a position bias: a sampled table, unless one of the next three is set."),
    "dwc_pes": StageOption(OFF, "The position bias of D (`use_pes`) is a depthwise convolution of the queries."),
    "fixed_pes": StageOption(OFF, "The position bias of D (`use_pes`) is a table with one value per query and key."),
    "log_cpb": StageOption(OFF, "The position bias of D (`use_pes`) is an MLP of log-spaced displacements."),
    "coordinates": Option(
        "dat++",
        "Convention of reference points and query grid of D; `cvpr22` for the weights of the CVPR 2022 paper.",
        one_of(*COORDINATES),
    ),
}

POSITION_BIASES = ("table", "log_cpb", "fixed", "dwc", "none")

# Sampled values of a batch, 1 MiB in float32, from which on the keys are recomputed in the backward pass.
RECOMPUTE_FROM = 1 << 18


class Deformation(NamedTuple):
    """Sampling positions and attention weights of a deformable attention.

    Positions are (y, x), where -1 and +1 are the centres of the corner pixels.

    Attributes:
        key_size: height and width of the key grid, ``Hk * Wk = Ns``.
        reference: reference points ``[Ns, 2]``, the positions without offsets.
        positions: sampling positions ``[B, g, Ns, 2]``.
        weights: attention weights ``[B, heads, H*W, Ns]``.
    """

    key_size: Size
    reference: Tensor
    positions: Tensor
    weights: Tensor


class DeformableAttention(nn.Module):
    """Every pixel attends to keys that are sampled from the map, at positions predicted from the queries.

    Args:
        dim: channels C.
        heads: attention heads; divides ``dim``.
        groups: offset groups g; divides ``heads``. Each group samples its C/g channels at its own positions.
        map_size: native height and width of the map, which determine the size of the position tables.
        stride: pixels per key on each axis.
        kernel_size: kernel of the depthwise convolution of the offset network.
        offset_range_factor: largest offset, in halves of the distance between keys; negative for unbounded offsets.
        use_offsets: False pools the map instead of sampling it.
        position_bias: ``table``, ``log_cpb``, ``fixed``, ``dwc`` or ``none``.
        coordinates: ``dat++`` or ``cvpr22``, see `models.ops.grids`.
        attn_drop: probability of dropping an attention weight.
        proj_drop: dropout rate of the output.

    Attributes:
        form: form of the attention with a table, see `models.ops.deformable`. Unless it is ``reference``, what the keys
            of larger batches are computed from is recomputed in the backward pass, so the weights must not change
            between forward and backward.

    Raises:
        ValueError: an argument is not allowed or contradicts another.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        groups: int,
        map_size: int | Size,
        stride: int,
        kernel_size: int,
        offset_range_factor: float = -1.0,
        use_offsets: bool = True,
        position_bias: str = "table",
        coordinates: str = "dat++",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_divisible("dim", dim, "heads", heads)
        check_divisible("heads", heads, "groups", groups)
        one_of(*POSITION_BIASES).require("position_bias", position_bias)
        OPTIONS["coordinates"].check.require("coordinates", coordinates)
        native_size = as_pair(map_size)
        counts = [("stride", stride), ("kernel_size", kernel_size), *(("map_size", side) for side in native_size)]
        for name, number in counts:
            positive_count().require(name, number)
        rate().require("attn_drop", attn_drop)
        self.dim = dim
        self.heads = heads
        self.groups = groups
        self.native_size = native_size
        self.stride = stride
        self.kernel_size = kernel_size
        self.padding = 0 if kernel_size == stride and coordinates == "dat++" else kernel_size // 2
        self.offset_range_factor = offset_range_factor
        self.use_offsets = use_offsets
        self.position_bias = position_bias
        self.coordinates = coordinates
        self.scale = (dim // heads) ** -0.5
        self.attn_drop = attn_drop
        self.form = "auto"

        width = dim // groups
        self.conv_offset = nn.Sequential(
            nn.Conv2d(width, width, kernel_size, stride, self.padding, groups=width),
            LayerNorm(width),
            nn.GELU(),
            Float32Conv2d(width, 2, kernel_size=1, bias=False),
        ).requires_grad_(use_offsets)
        self.proj_q = nn.Conv2d(dim, dim, kernel_size=1)
        self.proj_k = nn.Conv2d(dim, dim, kernel_size=1)
        self.proj_v = nn.Conv2d(dim, dim, kernel_size=1)
        self.proj_out = nn.Conv2d(dim, dim, kernel_size=1)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe_table = self._build_position_bias(dim)
        self.reset_parameters()

    def _build_position_bias(self, dim: int) -> nn.Module | nn.Parameter | None:
        if self.position_bias == "none":
            return None
        if self.position_bias == "dwc":
            return nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        if self.position_bias == "log_cpb":
            return nn.Sequential(
                Float32Linear(2, 32), nn.ReLU(), Float32Linear(32, self.heads // self.groups, bias=False)
            )
        return nn.Parameter(torch.empty(self._table_shape()))

    def reset_parameters(self) -> None:
        """Initialise the position table; layers initialise themselves."""
        if isinstance(self.rpe_table, nn.Parameter):
            nn.init.trunc_normal_(self.rpe_table, std=0.01)

    def _table_shape(self) -> torch.Size:
        height, width = self.native_size
        if self.position_bias == "fixed":
            key_height, key_width = self._key_size(self.native_size)
            return torch.Size((self.heads, height * width, key_height * key_width))
        return torch.Size((self.heads, 2 * height - 1, 2 * width - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        check_map(x, self.dim)
        size = x.shape[-2:]
        q = pointwise(self.proj_q, x)
        if self._recomputes_keys(x):
            # Saves k, v and positions, but not what they are computed from, which is cheap to recompute from x and q.
            k, v, positions, key_size = checkpoint(self._keys, x, q, use_reentrant=False)
        else:
            k, v, positions, key_size = self._keys(x, q)
        queries = self._split_heads(q)
        dropout = self.attn_drop if self.training else 0.0
        if self.position_bias == "table":
            x = deformable_attention(
                queries,
                k,
                v,
                positions,
                self.rpe_table,
                map_size=size,
                coordinates=self.coordinates,
                scale=self.scale,
                dropout=dropout,
                clamped=self.use_offsets and self.coordinates == "dat++" and self.offset_range_factor < 0,
                form=self.form,
            )
        else:
            bias = self._additive_bias(positions, size, key_size)
            plain = self.form == "reference"
            x = attention(queries, k, v, bias, scale=self.scale, dropout=dropout, plain=plain)
        x = x.flatten(2).unflatten(1, size).permute(0, 3, 1, 2)  # [B, C, H, W]
        if self.position_bias == "dwc":
            x = x + self.rpe_table(q)
        return self.proj_drop(pointwise(self.proj_out, x))

    def position_tables(self) -> dict[str, Resize]:
        """Return the resize function of each position table, by name."""
        if self.position_bias == "fixed":
            return {"rpe_table": per_query_and_key(self.native_size, self._key_size(self.native_size))}
        return {"rpe_table": between_corners} if self.position_bias == "table" else {}

    def set_map_size(self, size: Size) -> None:
        """Resize the position table to maps of another native height and width."""
        before, self.native_size = self.native_size, size
        resizes = self.position_tables()
        if self.position_bias == "fixed":
            (new, old) = ((grid, self._key_size(grid)) for grid in (size, before))
            resizes = {"rpe_table": per_query_and_key(*new, stored=old)}
        for name, resize in resizes.items():
            table = getattr(self, name)
            resized = resize(table.detach(), self._table_shape())
            setattr(self, name, nn.Parameter(resized, requires_grad=table.requires_grad))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters exempt from weight decay in the published recipe: all position biases."""
        return {name for name, _ in self.named_parameters() if name.split(".")[0] == "rpe_table"}

    @torch.no_grad()
    def inspect(self, x: Tensor) -> Deformation:
        """Return the sampling positions and attention weights for a map ``[B, C, H, W]``."""
        check_map(x, self.dim)
        size = x.shape[-2:]
        q = pointwise(self.proj_q, x)
        samples, positions, key_size = self._sample_keys(x, q)
        queries, k = (self._split_heads(y).transpose(1, 2) for y in (q, pointwise(self.proj_k, samples)))
        logits = queries @ k.transpose(-2, -1) * self.scale
        bias = self._additive_bias(positions, size, key_size)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        reference = reference_points(
            key_size, coordinates=self.coordinates, dtype=positions.dtype, device=positions.device
        )
        return Deformation(key_size, reference.flatten(0, 1), positions, weights)

    def _recomputes_keys(self, x: Tensor) -> bool:
        if needs_plain_operations() or self.form == "reference" or not torch.is_grad_enabled():
            return False
        if is_checkpointed():  # the whole block is recomputed anyway
            return False
        batch, channels, height, width = x.shape
        return batch * math.prod(self._key_size((height, width))) * channels >= RECOMPUTE_FROM

    def _keys(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Size]:
        """Return keys and values ``[B, Ns, heads, d]``, positions ``[B, g, Ns, 2]`` and the size of the key grid."""
        samples, positions, key_size = self._sample_keys(x, q)
        k, v = (self._split_heads(pointwise(proj, samples)) for proj in (self.proj_k, self.proj_v))
        return k, v, positions, key_size

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (self.heads, -1))  # [B, H*W, heads, d]

    def _sample_keys(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Size]:
        """Return samples ``[B, C, Hk, Wk]``, positions ``[B, g, Ns, 2]`` and the size of the key grid."""
        if self.use_offsets:
            positions, key_size = self._positions(self._offsets(q))
            form = "reference" if self.form == "reference" else "auto"
            samples = sample(x.permute(0, 2, 3, 1), positions, form=form)  # [B, Ns, C]
            return samples.unflatten(1, key_size).permute(0, 3, 1, 2), positions, key_size
        height, width = x.shape[-2:]
        samples = F.avg_pool2d(x, (min(self.stride, height), min(self.stride, width)), stride=self.stride)
        key_size = samples.shape[-2:]
        dtype = at_least_float32(x.dtype)
        reference = reference_points(key_size, coordinates=self.coordinates, dtype=dtype, device=x.device)
        positions = reference.flatten(0, 1).expand(x.shape[0], self.groups, -1, -1)
        return samples, positions, key_size

    def _offsets(self, q: Tensor) -> Tensor:
        """Return the offsets ``[B, Hk, Wk, g, 2]``, unbounded and at least float32, for queries ``[B, C, H, W]``."""
        if not q.is_cpu:
            return self._offset_network(q)
        # In bfloat16, oneDNN's backward of a strided depthwise convolution takes 10 to 40 times as long as in float32,
        # and with an even kernel on a small map it is wrong.
        with autocast_disabled("cpu"):
            return self._offset_network(q.to(next(self.conv_offset.parameters()).dtype))

    def _offset_network(self, q: Tensor) -> Tensor:
        """Return the output of the offset network, ``[B, Hk, Wk, g, 2]``, for queries ``[B, C, H, W]``.

        The groups share the network. Its depthwise convolution runs on all groups at once; after it, they become
        additional columns of the map.
        """
        q = pad_small(q, self.kernel_size - 2 * self.padding)
        if not self._may_fuse_offset_network():
            offsets = self.conv_offset(rearrange(q, "b (g c) h w -> (b g) c h w", g=self.groups))
            return rearrange(offsets, "(b g) yx h w -> b h w g yx", g=self.groups)
        conv, *rest = self.conv_offset
        dtype = at_least_float32(q.dtype) if q.is_cpu else q.dtype  # widened if the module itself is in bfloat16
        weight, bias = conv.weight.to(dtype).repeat(self.groups, 1, 1, 1), conv.bias.to(dtype).repeat(self.groups)
        x = F.conv2d(q.to(dtype), weight, bias, conv.stride, conv.padding, groups=q.shape[1]).to(q.dtype)
        x = x.permute(0, 2, 3, 1).unflatten(-1, (self.groups, -1)).flatten(2, 3).permute(0, 3, 1, 2)
        for layer in rest:  # [B, C/g, Hk, Wk*g] -> [B, 2, Hk, Wk*g]
            x = layer(x)
        return x.permute(0, 2, 3, 1).unflatten(2, (-1, self.groups))

    def _may_fuse_offset_network(self) -> bool:
        if not may_fuse(self.conv_offset):  # it may not even be a sequence of layers
            return False
        conv = self.conv_offset[0]
        return type(conv) is nn.Conv2d and may_fuse(conv) and have_biases(conv)

    def _positions(self, offsets: Tensor) -> tuple[Tensor, Size]:
        """Return the sampling positions ``[B, g, Hk*Wk, 2]`` and the size of the key grid."""
        key_size = offsets.shape[1:3]
        reference = reference_points(
            key_size, coordinates=self.coordinates, dtype=offsets.dtype, device=offsets.device
        ).unsqueeze(2)
        factor = self.offset_range_factor
        if self.coordinates == "cvpr22":
            if factor > 0:
                offsets = self._bounded(offsets, key_size)
            positions = reference + offsets
            positions = positions.tanh() if factor < 0 else positions
        elif factor >= 0:
            positions = reference + self._bounded(offsets, [max(length - 1, 1) for length in key_size])
        else:
            positions = (reference + offsets).clamp(-1, 1)
        return positions.flatten(1, 2).transpose(1, 2), key_size

    def _bounded(self, offsets: Tensor, cells: Sequence[int]) -> Tensor:
        """Bound offsets ``[..., 2]`` to a multiple of half the distance between keys, ``1 / cells`` on each axis."""
        y, x = (offsets.tanh() * self.offset_range_factor).unbind(-1)
        return torch.stack((y / cells[0], x / cells[1]), dim=-1)

    def _additive_bias(self, positions: Tensor, size: Size, key_size: Size) -> Tensor | None:
        """Return the bias of the logits, broadcastable to ``[B, heads, H*W, Ns]``, or None."""
        if self.position_bias == "fixed":
            native = (self.native_size, self._key_size(self.native_size))
            return fixed_bias(self.rpe_table, native=native, size=(size, key_size))
        if self.position_bias in ("table", "log_cpb"):
            grid = query_grid(size, coordinates=self.coordinates, dtype=positions.dtype, device=positions.device)
            if self.position_bias == "table":
                return table_bias(self.rpe_table, grid, positions)
            return log_continuous_bias(self.rpe_table, grid, positions)
        return None

    def _key_size(self, size: Size) -> Size:
        """Return the size of the key grid of a map."""
        if not self.use_offsets:
            return tuple(max(length // self.stride, 1) for length in size)
        kernel, padding = self.kernel_size, self.padding
        return tuple((max(length + 2 * padding, kernel) - kernel) // self.stride + 1 for length in size)


def _check(stage: StageOptions) -> None:
    stage.divides("heads", "dims")
    stage.divides("groups", "heads")
    stage.at_most_one("dwc_pes", "fixed_pes", "log_cpb", of="kind of position bias")


def _position_bias(stage: StageOptions) -> str:
    if not stage["use_pes"] or stage["no_offs"]:
        return "none"
    kinds = {"dwc_pes": "dwc", "fixed_pes": "fixed", "log_cpb": "log_cpb"}
    return next((kind for name, kind in kinds.items() if stage[name]), "table")


def _build(stage: StageOptions) -> DeformableAttention:
    return DeformableAttention(
        stage["dims"],
        heads=stage["heads"],
        groups=stage["groups"],
        map_size=stage.map_size,
        stride=stage["strides"],
        kernel_size=stage["ksizes"],
        offset_range_factor=stage["offset_range_factor"],
        use_offsets=not stage["no_offs"],
        position_bias=_position_bias(stage),
        coordinates=stage["coordinates"],
        attn_drop=stage["attn_drop_rate"],
        proj_drop=stage["drop_rate"],
    )


register("D", Mixer(build=_build, options=OPTIONS, check=_check))
