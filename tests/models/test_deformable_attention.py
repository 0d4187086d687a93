"""Deformable attention with the interface of `deformable-attention`: its numbers, and what the package gets wrong."""

from __future__ import annotations

import random
from typing import Any

import deformable_attention as package
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import models.deformable_attention as ours
from benchmarks.launches import Launches
from models.attention.deformable_nd import AXES

NAMES = {1: "DeformableAttention1D", 2: "DeformableAttention2D", 3: "DeformableAttention3D"}


def random_case(seed: int) -> tuple[int, dict[str, Any], tuple[int, ...]]:
    """Return number of axes, options and input shape of a case that the package takes."""
    rng = random.Random(seed)
    axes = 1 + seed % 3
    groups = rng.choice([1, 2, 3])
    options = {
        "dim": groups * rng.choice([4, 6]),
        "dim_head": rng.choice([3, 4]),
        "heads": groups * rng.choice([1, 2]),
        "offset_groups": groups,
        "group_queries": rng.random() < 0.7,
        "group_key_values": rng.random() < 0.7,
    }
    factors = [rng.choice([1, 2, 3]) for _ in range(axes)]
    kernels = [factor + 2 * rng.choice([1, 2]) for factor in factors]
    if axes == 3:
        options |= {"downsample_factor": tuple(factors), "offset_kernel_size": tuple(kernels)}
        if rng.random() < 0.5:
            options["offset_scale"] = tuple(rng.choice([0.5, 1.0, 6.0]) for _ in range(3))
    else:
        options |= {"downsample_factor": factors[0], "offset_kernel_size": factors[0] + 2 * rng.choice([0, 1, 2])}
        factors = [factors[0]] * axes
        if rng.random() < 0.5:
            options["offset_scale"] = rng.choice([0.5, 2.0, 6.0])
        if axes == 1:
            options["cpb_log_distance"] = rng.random() < 0.5
    longest = {1: 24, 2: 9, 3: 6}[axes]
    size = tuple(rng.randint(factor, longest) for factor in factors)
    return axes, options, (rng.choice([1, 2]), options["dim"], *size)


def with_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out, vgrid = module(x, return_vgrid=True)
    ramp = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * ramp).sum() + vgrid.square().sum()
    return [out, vgrid, *torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("assign", [True, False])
def test_a_module_built_on_the_meta_device_equals_the_one_whose_weights_it_loads(axes: int, assign: bool) -> None:
    torch.manual_seed(0)
    make = getattr(ours, NAMES[axes])
    options = {"dim": 8, "heads": 2, "downsample_factor": 2, "offset_kernel_size": 4, "offset_scale": 3.0}
    module, x = make(**options), torch.randn(2, 8, *(6, 5, 4)[:axes])
    with torch.device("meta"):
        other = make(**options)
        assert other(torch.empty(x.shape)).shape == x.shape
    other = other if assign else other.to_empty(device="cpu")
    other.load_state_dict(module.state_dict(), assign=assign)
    torch.testing.assert_close(other(x), module(x))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_batch_without_maps_gives_an_empty_result(axes: int) -> None:
    module = getattr(ours, NAMES[axes])(dim=8, heads=2)
    x = torch.zeros(0, 8, *(6, 5, 4)[:axes], requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert out.shape == x.shape


def without_offsets(module: nn.Module) -> nn.Module:
    nn.init.zeros_(module.to_offsets[2].weight)
    return module


@pytest.mark.parametrize("seed", range(200))
def test_parity_with_the_package(seed: int) -> None:
    torch.manual_seed(seed)
    axes, options, shape = random_case(seed)
    theirs = getattr(package, NAMES[axes])(**options).double()
    nn.init.normal_(theirs.to_offsets[2].weight)  # large offsets, also beyond the border
    module = getattr(ours, NAMES[axes])(**options, coordinates="package").double()
    module.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(with_gradients(module, x), with_gradients(theirs, x), atol=1e-6, rtol=1e-6)


def test_defaults_equal_those_of_the_package() -> None:
    for axes in (1, 2):
        module = getattr(ours, NAMES[axes])(dim=32)
        getattr(package, NAMES[axes])(dim=32).load_state_dict(module.state_dict())
        assert module.downsample_factor == (4,) * axes
    assert ours.DeformableAttention is ours.DeformableAttention2D


@pytest.mark.parametrize("size", [(7,), (5, 8), (2, 3, 5)], ids=str)
def test_without_offsets_keys_are_the_map(size: tuple[int, ...]) -> None:
    """Without offsets and position bias, the layer is plain attention between all cells of the map."""
    torch.manual_seed(0)
    axes = len(size)
    options = {"dim": 4, "dim_head": 4, "heads": 2, "offset_groups": 1, "downsample_factor": 1}
    options["offset_kernel_size"] = (3,) * axes
    module = without_offsets(getattr(ours, NAMES[axes])(**options).double())
    nn.init.zeros_(module.rel_pos_bias.mlp[-1].weight)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    out, vgrid = module(x, return_vgrid=True)
    q, k, v = (
        layer(x).flatten(2).unflatten(1, (2, 4)).transpose(2, 3) for layer in (module.to_q, module.to_k, module.to_v)
    )
    plain = nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(2, 8, *size)
    torch.testing.assert_close(out, module.to_out(plain))
    cells = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in size), indexing="ij"))
    expected = torch.stack([cells[axis] for axis in AXES[axes]]).expand(2, -1, *[-1] * axes)
    torch.testing.assert_close(vgrid.unflatten(0, (2, -1)).reshape(expected.shape), expected)


@pytest.mark.parametrize("coordinates", ["pixel", "package"])
@pytest.mark.parametrize("size", [(9,), (4, 9), (2, 3, 9)], ids=str)
def test_where_keys_are_sampled(size: tuple[int, ...], coordinates: str) -> None:
    """If the values of the map are its coordinates, the samples are the positions of the keys."""
    axes = len(size)
    options = {"dim": axes, "dim_head": axes, "heads": 1, "downsample_factor": 1, "coordinates": coordinates}
    module = without_offsets(getattr(ours, NAMES[axes])(**options, offset_kernel_size=(3,) * axes).double())
    seen = []
    module.to_v.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    cells = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in size), indexing="ij"))[None]
    module(cells)
    same = torch.allclose(seen[0], cells)
    assert same == (coordinates == "pixel")


@pytest.mark.parametrize(
    ("size", "factor", "kernel"),
    [((1,), 4, 6), ((5,), 4, 7), ((1, 9), 4, 6), ((7, 5), 2, 3), ((3, 3), 8, 9), ((1, 1, 1), 2, 3), ((1, 7, 5), 2, 2)],
    ids=str,
)
@pytest.mark.parametrize("coordinates", ["pixel", "package"])
def test_sizes_that_the_package_rejects(size: tuple[int, ...], factor: int, kernel: int, coordinates: str) -> None:
    torch.manual_seed(0)
    axes = len(size)
    options = {"dim": 8, "dim_head": 4, "heads": 2, "downsample_factor": factor, "offset_kernel_size": kernel}
    module = getattr(ours, NAMES[axes])(**options, coordinates=coordinates)
    x = torch.randn(2, 8, *size, requires_grad=True)
    out, vgrid = module(x, return_vgrid=True)
    assert out.shape == x.shape
    if coordinates == "pixel":
        assert vgrid.shape[-axes:] == tuple(-(-length // factor) for length in size)
    out.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *module.parameters()))


def test_keys_are_spread_evenly_over_any_map() -> None:
    module = without_offsets(ours.DeformableAttention1D(dim=1, dim_head=1, heads=1, offset_kernel_size=4))
    for length in range(1, 14):
        seen = []
        hook = module.to_v.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0]))
        module(torch.arange(length).float().view(1, 1, -1))
        hook.remove()
        (places,) = seen
        torch.testing.assert_close(places, (length - 1) - places.flip(-1))  # symmetric about the middle


def test_lower_precision_keeps_positions() -> None:
    torch.manual_seed(0)
    module = ours.DeformableAttention2D(dim=16, dim_head=8, heads=2)
    x = torch.randn(2, 16, 20, 12)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, vgrid = module(x, return_vgrid=True)
    assert out.dtype == torch.bfloat16
    assert vgrid.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def with_exact_queries(axes: int) -> tuple[nn.Module, Tensor]:
    """Return a module and an input whose queries are the same numbers in every precision: the input itself."""
    torch.manual_seed(0)
    module = getattr(ours, NAMES[axes])(dim=16, dim_head=8, heads=2, offset_scale=8.0)
    with torch.no_grad():
        module.to_q.weight.copy_(torch.eye(8).repeat(2, 1).view(16, 8, *(1,) * axes))
    return module.bfloat16().float(), torch.randn(2, 16, *(9, 5, 6)[:axes]).bfloat16().float()


def gradients_of_offsets(module: nn.Module, vgrid: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in module.to_offsets.parameters() if parameter.requires_grad]
    return [gradient.float() for gradient in torch.autograd.grad(vgrid.square().sum(), parameters)]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_positions_are_computed_in_float32(axes: int) -> None:
    module, x = with_exact_queries(axes)
    _, expected = module(x, return_vgrid=True)
    gradients = gradients_of_offsets(module, expected)
    with torch.autocast("cpu", torch.bfloat16):
        _, vgrid = module(x, return_vgrid=True)
    torch.testing.assert_close(vgrid, expected)
    torch.testing.assert_close(gradients_of_offsets(module, vgrid), gradients, rtol=1e-4, atol=1e-4)
    _, vgrid = module.bfloat16()(x.bfloat16(), return_vgrid=True)
    torch.testing.assert_close(vgrid, expected)
    torch.testing.assert_close(gradients_of_offsets(module, vgrid), gradients, rtol=1e-2, atol=1e-2)


def test_displacements_enter_the_position_bias_in_float32() -> None:
    bias, seen = with_exact_queries(2)[0].rel_pos_bias, []
    bias.mlp[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    positions = torch.rand(6, 2) * 2 - 1, torch.rand(3, 4, 2) * 2 - 1
    expected = bias(*positions)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(bias(*positions).float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(bias.bfloat16()(*positions).float(), expected, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(out, seen[0]) for out in seen)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_no_numbers_are_copied_to_a_gpu(axes: int) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        module, x = getattr(ours, NAMES[axes])(dim=8, heads=2), torch.randn(2, 8, *(6, 5, 4)[:axes])
        for coordinates in ("pixel", "package"):
            module.coordinates = coordinates
            with Launches() as launches:
                module(x)
            assert not launches.kernels["_to_copy"]
            assert not launches.kernels["lift_fresh"]


def test_compiled_and_exported_equal_eager() -> None:
    torch.manual_seed(0)
    module = ours.DeformableAttention2D(dim=8, dim_head=4, heads=2).eval()
    x = torch.randn(2, 8, 9, 6)
    expected = module(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=8)},))
    torch.testing.assert_close(exported.module()(torch.cat([x, x])), torch.cat([expected, expected]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3, "offset_groups": 2}, "heads = 3 is not divisible by offset_groups = 2"),
        ({"dim": 9, "offset_groups": 2, "heads": 2}, "dim = 9 is not divisible by offset_groups = 2"),
        ({"downsample_factor": 4, "offset_kernel_size": 3}, "offset_kernel_size = .* give at least downsample_factor"),
        ({"downsample_factor": (2, 2, 2)}, r"downsample_factor = \(2, 2, 2\) must be one number, or one per axis, 2"),
        ({"downsample_factor": 0}, "downsample_factor = 0 is not allowed; give a whole number of at least 1"),
        ({"downsample_factor": (4, 2.5)}, "downsample_factor = 2.5 is not allowed; give a whole number of at least 1"),
        ({"coordinates": "corner"}, "coordinates = 'corner' is unknown; choose one of pixel, package"),
    ],
    ids=str,
)
def test_contradictory_arguments_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.DeformableAttention2D(**{"dim": 8, **options})


def test_inputs_of_the_wrong_shape_are_rejected() -> None:
    module = ours.DeformableAttention1D(dim=8)
    with pytest.raises(ValueError, match=r"shape \[1, 8, 4, 4\] does not fit; give \[batch, 8, length\]"):
        module(torch.zeros(1, 8, 4, 4))


def test_wrappers_of_layers_change_nothing() -> None:
    module, x = ours.DeformableAttention2D(dim=8, heads=2), torch.randn(2, 8, 6, 5)
    expected = module(x)
    for name, layer in list(module.named_children()):
        setattr(module, name, checkpoint_wrapper(layer))
    torch.testing.assert_close(module(x), expected)
