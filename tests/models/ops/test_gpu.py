"""GPU kernels: their tests run in a separate process under Triton's interpreter, and they compile for GPUs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.launches import Launches
from models.ops import gpu
from models.ops.deformable import deformable_attention
from models.ops.depthwise import conv_mlp
from models.ops.neighborhood import neighborhood_attention
from models.ops.sampling import sample

triton = pytest.importorskip("triton")
SMALLEST_SHARED_MEMORY = 101376  # bytes per block, of sm_86, sm_89 and sm_120


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


Size = tuple[int, int, int]  # images, height and width


def deformable(device: str, dtype: torch.dtype, size: Size = (2, 8, 8), head: int = 32) -> tuple[Tensor, list[Tensor]]:
    images, *map_size = size
    keys = math.prod(map_size) // 4
    q, k, v = (torch.randn(images, n, 4, head, device=device, dtype=dtype) for n in (math.prod(map_size), keys, keys))
    positions, table = torch.rand(images, 2, keys, 2, device=device), torch.randn(4, 15, 15, device=device)
    tensors = [x.requires_grad_() for x in (q, k, v, positions, table)]
    form = "auto" if device == "cuda" else "triton"
    return deformable_attention(*tensors, map_size=map_size, coordinates="dat++", scale=0.2, form=form), tensors


def neighborhood(
    device: str, dtype: torch.dtype, size: Size = (2, 9, 8), head: int = 32
) -> tuple[Tensor, list[Tensor]]:
    q, k, v = (torch.randn(*size, 4, head, device=device, dtype=dtype) for _ in range(3))
    tensors = [x.requires_grad_() for x in (q, k, v, torch.randn(4, 13, 13, device=device))]
    form = "auto" if device == "cuda" else "triton"
    return neighborhood_attention(*tensors, kernel_size=7, scale=0.2, form=form), tensors


def depthwise(device: str, dtype: torch.dtype, size: Size = (2, 9, 8)) -> tuple[Tensor, list[Tensor]]:
    shapes = (*size, 16), (80, 16), (80,), (80, 1, 3, 3), (80,), (16, 80), (16,)
    tensors = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    return conv_mlp(*tensors, form="auto" if device == "cuda" else "triton"), tensors


def sampled(device: str, dtype: torch.dtype, size: Size = (2, 9, 8)) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(*size, 64, device=device, dtype=dtype)
    positions = torch.rand(size[0], 2, math.prod(size[1:]) // 4, 2, device=device)
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


class Driver:
    """Replaces Triton's driver, for a GPU that is not there. Triton includes NVIDIA's assembler, which needs none."""

    def __init__(self, capability: int) -> None:
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> Driver:
        return self  # the key of Triton's compiled kernels; real GPUs are numbers

    def get_current_stream(self, device: Driver) -> int:
        return 0

    def get_current_target(self) -> triton.backends.compiler.GPUTarget:
        return self.target


@contextmanager
def compiling(capability: int) -> Iterator[list]:
    """Compile kernels that are launched on a CPU, for the values of their arguments; they are in the list, not run."""
    compiled, run = [], triton.JITFunction.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "INTERPRETED", True)
        patch.setattr(triton.runtime.driver, "_active", Driver(capability))
        patch.setattr(
            triton.JITFunction,
            "run",
            lambda kernel, *args, warmup, **options: compiled.append(run(kernel, *args, warmup=True, **options)),
        )
        yield compiled


def run_with_gradients(operation: Callable, dtype: torch.dtype, *arguments: object) -> None:
    out, tensors = operation("cpu", dtype, *arguments)
    torch.autograd.grad(out, tensors, torch.ones_like(out))


def multi_scale(dtype: torch.dtype, size: Size = (2, 9, 8)) -> None:
    from models.ops.gpu import multi_scale as kernels

    images, *level = size
    pixels = math.prod(level) + 4
    shapes, starts = torch.tensor([level, [2, 2]]), torch.tensor([0, pixels - 4])
    value, locations = torch.randn(images, pixels, 4, 24, dtype=dtype), torch.rand(images, pixels, 4, 2, 3, 2)
    out = kernels.forward(shapes, starts, value, locations, locations[..., 0])
    kernels.backward(shapes, starts, out, value, locations, locations[..., 0])


LAUNCHES = {name: partial(run_with_gradients, operation) for name, operation in OPERATIONS.items()}
LAUNCHES |= {"multi_scale": multi_scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "capability"), [*((name, 80) for name in OPERATIONS), ("multi_scale", 90)])
def test_every_kernel_compiles(name: str, capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products and sums fused, whatever Triton's default is."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    with compiling(capability) as compiled:
        LAUNCHES[name](dtype)
    assert len(compiled) > 1
    assert all("cubin" in kernel.asm and kernel.metadata.enable_fp_fusion for kernel in compiled)


@pytest.fixture
def products() -> Iterator[Any]:
    """Return PyTorch's settings of matrix products on a GPU, which are restored afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "precision"), [*((dtype, "ieee") for dtype in gpu.TYPES), (torch.float32, "tf32")], ids=str
)
@pytest.mark.parametrize("name", ["deformable_attention", "neighborhood_attention"])
def test_large_heads_fit_into_shared_memory(name: str, dtype: torch.dtype, precision: str, products: Any) -> None:
    products.fp32_precision = precision
    with compiling(89) as compiled:
        LAUNCHES[name](dtype, (1, 16, 16), gpu.LARGEST_HEAD)
    assert max(kernel.metadata.shared for kernel in compiled) <= SMALLEST_SHARED_MEMORY


def variants(name: str, size: Size) -> set[tuple]:
    """Return what Triton would compile for an operation: kernels, and what it fixes of their arguments."""
    found = set()
    with pytest.MonkeyPatch.context() as patch, compiling(80):
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda key, fn, **_: found.add((fn.name, key)) or True)
        LAUNCHES[name](torch.bfloat16, size)
    return found


@pytest.mark.parametrize("name", LAUNCHES)
def test_other_image_sizes_use_the_same_kernels(name: str) -> None:
    """Triton would compile a kernel anew for integers that are 1 or multiples of 16."""
    first = variants(name, (1, 7, 9))
    assert len(first) > 1
    assert variants(name, (3, 13, 10)) == variants(name, (16, 16, 32)) == first


def test_gpus_of_amd_use_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    assert gpu.has_triton(x)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert not gpu.has_triton(x)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision_of_products(precision: str, products: Any) -> None:
    from models.ops.gpu.blocks import head_blocks

    products.fp32_precision = precision
    assert head_blocks(torch.empty(1, 4, 2, 24))["PRECISION"] == precision
