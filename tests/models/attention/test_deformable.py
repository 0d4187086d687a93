"""Deformable attention: `inspect`, offsets, precision and recomputation of the keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import DeformableAttention, deformable
from models.ops.grids import reference_points
from models.ops.sampling import sample

KINDS = ["table", "log_cpb", "fixed", "dwc", "none"]


def build(**options: Any) -> DeformableAttention:
    torch.manual_seed(0)
    settings = {"heads": 4, "groups": 2, "map_size": 8, "stride": 2, "kernel_size": 3, **options}
    module = DeformableAttention(16, **settings).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


@pytest.mark.parametrize("position_bias", KINDS)
@pytest.mark.parametrize("size", [(8, 8), (7, 10)], ids=str)
def test_inspect_reports_what_forward_does(position_bias: str, size: tuple[int, int]) -> None:
    module = build(position_bias=position_bias)
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    seen = module.inspect(x)
    assert seen.key_size == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    assert seen.weights.shape == (2, 4, size[0] * size[1], len(seen.reference))
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones_like(seen.weights[..., 0]))

    samples = rearrange(sample(x.permute(0, 2, 3, 1), seen.positions), "b (h w) c -> b c h w", h=seen.key_size[0])
    values = rearrange(module.proj_v(samples), "b (heads d) h w -> b heads (h w) d", heads=4)
    attended = rearrange(seen.weights @ values, "b heads (h w) d -> b (heads d) h w", h=size[0])
    if position_bias == "dwc":
        attended = attended + module.rpe_table(module.proj_q(x))
    torch.testing.assert_close(module(x), module.proj_out(attended))


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        ({"offset_range_factor": -1.0}, None),
        ({"offset_range_factor": 2.0}, 2 / 3),
        ({"offset_range_factor": 0.0}, 0.0),
        ({"offset_range_factor": 2.0, "coordinates": "cvpr22"}, 2 / 4),
        ({"offset_range_factor": -1.0, "coordinates": "cvpr22"}, None),
    ],
)
def test_offsets_are_bounded(options: dict[str, Any], largest: float | None) -> None:
    module = build(**options)
    with torch.no_grad():
        module.conv_offset[3].weight.mul_(100)
    seen = module.inspect(torch.randn(2, 16, 8, 8, dtype=torch.float64))
    if largest is None:
        assert seen.positions.abs().max() <= 1
        assert seen.positions.abs().max() > 0.99
    else:
        offsets = (seen.positions - seen.reference).abs().max()
        assert offsets == pytest.approx(largest, abs=1e-3)


def test_groups_have_different_positions() -> None:
    positions = build().inspect(torch.randn(1, 16, 8, 8, dtype=torch.float64)).positions
    assert not torch.allclose(positions[:, 0], positions[:, 1])


def test_positions_stay_float32_under_autocast() -> None:
    module = build().float()
    x = torch.randn(1, 16, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        positions = module.inspect(x).positions
    assert positions.dtype == torch.float32
    torch.testing.assert_close(positions, module.inspect(x).positions, atol=0.1, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_offset_network_runs_in_float32_under_autocast_on_a_cpu(groups: int) -> None:
    module = build(groups=groups).float()
    q = torch.randn(1, 16, 8, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offsets = module._offsets(q)
    torch.testing.assert_close(offsets, module._offsets(q.float()), atol=0, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_depthwise_convolutions_of_bfloat16_modules_run_in_float32_on_a_cpu(groups: int) -> None:
    # With an even kernel, the gradient of PyTorch's bfloat16 kernel depends on uninitialised memory.
    module = build(groups=groups, kernel_size=4).bfloat16()
    seen = []

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.convolution_backward.default and args[9] > 1:
                seen.extend(tensor.dtype for tensor in args[:3])
            return function(*args, **(kwargs or {}))

    offsets = module._offsets(torch.randn(1, 16, 8, 8).bfloat16())
    with Convolutions():
        offsets.sum().backward()
    assert seen == [torch.float32] * 3


def test_pooling_replaces_sampling_without_offsets() -> None:
    module = build(use_offsets=False, position_bias="none", map_size=8)
    x = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    seen = module.inspect(x)
    reference = reference_points((4, 4), coordinates="dat++", dtype=torch.float64, device=x.device).flatten(0, 1)
    assert torch.equal(seen.positions[0, 0], reference)
    other = x.clone()
    other[..., 0, 0], other[..., 0, 1] = (
        x[..., 0, 1],
        x[..., 0, 0],
    )  # within one pooling cell: same keys
    torch.testing.assert_close(module(other)[..., 1:, :], module(x)[..., 1:, :])


def test_pooling_may_have_a_position_table() -> None:
    module = build(use_offsets=False)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)  # the last reference points lie outside of the map
    fast = module(x)
    module.form = "reference"
    torch.testing.assert_close(fast, module(x))


def test_keys_are_recomputed_with_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    monkeypatch.setattr(deformable, "RECOMPUTE_FROM", 0)
    module.proj_k.register_forward_pre_hook(lambda _, inputs: F.dropout(inputs[0]))
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64, requires_grad=True)

    def gradients() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        return torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])

    anew = gradients()
    monkeypatch.setattr(deformable, "checkpoint", lambda function, *arguments, **_: function(*arguments))
    torch.testing.assert_close(anew, gradients())


def test_the_plain_form_supports_functional_transforms() -> None:
    module = build()
    module.form = "reference"
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).square().sum())(x), expected)
