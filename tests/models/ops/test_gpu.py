"""GPU kernels: their tests run in a separate process under Triton's interpreter, and they compile for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.launches import Launches
from models.ops.deformable import deformable_attention
from models.ops.depthwise import conv_mlp
from models.ops.neighborhood import neighborhood_attention
from models.ops.sampling import sample

triton = pytest.importorskip("triton")


def run_interpreted(selection: str) -> None:
    tests = Path(__file__).parent / "gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", selection, str(tests)]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_small_shapes_under_the_interpreter() -> None:
    run_interpreted("not slow")


@pytest.mark.slow
def test_all_shapes_under_the_interpreter() -> None:
    run_interpreted("slow")


def deformable(device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    q, k, v = (torch.randn(2, length, 4, 32, device=device, dtype=dtype) for length in (64, 20, 20))
    positions, table = torch.rand(2, 2, 20, 2, device=device), torch.randn(4, 15, 15, device=device)
    tensors = [x.requires_grad_() for x in (q, k, v, positions, table)]
    form = "auto" if device == "cuda" else "triton"
    return deformable_attention(*tensors, map_size=(8, 8), coordinates="dat++", scale=0.2, form=form), tensors


def neighborhood(device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    q, k, v = (torch.randn(2, 9, 8, 4, 32, device=device, dtype=dtype) for _ in range(3))
    tensors = [x.requires_grad_() for x in (q, k, v, torch.randn(4, 13, 13, device=device))]
    form = "auto" if device == "cuda" else "triton"
    return neighborhood_attention(*tensors, kernel_size=7, scale=0.2, form=form), tensors


def depthwise(device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    shapes = (2, 9, 8, 16), (80, 16), (80,), (80, 1, 3, 3), (80,), (16, 80), (16,)
    tensors = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    return conv_mlp(*tensors, form="auto" if device == "cuda" else "triton"), tensors


def sampled(device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x, positions = torch.randn(2, 9, 8, 64, device=device, dtype=dtype), torch.rand(2, 2, 20, 2, device=device)
    tensors = [x.requires_grad_(), positions.requires_grad_()]
    return sample(*tensors, form="auto" if device == "cuda" else "triton"), tensors


OPERATIONS = {
    "deformable_attention": deformable,
    "neighborhood_attention": neighborhood,
    "depthwise_residual": depthwise,
    "sample": sampled,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_one_node_on_a_gpu(name: str) -> None:
    with FakeTensorMode(), Launches() as launches:
        OPERATIONS[name]("cuda", torch.bfloat16)
    assert launches.kernels[name] == 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_are_launched_on_the_device_of_their_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which may be another GPU."""
    current, launched = [], []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: launched.append(list(current)))
    monkeypatch.setattr("models.ops.gpu.INTERPRETED", True)
    out, tensors = OPERATIONS[name]("cpu", torch.float32)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert launched
    assert all(devices == [torch.device("cpu")] for devices in launched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kernel_compiles_for_gpus(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton includes NVIDIA's assembler, which needs no GPU."""
    started = []
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda kernel, *args, **options: started.append((kernel, args, options))
    )
    monkeypatch.setattr("models.ops.gpu.INTERPRETED", True)
    out, tensors = OPERATIONS[name]("cpu", dtype)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert len(started) > 1
    for kernel, args, options in started:
        compiled = compile_for(kernel, args, options, capability=80)
        assert "cubin" in compiled.asm


@pytest.mark.parametrize("value", ["fp32", "bf16"])
def test_every_kernel_of_multi_scale_attention_compiles(value: str) -> None:
    from models.ops.gpu import multi_scale as kernels

    integers = ("rows", "pixels", "queries", "heads")
    types = dict.fromkeys(("value", "out", "grad", "to_value"), f"*{value}")
    types |= dict.fromkeys(("locations", "weights", "to_locations", "to_weights"), "*fp32")
    types |= dict.fromkeys(("shapes", "starts", "origins", "order", "first"), "*i64") | dict.fromkeys(integers, "i32")
    constants = {"CHANNELS": 24, "LEVELS": 3, "POINTS": 4, "ROWS": 16, "SAMPLES": 16, "BLOCK": 32}
    for kernel in (kernels._forward, kernels._backward_locations, kernels._backward_values):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        constexprs = {name: constants[name] for name in kernel.arg_names if name in constants}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
        assert "cubin" in triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32)).asm


def compile_for(kernel, args: tuple, options: dict, *, capability: int):  # noqa: ANN001, ANN201
    """Compile a kernel for the arguments of a call."""
    types = {Tensor: lambda x: "*" + {torch.float32: "fp32", torch.bfloat16: "bf16"}[x.dtype]}
    types |= {int: lambda _: "i32", float: lambda _: "fp32"}
    constants = {key: value for key, value in options.items() if key in kernel.arg_names}
    signature = {key: types[type(arg)](arg) for key, arg in zip(kernel.arg_names, args, strict=False)}
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    launch = {key: options[key] for key in ("num_warps", "num_stages") if key in options}
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32), options=launch)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision_of_products(precision: str) -> None:
    from models.ops.gpu.blocks import head_blocks

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = precision
        assert head_blocks(torch.empty(1, 4, 2, 24))["PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
