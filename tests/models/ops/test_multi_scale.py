"""Multi-scale deformable attention: all forms agree, for any shape and precision."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.launches import Launches
from models.ops import ms_deform_attn
from models.ops.multi_scale import _op, choose_form, integers


def random_arguments(
    seed: int, *, dtype: torch.dtype = torch.float64, reach: float = 0.4
) -> tuple[Tensor, list[list[int]], list[int], Tensor, Tensor]:
    """Return arguments of any small size; points lie up to ``reach`` of the map outside it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, channels, queries, points = (rng.randint(1, most) for most in (3, 3, 5, 7, 4))
    shapes = [[rng.randint(1, 7), rng.randint(1, 7)] for _ in range(rng.randint(1, 4))]
    areas = [height * width for height, width in shapes]
    starts = [sum(areas[:i]) for i in range(len(areas))]
    value = torch.randn(batch, sum(areas), heads, channels, dtype=dtype)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) * (1 + 2 * reach) - reach
    weights = torch.randn(batch, queries, heads, len(shapes) * points, dtype=dtype).softmax(-1)
    return value, shapes, starts, locations, weights.unflatten(-1, (len(shapes), points))


def with_gradients(arguments: tuple, **options: object) -> list[Tensor]:
    value, shapes, starts, locations, weights = arguments
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    out = ms_deform_attn(leaves[0], shapes, starts, *leaves[1:], **options)
    ramp = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * ramp).sum(), leaves)]


@pytest.mark.parametrize("reach", [0.0, 0.4, 5.0])
@pytest.mark.parametrize("seed", range(15))
def test_the_operator_equals_the_plain_form(seed: int, reach: float) -> None:
    arguments = random_arguments(seed, reach=reach)
    expected = with_gradients(arguments, form="reference")
    torch.testing.assert_close(with_gradients(arguments, form="op"), expected)
    torch.testing.assert_close(with_gradients(arguments, form="op", im2col_step=1), expected)


def test_computing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = random_arguments(3)
    expected = with_gradients(arguments)
    monkeypatch.setattr("models.ops.cpu.multi_scale.AT_A_TIME", 20)
    torch.testing.assert_close(with_gradients(arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["op", "reference"])
@pytest.mark.parametrize("where", [-1e30, 1e30, float("inf"), -float("inf")])
def test_locations_far_outside_give_zero(where: float, form: str) -> None:
    value, shapes, starts, locations, weights = random_arguments(1)
    arguments = value, shapes, starts, torch.full_like(locations, where), weights
    for result in with_gradients(arguments, form=form):
        assert not result.any()


@pytest.mark.parametrize("form", ["op", "reference"])
def test_nan_stays_nan(form: str) -> None:
    value, shapes, starts, locations, weights = random_arguments(1)
    locations[0, 0] = float("nan")
    out = ms_deform_attn(value, shapes, starts, locations, weights, form=form)
    assert out[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()


@pytest.mark.parametrize("form", ["op", "reference"])
@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty_input(empty: str, form: str) -> None:
    value, shapes, starts, locations, weights = random_arguments(2)
    if empty == "batch":
        value, locations, weights = value[:0], locations[:0], weights[:0]
    else:
        locations, weights = locations[:, :0], weights[:, :0]
    out, *gradients = with_gradients((value, shapes, starts, locations, weights), form=form)
    assert out.shape == (len(value), locations.shape[1], value.shape[2] * value.shape[3])
    assert not any(gradient.any() for gradient in gradients)


def test_shapes_as_tensors_and_strided_inputs() -> None:
    value, shapes, starts, locations, weights = random_arguments(4)
    expected = ms_deform_attn(value, shapes, starts, locations, weights)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (value, locations, weights)]
    out = ms_deform_attn(strided[0], torch.tensor(shapes), torch.tensor(starts), *strided[1:])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("form", ["op", "reference"])
def test_shapes_as_arrays_and_lists_of_tensors(form: str) -> None:
    value, shapes, starts, *others = random_arguments(4)
    expected = ms_deform_attn(value, shapes, starts, *others)
    for kind in (np.array, lambda numbers: [torch.tensor(row) for row in numbers]):
        torch.testing.assert_close(ms_deform_attn(value, kind(shapes), kind(starts), *others, form=form), expected)
        assert torch.equal(integers(kind(shapes), value.device), torch.tensor(shapes))


@pytest.mark.parametrize("form", ["op", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(dtype: torch.dtype, form: str) -> None:
    """Sums are computed in float32; gradients have the dtype of their tensor."""
    arguments = random_arguments(5, dtype=torch.float32)
    value = arguments[0].to(dtype)
    expected = with_gradients((value.double(), *arguments[1:3], *(x.double() for x in arguments[3:])))
    results = with_gradients((value, *arguments[1:]), form=form)
    assert [x.dtype for x in results] == [dtype, dtype, torch.float32, torch.float32]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, atol=tolerance * exact.abs().max().item(), rtol=0)


def test_second_derivatives() -> None:
    value, shapes, starts, locations, weights = random_arguments(8, reach=0.0)
    leaves = [x.requires_grad_() for x in (value, locations, weights)]

    def attend(*leaves: Tensor, form: str = "reference") -> Tensor:
        return ms_deform_attn(leaves[0], shapes, starts, *leaves[1:], form=form)

    assert torch.autograd.gradgradcheck(attend, leaves)
    (gradient,) = torch.autograd.grad(attend(*leaves, form="op").square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; use form='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("seed", [0, 5])
def test_the_operator_passes_opcheck(seed: int) -> None:
    value, shapes, starts, locations, weights = random_arguments(seed)
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    arguments = (leaves[0], torch.tensor(shapes), torch.tensor(starts), *leaves[1:], 64)
    torch.library.opcheck(torch.ops.dat_clone.ms_deform_attn.default, arguments)
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    backward = torch.ops.dat_clone.ms_deform_attn_backward.default
    grad = torch.randn_like(_op(*arguments))
    torch.library.opcheck(backward, (grad, *arguments), test_utils=("test_schema", "test_faketensor"))


def test_compiler_and_export_see_one_node() -> None:
    value, shapes, starts, locations, weights = random_arguments(6, dtype=torch.float32)

    class Attend(torch.nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return ms_deform_attn(value, shapes, starts, locations, weights)

    expected = Attend()(value, locations, weights)
    torch._dynamo.reset()
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value, locations, weights), expected)
    batch = {0: torch.export.Dim("batch", max=1024)}
    doubled = tuple(torch.cat([x, x]) for x in (value, locations, weights))
    exported = torch.export.export(Attend(), doubled, dynamic_shapes=(batch, batch, batch))
    torch.testing.assert_close(exported.module()(value, locations, weights), expected)
    nodes = [node for node in exported.graph.nodes if node.op == "call_function"]
    assert sum(node.target is torch.ops.dat_clone.ms_deform_attn.default for node in nodes) == 1


@pytest.mark.parametrize(
    ("device", "form"), [("cpu", "op"), ("cuda", "op"), ("meta", "op"), ("mps", "reference"), ("xpu", "reference")]
)
def test_the_operator_is_used_where_it_can_run(device: str, form: str) -> None:
    with FakeTensorMode():
        assert choose_form(torch.empty(1, 1, 1, 1, device=device)) == form


def test_the_plain_form_is_used_on_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.ops.gpu._INSTALLED", False)
    with FakeTensorMode(), Launches() as launches, torch.device("cuda"):
        arguments = random_arguments(3, dtype=torch.float32)
        assert choose_form(arguments[0]) == "reference"
        ms_deform_attn(*arguments)
        with pytest.raises(ValueError, match=r"form 'op' of multi-scale attention needs a CPU, or a GPU and Triton"):
            ms_deform_attn(*arguments, form="op")
    assert launches.kernels["gather"]
    assert not launches.kernels["ms_deform_attn"]


def test_meta_tensors_have_the_shapes_of_results() -> None:
    value, shapes, starts, locations, weights = random_arguments(3)
    expected = ms_deform_attn(value, shapes, starts, locations, weights).shape
    value, shapes, starts, locations, weights = (
        torch.as_tensor(x).to("meta") for x in (value, shapes, starts, locations, weights)
    )
    assert ms_deform_attn(value, shapes, starts, locations, weights).shape == expected


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_use_the_plain_form() -> None:
    value, shapes, starts, locations, weights = random_arguments(8, reach=0.0)

    def attend(value: Tensor, form: str = "auto") -> Tensor:
        return ms_deform_attn(value, shapes, starts, locations, weights, form=form)

    expected = torch.autograd.functional.jacobian(attend, value)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(attend)(value), expected)
        with pytest.raises(ValueError, match=r"form 'op' .* supports no transforms of torch.func; choose auto or"):
            transform(partial(attend, form="op"))(value)


def test_lists_of_levels_are_copied_to_a_gpu_once() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        arguments = random_arguments(3, dtype=torch.float32)
        ms_deform_attn(*arguments)
        with Launches() as launches:
            ms_deform_attn(*arguments)
    assert launches.kernels == {"ms_deform_attn": 1}


@pytest.mark.parametrize("form", ["op", "reference"])
def test_gradients_are_deterministic(form: str) -> None:
    arguments = random_arguments(7, dtype=torch.float32)
    first, again = (with_gradients(arguments, form=form) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_arguments_that_do_not_fit_are_rejected() -> None:
    value, shapes, starts, locations, weights = random_arguments(8)
    pixels = len(value[0])
    for levels, begins, says in (
        ([[9, 9], *shapes[1:]], starts, "levels of 81 pixels do not fit to"),
        (shapes, [start + 1 for start in starts], "from 1 on does not follow the one that ends at 0"),
        ([[0, 4], *shapes[1:]], starts, "a level of 0 x 4 from 0 on"),
    ):
        for form in ("op", "reference"):
            with pytest.raises(ValueError, match=says):
                ms_deform_attn(value, levels, begins, locations, weights, form=form)
            with pytest.raises(ValueError, match=says):
                ms_deform_attn(value, torch.tensor(levels), torch.tensor(begins), locations, weights, form=form)
    with pytest.raises(ValueError, match=f"levels of {pixels} pixels do not fit to {pixels - 1} values"):
        ms_deform_attn(value[:, :-1], shapes, starts, locations, weights)
    with pytest.raises(ValueError, match="must agree in batch, heads and levels"):
        ms_deform_attn(value, [*shapes, [1, 1]], starts, locations, weights)
    with pytest.raises(ValueError, match=r"attention_weights .* must have the shape"):
        ms_deform_attn(value, shapes, starts, locations, weights[..., :0])
    with pytest.raises(ValueError, match="form 'cuda' of multi-scale attention is unknown; choose one of auto"):
        ms_deform_attn(value, shapes, starts, locations, weights, form="cuda")
    with pytest.raises(ValueError, match="im2col_step = 0 is not allowed; give at least 1"):
        ms_deform_attn(value, shapes, starts, locations, weights, 0)
