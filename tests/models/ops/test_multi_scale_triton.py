"""The kernels of multi-scale deformable attention."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="builds of torch for CPUs come without Triton"
)


@pytest.mark.parametrize("value", ["fp32", "bf16"])
def test_every_kernel_compiles_for_a_gpu(value: str) -> None:
    """Which needs none: the interpreter takes what the compiler refuses."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.ops import multi_scale_triton as kernels

    integers = ("rows", "pixels", "queries", "heads")
    types = dict.fromkeys(("value", "out", "grad", "to_value"), f"*{value}")
    types |= dict.fromkeys(("locations", "weights", "to_locations", "to_weights"), "*fp32")
    types |= dict.fromkeys(("shapes", "starts", "origins", "order", "first"), "*i64") | dict.fromkeys(integers, "i32")
    constants = {"CHANNELS": 24, "LEVELS": 3, "POINTS": 4, "ROWS": 16, "SAMPLES": 16, "BLOCK": 32}
    for kernel in (kernels._forward, kernels._backward_places, kernels._backward_values):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        constexprs = {name: constants[name] for name in kernel.arg_names if name in constants}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
        assert "cubin" in compile(source, target=GPUTarget("cuda", 90, 32)).asm


def test_under_the_interpreter() -> None:
    """A process decides for the interpreter when it imports Triton, which torch does."""
    cases = Path(__file__).with_name("multi_scale_triton.py")
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", str(cases)]
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
