"""The layer of multi-scale deformable attention: parity with transformers, initialisation and positions."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from benchmarks.launches import Launches
from models.attention import MSDeformAttn
from tests.models.small import without_gradient


def random_layer(rng: random.Random) -> MSDeformAttn:
    heads = rng.randint(1, 4)
    layer = MSDeformAttn(heads * rng.randint(1, 4), rng.randint(1, 4), heads, rng.randint(1, 4))
    for projection in (layer.sampling_offsets, layer.attention_weights):
        nn.init.normal_(projection.weight)
    return layer


def random_input(layer: MSDeformAttn, rng: random.Random, coordinates: int) -> tuple[list[Tensor], list[list[int]]]:
    """Return queries, reference points and pixels of levels of any size; queries are the pixels half of the time."""
    shapes = [[rng.randint(1, 8), rng.randint(1, 8)] for _ in range(layer.n_levels)]
    pixels, batch = sum(height * width for height, width in shapes), rng.randint(1, 3)
    queries = pixels if rng.random() < 0.5 else rng.randint(1, 9)
    sizes = [(batch, queries, layer.d_model), (batch, pixels, layer.d_model)]
    query, flat = (torch.randn(size, dtype=torch.float64) for size in sizes)
    points = torch.rand(batch, queries, layer.n_levels, coordinates, dtype=torch.float64)
    return [query, points, flat], shapes


def starts_of(shapes: list[list[int]]) -> list[int]:
    areas = [height * width for height, width in shapes]
    return [sum(areas[:i]) for i in range(len(areas))]


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    ramp = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * ramp).sum(), leaves)]


@pytest.mark.parametrize("seed", range(200))
def test_parity_with_transformers(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layer = random_layer(rng).double()
    config = DeformableDetrConfig(d_model=layer.d_model, num_feature_levels=layer.n_levels)
    theirs = DeformableDetrMultiscaleDeformableAttention(config, layer.n_heads, layer.n_points).double()
    theirs.load_state_dict(layer.state_dict())
    leaves, shapes = random_input(layer, rng, coordinates=2 + 2 * (seed % 2))
    for leaf in leaves:
        leaf.requires_grad_()
    query, points, flat = leaves
    padding = torch.rand(flat.shape[:2]) < 0.2 if rng.random() < 0.5 else None
    out = layer(query, points, flat, shapes, starts_of(shapes), padding)
    expected, _ = theirs(
        query,
        attention_mask=None if padding is None else ~padding,
        encoder_hidden_states=flat,
        reference_points=points,
        spatial_shapes=torch.tensor(shapes),
        spatial_shapes_list=[tuple(shape) for shape in shapes],
        level_start_index=torch.tensor(starts_of(shapes)),
    )
    results = (
        gradients(result, [*leaves, *module.parameters()]) for result, module in ((out, layer), (expected, theirs))
    )
    ours, reference = (list(result) for result in results)
    names = [name for name, _ in layer.named_parameters()]
    order = [names.index(name) for name, _ in theirs.named_parameters()]
    ours[4:] = [ours[4 + index] for index in order]
    torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-6)


def test_the_first_points_lie_in_one_direction_per_head() -> None:
    layer = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=3)
    bias = layer.sampling_offsets.bias.view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(3):
        for level in range(2):
            torch.testing.assert_close(bias[:, level, point], directions * (point + 1), atol=1e-6, rtol=0)
    for name, parameter in layer.named_parameters():
        zero = name in ("sampling_offsets.weight",) or name.startswith("attention_weights") or "proj.bias" in name
        assert parameter.any() != zero
    eighth = MSDeformAttn(64, n_levels=1, n_heads=8, n_points=1).sampling_offsets.bias.view(8, 2)[1]
    torch.testing.assert_close(eighth, torch.ones(2))  # scaled to the unit square, not to the unit circle


def test_without_offsets_a_query_gets_the_value_at_its_own_position() -> None:
    """A query gets the value at its own position from every level of the same size."""
    torch.manual_seed(0)
    layer = MSDeformAttn(8, n_levels=2, n_heads=2, n_points=2).double()
    nn.init.zeros_(layer.sampling_offsets.bias)
    shapes = [[3, 5], [3, 5]]
    centres = ((torch.arange(length, dtype=torch.float64) + 0.5) / length for length in shapes[0])
    y, x = torch.meshgrid(*centres, indexing="ij")
    points = torch.stack((x, y), -1).view(1, 15, 1, 2).expand(2, -1, 2, -1)
    flat = torch.randn(2, 15, 8, dtype=torch.float64)
    out = layer(flat, points, flat.repeat(1, 2, 1), shapes, [0, 15])
    torch.testing.assert_close(out, layer.output_proj(layer.value_proj(flat)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_positions(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    layer = random_layer(rng)
    (query, points, flat), shapes = random_input(layer, rng, 2)
    arguments = (query.float(), points.float(), flat.float(), shapes, starts_of(shapes))
    nn.init.zeros_(layer.sampling_offsets.weight)
    expected = layer(*arguments)
    with torch.autocast("cpu", dtype):
        out = layer(*arguments)
        assert layer.sampling_locations(query.float(), points.to(dtype), shapes).dtype == torch.float32
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    out.float().square().sum().backward()
    assert without_gradient(layer) == []


def test_transforms_agree_with_derivatives_in_eager_mode() -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    layer = random_layer(rng).double()
    (query, points, flat), shapes = random_input(layer, rng, coordinates=2)
    attend = partial(layer, reference_points=points, input_flatten=flat, input_spatial_shapes=shapes)
    attend = partial(attend, input_level_start_index=starts_of(shapes))
    expected = torch.autograd.functional.jacobian(attend, query)
    for _ in range(2):  # also with levels that the first call left in the cache
        torch.testing.assert_close(torch.func.jacrev(attend)(query), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(attend, query), expected)


def test_levels_are_copied_to_a_gpu_once() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        layer, points, flat = MSDeformAttn(8, n_levels=1), torch.rand(1, 4, 1, 2), torch.rand(1, 4, 8)
        layer(flat, points, flat, [[2, 2]], [0])
        with Launches() as launches:
            layer(flat, points, flat, [[2, 2]], [0])
    assert launches.kernels["ms_deform_attn"] == 1
    assert not launches.kernels["_to_copy"]


def test_arguments_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(ValueError, match="d_model = 10 is not divisible by n_heads = 4; change one of them"):
        MSDeformAttn(10, n_heads=4)
    with pytest.raises(ValueError, match="n_points = 0 is not allowed; give at least 1"):
        MSDeformAttn(8, n_points=0)
    layer = MSDeformAttn(8, n_levels=1)
    flat = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match=r"reference_points \[1, 4, 1, 3\] do not fit; give \[batch, queries, 1, 2 or"):
        layer(flat, torch.zeros(1, 4, 1, 3), flat, [[2, 2]], [0])
    points = torch.zeros(1, 4, 1, 2)
    for arguments, says in (
        ((flat, points[:, :, 0], flat), r"reference_points \[1, 4, 2\] do not fit; give \[batch, queries, 1, 2 or 4\]"),
        ((flat, points[:, :3], flat), r"reference_points \[1, 3, 1, 2\] and query \[1, 4, 8\] must agree in batch"),
        ((flat[..., :6], points, flat), r"query \[1, 4, 6\] must have d_model = 8 channels"),
        ((flat, points, flat[..., :6]), r"input_flatten \[1, 4, 6\] must have d_model = 8 channels"),
    ):
        with pytest.raises(ValueError, match=says):
            layer(*arguments, [[2, 2]], [0])
    for mask in (torch.zeros(1, 4), torch.zeros(4, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"input_padding_mask .* must be boolean, \[batch, pixels\] = \[1, 4\]"):
            layer(flat, points, flat, [[2, 2]], [0], mask)
