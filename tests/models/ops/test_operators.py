"""The CPU forms as operators in graphs compiled for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attention import DeformableAttention, NeighborhoodAttention
from models.layers import ConvMLP, linear
from models.ops.cpu import operators
from models.ops.cpu.onednn import supports
from models.ops.forms import operator
from models.ops.linear import LARGE

MODULES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "neighborhood": (lambda: NeighborhoodAttention(8, heads=2, kernel_size=3), {"cpu_linear", "cpu_neighborhood"}),
    "neighborhood without a table": (
        lambda: NeighborhoodAttention(8, heads=2, kernel_size=3, use_rpb=False),
        {"cpu_linear", "cpu_neighborhood"},
    ),
    "deformable": (lambda: deformable(9), {"cpu_linear", "cpu_deformable"}),
    "deformable of another size": (lambda: deformable(6), {"cpu_linear", "cpu_deformable"}),
    "MLP": (lambda: ConvMLP(8, expansion=2, drop=0.0), {"cpu_conv_mlp"}),
}


def deformable(map_size: int) -> nn.Module:
    return DeformableAttention(8, heads=2, groups=2, map_size=map_size, stride=2, kernel_size=3)


def captured(module: nn.Module, x: Tensor) -> tuple[Tensor, set[str]]:
    """Return the output of a compiled module and the names of the operators of this package in its graph."""
    names: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        targets = (str(node.target) for node in graph.graph.nodes)
        names.update(target.split(".")[1] for target in targets if target.startswith(operator("").split(":")[0]))
        return graph

    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, dynamic=False, backend=backend)(x), names


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_graphs_for_inference_run_the_same_operations(name: str, amp: bool) -> None:
    torch.manual_seed(0)
    build, expected = MODULES[name]
    module, x = build().eval(), torch.randn(2, 9, 9, 8).permute(0, 3, 1, 2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        compiled, names = captured(module, x)
        torch.testing.assert_close(compiled, module(x))
    with_linear = amp and supports(torch.bfloat16)  # not for a few numbers in float32
    assert names == (expected if with_linear else expected - {"cpu_linear"})


def test_large_products_in_float32_run_as_an_operator() -> None:
    layer, x = nn.Linear(64, 8), torch.randn(LARGE // 64, 64)
    with torch.inference_mode():
        _, names = captured(Layer(layer), x)
        _, of_few = captured(Layer(layer), x[1:])
    assert names == ({"cpu_linear"} if supports(torch.float32) else set())
    assert not of_few


class Layer(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.layer, x)


@pytest.mark.parametrize("name", MODULES)
def test_graphs_for_training_and_exported_ones_have_plain_operations(name: str) -> None:
    module, x = MODULES[name][0](), torch.randn(2, 8, 9, 9)
    _, names = captured(module, x)
    assert not names
    with torch.no_grad():
        program = torch.export.export(module.eval(), (x,))
    assert not any(operator("").split(":")[0] in str(node.target) for node in program.graph.nodes)


def arguments(name: str) -> tuple[Any, ...]:
    q, k, v = torch.randn(3, 1, 6, 6, 2, 4).unbind()
    keys = torch.randn(2, 1, 9, 2, 4).unbind()
    return {
        "linear": (torch.randn(2, 3, 4), torch.randn(5, 4), None),
        "conv_mlp": (
            torch.randn(1, 6, 6, 4),
            *(torch.randn(shape) for shape in ((8, 4), (8,), (8, 1, 3, 3), (8,), (4, 8), (4,))),
        ),
        "neighborhood_attention": (q, k, v, torch.randn(2, 5, 5), 0.5),
        "deformable_attention": (
            q.flatten(1, 2),
            *keys,
            torch.rand(1, 1, 9, 2) * 2 - 1,
            torch.randn(2, 11, 11),
            [6, 6],
            "dat++",
            0.5,
            "crops",
        ),
    }[name]


@pytest.mark.parametrize("name", ["linear", "conv_mlp", "neighborhood_attention", "deformable_attention"])
def test_shapes_of_the_operators(name: str) -> None:
    torch.library.opcheck(getattr(operators, name), arguments(name), test_utils=("test_schema", "test_faketensor"))
