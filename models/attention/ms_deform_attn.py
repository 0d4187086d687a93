"""Multi-scale deformable attention as a layer (Deformable DETR, arXiv 2010.04159, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import ms_deform_attn
from ..ops.multi_scale import integers
from ..ops.precision import widen
from ..options import check_divisible


class MSDeformAttn(nn.Module):
    """Every query attends to a few points around its reference point on each of several feature maps.

    Args:
        d_model: channels.
        n_levels: number of feature maps.
        n_heads: attention heads; divides ``d_model``.
        n_points: points per head and level.

    Attributes:
        form: form of the attention, see `models.ops.ms_deform_attn`.
        im2col_step: number of images processed at a time.

    Raises:
        ValueError: an argument is not allowed.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        numbers = {"d_model": d_model, "n_levels": n_levels, "n_heads": n_heads, "n_points": n_points}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} = {number} is not allowed; give at least 1")
        check_divisible("d_model", d_model, "n_heads", n_heads)
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.im2col_step = 64
        self.form = "auto"
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, samples * 2)
        self.attention_weights = nn.Linear(d_model, samples)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise: the points of a head lie in one direction, the p-th p pixels away, all with the same weight."""
        angles = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions /= directions.abs().amax(dim=-1, keepdim=True)  # to the border of the unit square
        distances = torch.arange(1, self.n_points + 1)
        bias = directions[:, None, None] * distances[:, None]  # [heads, 1, points, 2]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(bias.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor | Sequence[Sequence[int]],
        input_level_start_index: Tensor | Sequence[int],
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to the maps.

        Args:
            query: ``[B, Q, C]``.
            reference_points: points ``[B, Q, levels, 2]``, (x, y), where 0 and 1 are the edges of the map; or boxes
                ``[B, Q, levels, 4]``, (cx, cy, w, h), which scale the offsets by half their width and height.
            input_flatten: pixels of all maps, flattened and concatenated, ``[B, S, C]``.
            input_spatial_shapes: height and width of every map, ``[levels, 2]``. Lists and tensors on the device avoid
                GPU synchronisations, see `models.ops.ms_deform_attn`.
            input_level_start_index: index of the first pixel of every map, ``[levels]``.
            input_padding_mask: ``[B, S]``, true for padding, whose values are set to zero.

        Returns:
            ``[B, Q, C]``.

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(query, reference_points, input_flatten, input_padding_mask)
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask.unsqueeze(-1), 0.0)
        out = ms_deform_attn(
            value.unflatten(-1, (self.n_heads, -1)),
            input_spatial_shapes,
            input_level_start_index,
            self.sampling_locations(query, reference_points, input_spatial_shapes),
            self.sampling_logits(query).flatten(-2).softmax(dim=-1).unflatten(-1, (self.n_levels, self.n_points)),
            self.im2col_step,
            form=self.form,
        )
        return self.output_proj(out)

    def _check(self, query: Tensor, points: Tensor, pixels: Tensor, mask: Tensor | None) -> None:
        for name, tensor in (("query", query), ("input_flatten", pixels)):
            if tensor.shape[-1] != self.d_model:
                raise ValueError(f"{name} {list(tensor.shape)} must have d_model = {self.d_model} channels")
        if points.dim() != 4 or points.shape[-1] not in (2, 4) or points.shape[2] != self.n_levels:
            raise ValueError(
                f"reference_points {list(points.shape)} do not fit; give [batch, queries, {self.n_levels}, 2 or 4]"
            )
        if points.shape[1] != query.shape[1] or points.shape[0] not in (1, query.shape[0]):
            raise ValueError(
                f"reference_points {list(points.shape)} and query {list(query.shape)} must agree in batch and queries"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != pixels.shape[:2]):
            raise ValueError(
                f"input_padding_mask {list(mask.shape)}, {mask.dtype}, must be boolean, [batch, pixels] = "
                f"{list(pixels.shape[:2])}, true for padding"
            )

    def sampling_locations(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Tensor | Sequence[Sequence[int]]
    ) -> Tensor:
        """Return the sampling locations of the queries, ``[B, Q, heads, levels, points, 2]``, at least float32."""
        offsets = widen(self.sampling_offsets(query)).unflatten(-1, (self.n_heads, self.n_levels, self.n_points, 2))
        points = reference_points.to(offsets.dtype)[:, :, None, :, None]
        if points.shape[-1] == 2:
            sizes = integers(spatial_shapes, query.device).flip(-1)[:, None]  # [levels, 1, (w, h)]
            return points + offsets / sizes
        return points[..., :2] + offsets / self.n_points * points[..., 2:] * 0.5

    def sampling_logits(self, query: Tensor) -> Tensor:
        """Return the logits of the attention weights, ``[B, Q, heads, levels, points]``."""
        return self.attention_weights(query).unflatten(-1, (self.n_heads, self.n_levels, self.n_points))
