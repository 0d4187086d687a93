"""Compiled and low-precision networks give what the plain ones give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from models.attention import DeformableAttention
from models.layers import ConvMLP
from tests.models.small import build_small, without_gradient

DAT_PP = {"use_dwc_mlps": True, "use_lpus": True}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def gradients(out: Tensor, module: torch.nn.Module) -> dict[str, Tensor]:
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
    # Three kinds of module in four stages; the second N, D and MLPs of a stage find the code of the first.
    assert counter.frame_count == 12


@pytest.mark.parametrize("kind", ["D", "MLP"])
def test_generated_code_equals_eager(kind: str) -> None:
    """The default compiler, which writes and compiles C++ here."""
    module = {
        "D": lambda: DeformableAttention(8, heads=2, groups=1, map_size=6, stride=2, kernel_size=3),
        "MLP": lambda: ConvMLP(8, expansion=2, drop=0.0),
    }[kind]()
    x = torch.randn(2, 8, 6, 6)
    eager = module(x)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients(compiled, module), gradients(eager, module), atol=1e-5, rtol=1e-3)


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
