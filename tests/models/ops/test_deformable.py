"""Deformable attention: all forms agree, and the fast ones save little for the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory import kept_for_backward
from models.ops.cpu import deformable as on_cpu
from models.ops.deformable import choose_form, deformable_attention

HEADS = 4


def inputs(
    size: tuple[int, int],
    native: tuple[int, int],
    *,
    batch: int = 2,
    groups: int = 2,
    keys: int = 9,
    reach: float = 1.0,
) -> list[Tensor]:
    """Return queries, keys, values, positions and a table, in float64; positions lie in ``[-reach, reach]``."""
    torch.manual_seed(0)
    q = torch.randn(batch, size[0] * size[1], HEADS, 6, dtype=torch.float64)
    k, v = torch.randn(2, batch, keys, HEADS, 6, dtype=torch.float64)
    positions = (torch.rand(batch, groups, keys, 2, dtype=torch.float64) * 2 - 1) * reach
    positions[0, 0, :4] = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * reach
    table = torch.randn(HEADS, 2 * native[0] - 1, 2 * native[1] - 1, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (q, k, v, positions, table)]


def with_gradients(form: str, tensors: list[Tensor], size: tuple[int, int], coordinates: str = "dat++") -> list[Tensor]:
    out = deformable_attention(
        *tensors, map_size=size, coordinates=coordinates, scale=0.4, clamped=form == "crops", form=form
    )
    ramp = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * ramp).sum(), tensors)]


def assert_same(form: str, tensors: list[Tensor], size: tuple[int, int], coordinates: str = "dat++") -> None:
    plain = with_gradients("reference", tensors, size, coordinates)
    names = ("output", "q", "k", "v", "positions", "table")
    for name, one, other in zip(names, with_gradients(form, tensors, size, coordinates), plain, strict=True):
        # At a corner of the map the bilinear function has a kink, where forms may use the derivative of either side.
        edge = (tensors[3].abs() < 1).all(-1, keepdim=True) if name == "positions" else torch.ones(())
        torch.testing.assert_close(
            one * edge, other * edge, atol=1e-10, rtol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [(7, 7), (6, 9), (20, 17)], ids=str)  # the last size stores crops row by row
def test_crops_on_native_maps(size: tuple[int, int], groups: int) -> None:
    assert_same("crops", inputs(size, size, groups=groups), size)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_images_at_a_time_change_nothing(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((6, 9), (6, 9), batch=3)
    monkeypatch.setattr(on_cpu, "TOGETHER", images * HEADS * 9 * 6 * 9)
    q, k, *_ = tensors
    assert [len(some) for some, _ in on_cpu._few_images(q, k)] == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[images]
    assert_same("crops", tensors, (6, 9))


@pytest.mark.parametrize("columns", [1, 4, 9])
def test_columns_at_a_time_change_nothing(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "BLOCK", 1)
    monkeypatch.setattr(on_cpu, "COLUMNS", columns)
    assert_same("separable", inputs((6, 9), (7, 5)), (6, 9))


class LargestTensor(TorchDispatchMode):
    """Records the number of values of the largest tensor that an operation returns."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_no_tensor_holds_all_weights_of_a_large_image() -> None:
    size, keys = (48, 256), 512
    tensors = [x.detach().float().requires_grad_() for x in inputs(size, (7, 7), keys=keys)]
    with LargestTensor() as largest:
        with_gradients("separable", tensors, size)
    assert largest.values <= on_cpu.BLOCK < HEADS * keys * size[0] * size[1] / 2


@pytest.mark.parametrize("coordinates", ["dat++", "cvpr22"])
@pytest.mark.parametrize("reach", [1.0, 1.7])
@pytest.mark.parametrize(
    ("size", "native"),
    [((7, 7), (7, 7)), ((5, 9), (7, 7)), ((12, 10), (7, 5)), ((1, 4), (6, 6)), ((5, 6), (1, 3))],
    ids=str,
)
def test_separable_on_any_map(size: tuple[int, int], native: tuple[int, int], reach: float, coordinates: str) -> None:
    assert_same("separable", inputs(size, native, reach=reach), size, coordinates)


@pytest.mark.parametrize(
    ("size", "clamped", "coordinates", "expected"),
    [
        ((6, 6), True, "dat++", "crops"),
        ((6, 6), False, "dat++", "separable"),  # crops at positions beyond the map would exceed the table
        ((6, 6), True, "cvpr22", "separable"),  # queries are not one cell of the table apart
        ((6, 7), True, "dat++", "separable"),
    ],
)
def test_the_form_on_a_cpu_depends_on_the_positions(
    size: tuple[int, int], clamped: bool, coordinates: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(size, (6, 6))
    taken = []
    monkeypatch.setattr(on_cpu, "attention", lambda *_, form, **options: taken.append(form))
    deformable_attention(*tensors, map_size=size, scale=0.4, coordinates=coordinates, clamped=clamped)
    assert taken == [expected]


def test_the_form_depends_on_device_dtype_and_shape() -> None:
    q = torch.zeros(1, 4, 2, 8)
    assert choose_form(q, native=True, dropout=0.1) == "reference"
    assert choose_form(q.to("meta"), native=True) == "reference"
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = q.to("cuda")
        assert choose_form(on_gpu, native=True) == choose_form(on_gpu.half(), native=False) == "triton"
        assert choose_form(on_gpu, native=True, dropout=0.1) == "reference"
        assert choose_form(on_gpu.double(), native=True) == "reference"
        assert choose_form(on_gpu.new_empty(1, 4, 2, 160), native=True) == "reference"


def test_unknown_forms_are_rejected() -> None:
    with pytest.raises(ValueError, match="form 'rows' of deformable attention is unknown; choose one of auto"):
        deformable_attention(*inputs((3, 3), (3, 3)), map_size=(3, 3), coordinates="dat++", scale=1.0, form="rows")


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("crops", {"clamped": False}, "needs clamped positions, coordinates .* and a map of native size"),
        ("crops", {"map_size": (9, 4)}, "needs clamped positions, coordinates .* and a map of native size"),
        ("crops", {"coordinates": "cvpr22"}, "needs clamped positions, coordinates .* and a map of native size"),
        ("crops", {"dropout": 0.1}, "has no dropout; choose auto or reference"),
        ("separable", {"dropout": 0.1}, "has no dropout; choose auto or reference"),
        ("triton", {}, "needs a GPU, heads of at most 128 values and at most float32; choose auto or reference"),
    ],
)
def test_forms_reject_what_they_do_not_support(form: str, options: dict[str, Any], message: str) -> None:
    options = {"map_size": (6, 6), "coordinates": "dat++", "clamped": True} | options
    with pytest.raises(ValueError, match=f"form '{form}' of deformable attention {message}"):
        deformable_attention(*inputs((6, 6), (6, 6)), scale=1.0, form=form, **options)


@pytest.mark.parametrize("form", ["crops", "separable"])
def test_attention_weights_of_large_batches_are_recomputed_in_parts(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "SAVED", 0)
    monkeypatch.setattr(on_cpu, "CACHED", 1)
    assert_same(form, inputs((6, 7), (6, 7)), (6, 7))


@pytest.mark.parametrize("form", ["crops", "separable"])
def test_empty_batch(form: str) -> None:
    tensors = [x[:0] for x in inputs((6, 7), (6, 7))[:4]] + inputs((6, 7), (6, 7))[4:]
    out = deformable_attention(*tensors, map_size=(6, 7), coordinates="dat++", scale=1.0, clamped=True, form=form)
    assert out.shape == (0, 42, HEADS, 6)


@pytest.mark.parametrize("form", ["crops", "separable"])
def test_low_precision_does_not_round_the_logits(form: str) -> None:
    tensors = inputs((7, 7), (7, 7))
    tensors[0].data *= 9  # large logits, of which bfloat16 would keep two digits
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors[:3]]
    low += [tensor.detach().float().requires_grad_() for tensor in tensors[3:]]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]

    def error(form: str) -> float:
        """Return the relative error of the gradient of the queries."""
        low_dq, dq = with_gradients(form, low, (7, 7))[1], with_gradients("reference", exact, (7, 7))[1]
        return ((low_dq - dq).norm() / dq.norm()).item()

    assert error(form) < 1.5 * error("reference") < 0.01


def saved_per_image(form: str, native: tuple[int, int], size: tuple[int, int], keys: int) -> int:
    """Return the number of values that autograd saves per image, besides queries, keys, values and positions."""
    options = {"map_size": size, "coordinates": "dat++", "scale": 1.0, "clamped": form == "crops", "form": form}
    tensors = inputs(size, native, keys=keys)
    one, two = (
        kept_for_backward(partial(deformable_attention, **options), [x[:images] for x in tensors[:4]] + tensors[4:])
        for images in (1, 2)
    )
    return (two - one) // tensors[0].element_size()


@pytest.mark.parametrize(("form", "native"), [("crops", (20, 20)), ("separable", (14, 14))])
def test_attention_weights_are_saved_only_for_small_batches(
    form: str, native: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = HEADS * 20 * 20 * 25
    assert saved_per_image("reference", native, (20, 20), 25) > 2 * weights
    if form == "crops":
        assert weights < saved_per_image(form, native, (20, 20), 25) < 1.5 * weights
        monkeypatch.setattr(on_cpu, "SAVED", 0)
    assert saved_per_image(form, native, (20, 20), 25) < 0.25 * weights
