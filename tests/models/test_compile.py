"""Compiled, exported and low-precision networks agree with eager ones in full precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from models.attention import DeformableAttention, NeighborhoodAttention, WindowAttention
from models.layers import ConvMLP
from tests.models.small import build_small, without_gradient

DAT_PP = {"use_dwc_mlps": True, "use_lpus": True}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def gradients(out: Tensor, module: nn.Module) -> dict[str, Tensor]:
    return dict(
        zip(
            (name for name, _ in module.named_parameters()),
            torch.autograd.grad(out.square().mean(), list(module.parameters())),
            strict=True,
        )
    )


def test_compile_blocks_changes_nothing_and_shares_code() -> None:
    model = build_small("NDND", **DAT_PP).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    eager = model(x)
    expected = gradients(eager, model)
    names = list(model.state_dict())

    counter = CompileCounterWithBackend("eager")
    model.compile_blocks(backend=counter)
    compiled = model(x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, model), expected)
    assert list(model.state_dict()) == names
    # Three kinds of module in each of four stages; further modules of a kind reuse the code of the first.
    assert counter.frame_count == 12


def test_images_of_more_sizes_than_are_compiled() -> None:
    torch._dynamo.reset()
    model = build_small("ND", **DAT_PP).eval()
    sizes = [(64, 64), (64, 96), (96, 64), (128, 64)]
    with torch.no_grad():
        expected = [model(torch.ones(1, 3, *size)) for size in sizes]
        counter = CompileCounterWithBackend("eager")
        model.compile_blocks(backend=counter)
        with torch._dynamo.config.patch(recompile_limit=5):  # 3 kinds of module, 4 stages, 4 sizes
            compiled = [model(torch.ones(1, 3, *size)) for size in sizes]
    torch.testing.assert_close(compiled, expected)
    assert counter.frame_count == 3 * 5


@pytest.mark.parametrize("kind", [pytest.param("D", marks=pytest.mark.slow), "MLP"])
def test_generated_code_equals_eager(kind: str) -> None:
    """The default backend, which generates C++ on a CPU."""
    module = {
        "D": lambda: DeformableAttention(8, heads=2, groups=1, map_size=6, stride=2, kernel_size=3),
        "MLP": lambda: ConvMLP(8, expansion=2, drop=0.0),
    }[kind]()
    x = torch.randn(2, 8, 6, 6)
    eager = module(x)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients(compiled, module), gradients(eager, module), atol=1e-5, rtol=1e-3)


def test_the_graph_of_neighborhood_attention_computes_no_index() -> None:
    """On a GPU, each index would be copied from the host in every step."""
    module = NeighborhoodAttention(8, heads=2, kernel_size=3)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = torch.randn(2, 8, 14, 9)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=backend)(x), module(x))
    (graph,) = graphs
    names = {getattr(node.target, "__name__", node.target) for node in graph.graph.nodes}
    assert "scaled_dot_product_attention" in names
    assert not names & {"tensor", "arange", "where", "zeros"}


@pytest.mark.parametrize("letter", ["N", "D"])
def test_export_with_any_number_of_images(letter: str) -> None:
    model = build_small(letter, **DAT_PP).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    images = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(exported.module()(images), model(images), atol=1e-5, rtol=1e-4)


def check_onnx(model: nn.Module, x: Tensor) -> None:
    """Check that ``model`` can be exported while gradients are enabled, and that its output stays the same."""
    program = torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False, optimize=False)
    torch.testing.assert_close(program(x)[0], model(x).detach(), atol=1e-4, rtol=1e-3)


def test_export_of_attention_to_onnx() -> None:
    deformable = DeformableAttention(16, heads=4, groups=2, map_size=8, stride=2, kernel_size=3)
    window = WindowAttention(16, heads=4, window_size=4, map_size=8, shifted=False)
    check_onnx(nn.Sequential(deformable, window), torch.randn(1, 16, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["LDNX", "QPES"])
def test_export_of_networks_to_onnx(letters: str) -> None:
    check_onnx(build_small(letters, **DAT_PP), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_close_to_full_precision(dtype: torch.dtype) -> None:
    model = build_small("ND", **DAT_PP)
    x = torch.randn(2, 3, 64, 96)
    expected = model(x)
    with torch.autocast("cpu", dtype):
        logits = model(x)
    assert logits.dtype == dtype
    logits.float().square().sum().backward()
    assert without_gradient(model) == []
    spread = expected.std()
    assert (logits.float() - expected).abs().max() < (0.1 if dtype == torch.bfloat16 else 0.02) * spread
