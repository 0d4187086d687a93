"""Neighborhood attention: all forms agree, also with NATTEN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.attention import NeighborhoodAttention
from models.attention.neighborhood import suits_natten
from models.ops import forms
from models.ops.cpu import neighborhood as cpu
from models.ops.cpu.neighborhood import TileRows
from models.ops.neighborhood import FORMS, choose_form, neighborhood_attention
from models.ops.tiles import Tiles, tiles_of

HEADS = 2
FAST = [form for form in FORMS if form not in ("reference", "triton")]  # `gpu.test_neighborhood` tests triton


def inputs(size: tuple[int, int], kernel_size: int) -> list[Tensor]:
    """Return queries, keys, values and a table, in float64."""
    torch.manual_seed(0)
    table = HEADS, 2 * kernel_size - 1, 2 * kernel_size - 1
    shapes = [(2, *size, HEADS, 4)] * 3 + [table]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_gradients(form: str, tensors: list[Tensor], kernel_size: int, *, table: bool = True) -> list[Tensor]:
    used = tensors if table else tensors[:3]
    out = neighborhood_attention(
        *tensors[:3], tensors[3] if table else None, kernel_size=kernel_size, scale=0.7, form=form
    )
    ramp = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * ramp).sum(), used)]


# One tile, two, three and more; ragged last tiles; maps of one window; rectangles.
@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize(
    ("size", "kernel_size"),
    [((7, 7), 7), ((14, 14), 7), ((9, 17), 5), ((23, 31), 7), ((3, 41), 3), ((17, 8), 1)],
    ids=str,
)
def test_forms_agree(form: str, size: tuple[int, int], kernel_size: int) -> None:
    tensors = inputs(size, kernel_size)
    for fast, plain in zip(
        with_gradients(form, tensors, kernel_size), with_gradients("reference", tensors, kernel_size), strict=True
    ):
        torch.testing.assert_close(fast, plain, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("images", [1, 3, 6])
def test_images_at_a_time_change_nothing(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    joint = torch.randn(6, 9, 10, 3, HEADS, 4, dtype=torch.float64, requires_grad=True)  # strided views, ragged tiles
    tensors = [*joint.unbind(3), torch.randn(HEADS, 5, 5, dtype=torch.float64, requires_grad=True)]
    one = tiles_of((9, 10), 3, joint.device)
    monkeypatch.setattr(cpu, "CACHED", images * HEADS * one.count * one.queries_per_tile * one.keys_per_tile)
    assert cpu._choose_tiles(*tensors[::3])[1] == images
    for fast, plain in zip(
        with_gradients("tiles_by_hand", tensors, 3), with_gradients("reference", tensors, 3), strict=True
    ):
        torch.testing.assert_close(fast, plain, atol=1e-11, rtol=1e-10)


def test_tiles_by_hand_under_autocast_are_as_exact_as_the_plain_form() -> None:
    tensors = inputs((14, 14), 7)
    exact = with_gradients("reference", tensors, 7)
    narrow = [tensor.detach().float().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        fast, plain = (with_gradients(form, narrow, 7) for form in ("tiles_by_hand", "reference"))
    assert fast[0].dtype == torch.bfloat16
    for one, other, truth in zip(fast, plain, exact, strict=True):
        assert (one - truth).norm() < 2 * (other - truth).norm() < 0.1 * truth.norm()


@pytest.mark.parametrize("form", FAST)
def test_forms_agree_without_a_table(form: str) -> None:
    tensors = inputs((9, 10), 3)
    for fast, plain in zip(
        with_gradients(form, tensors, 3, table=False), with_gradients("reference", tensors, 3, table=False), strict=True
    ):
        torch.testing.assert_close(fast, plain, atol=1e-11, rtol=1e-10)


def test_a_query_attends_only_to_its_window() -> None:
    """Changing a key changes exactly the queries whose window contains it."""
    q, k, v, table = inputs((11, 12), 5)
    far = k.detach().clone()
    far[:, 4, 7] += 1
    changed = (
        (
            neighborhood_attention(q, far, v, table, kernel_size=5, scale=1)
            != neighborhood_attention(q, k, v, table, kernel_size=5, scale=1)
        )
        .flatten(3)
        .any(-1)[0]
    )
    rows, columns = changed.nonzero().T
    # Windows start at clamp(i - 2, 0, n - 5): those of rows 0 to 6 contain row 4, those of columns 5 to 11 column 7.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 6, 5, 11)
    assert len(rows) == 7 * 7


def test_cut_and_join_are_inverse() -> None:
    tiles = Tiles((19, 10), 5, torch.device("cpu"))
    x = torch.randn(6, 19 * 10, 4)
    torch.testing.assert_close(tiles.join(tiles.cut(x)), x, rtol=0, atol=0)


def test_join_supports_tiles_with_heads_last_in_memory() -> None:
    """The memory-efficient attention of a GPU returns this layout for one image."""
    tiles = Tiles((19, 10), 5, torch.device("cpu"))
    cut = tiles.cut(torch.randn(3, 19 * 10, 4))
    torch.testing.assert_close(tiles.join(cut.transpose(0, 1).contiguous().transpose(0, 1)), tiles.join(cut))


def rows_and_image(*, parts: int) -> tuple[TileRows, Tensor]:
    """Return the rows of tiles and an image that is one of `parts` of a tensor."""
    x = torch.randn(1, 19 * 10, parts, 6, 4, dtype=torch.float64)[:, :, parts - 1]
    return TileRows.of(Tiles((19, 10), 5, torch.device("cpu")), x), x[0]


@pytest.mark.parametrize("parts", [1, 3])
def test_rows_are_cut_and_joined_as_tiles_are(parts: int) -> None:
    rows, x = rows_and_image(parts=parts)
    tiles, by_head = Tiles((19, 10), 5, torch.device("cpu")), x.transpose(0, 1)
    torch.testing.assert_close(rows.cut(x), tiles.cut(by_head), rtol=0, atol=0)
    torch.testing.assert_close(rows.windows(x), tiles.windows(by_head), rtol=0, atol=0)
    joined = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows.join(rows.cut(x), out=joined)
    torch.testing.assert_close(joined, x, rtol=0, atol=0)


def test_cut_with_zeros_is_the_transpose_of_join() -> None:
    rows, x = rows_and_image(parts=1)
    cut, joined = rows.cut(x, zeros_beyond=True), torch.empty_like(x)
    y = torch.randn_like(cut)
    rows.join(y, out=joined)
    torch.testing.assert_close((cut * y).sum(), (x * joined).sum())


def test_sum_windows_is_the_transpose_of_windows() -> None:
    rows, x = rows_and_image(parts=1)
    windows = rows.windows(x)
    y = torch.randn_like(windows)
    torch.testing.assert_close((windows * y).sum(), (x * rows.sum_windows(y)).sum())


@pytest.mark.parametrize("size", [(5, 1), (1, 5), (9, 1)])
@pytest.mark.parametrize("heads", [1, 2])
def test_any_memory_layout_gives_the_same_result(size: tuple[int, int], heads: int) -> None:
    """Maps may be transposed or expanded, and axes of length 1 may have any stride."""
    make = torch.Generator().manual_seed(0)
    plain = torch.randn(2, *size, heads, 4, generator=make)
    odd = [99 if length == 1 else stride for length, stride in zip(plain.shape, plain.stride(), strict=True)]
    turned = plain.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    layouts = plain, turned, plain[:1, :1, :1].expand_as(plain), plain.as_strided(plain.shape, odd)
    table = torch.randn(heads, 1, 1, generator=make)
    for x in layouts:
        got, expected = (
            neighborhood_attention(x, x, x, table, kernel_size=1, scale=1.0, form=form)
            for form in ("tiles_by_hand", "reference")
        )
        torch.testing.assert_close(got, expected)


def test_tiles_made_in_inference_mode_serve_training() -> None:
    tiles_of.cache_clear()
    tensors = inputs((8, 9), 3)
    with torch.inference_mode():
        neighborhood_attention(*tensors, kernel_size=3, scale=1, form="tiles")
    neighborhood_attention(*tensors, kernel_size=3, scale=1, form="tiles").sum().backward()
    assert tensors[3].grad is not None


def test_the_form_depends_on_device_dtype_and_dropout() -> None:
    x = torch.zeros(1)
    assert choose_form(x) == choose_form(x.double()) == choose_form(x.bfloat16()) == "tiles_by_hand"
    assert choose_form(x, dropout=0.1) == choose_form(x.half()) == "tiles"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_form(x) == "tiles_by_hand"
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = x.to("cuda")
        assert choose_form(on_gpu) == choose_form(on_gpu.half()) == "triton"
        assert choose_form(on_gpu, dropout=0.1) == choose_form(on_gpu.double()) == "tiles"


def test_triton_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="form 'triton' of neighborhood attention needs a GPU, heads of at most 128"):
        neighborhood_attention(*inputs((5, 5), 3), kernel_size=3, scale=1.0, form="triton")


def test_tiles_by_hand_have_no_dropout() -> None:
    with pytest.raises(ValueError, match="form 'tiles_by_hand' of neighborhood attention has no dropout; choose auto"):
        neighborhood_attention(*inputs((5, 5), 3), kernel_size=3, scale=1.0, dropout=0.1, form="tiles_by_hand")


def test_natten_is_rejected_with_a_position_bias() -> None:
    mixer = NeighborhoodAttention(8, heads=2, kernel_size=3)
    mixer.form = "natten"
    with pytest.raises(ValueError, match="form 'natten' needs NATTEN installed, nat_rpb: false and attn_drop_rate: 0"):
        mixer(torch.randn(1, 8, 5, 5))


def test_natten_is_used_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = pytest.importorskip("natten.backends")
    monkeypatch.setattr(backends, "get_compatible_backends", lambda q, *_, **__: ["fna"] * (q.dtype == torch.float16))
    with FakeTensorMode(), torch.device("cuda"):
        half, double = (torch.empty(1, 9, 9, 2, 32, dtype=dtype) for dtype in (torch.float16, torch.float64))
    assert suits_natten(half, 5)
    assert not suits_natten(double, 5)
    assert not suits_natten(half, 1)
    assert not suits_natten(torch.empty(1, 9, 9, 2, 32, dtype=torch.float16), 5)
    monkeypatch.setattr(forms, "PLAIN", True)
    assert not suits_natten(half, 5)


def test_unknown_forms_are_rejected() -> None:
    with pytest.raises(ValueError, match="form 'fastest' of neighborhood attention is unknown; choose one of auto"):
        neighborhood_attention(*inputs((3, 3), 3), kernel_size=3, scale=1, form="fastest")


@pytest.mark.parametrize("size", [(14, 11), (7, 20)], ids=str)
def test_windows_equal_those_of_natten(size: tuple[int, int]) -> None:
    natten = pytest.importorskip("natten")
    q, k, v = (tensor.detach().float() for tensor in inputs(size, 7)[:3])
    q, k, v = (torch.nn.functional.pad(tensor, (0, 28)) for tensor in (q, k, v))  # NATTEN needs 32 values per head
    ours = neighborhood_attention(q, k, v, None, kernel_size=7, scale=0.7)
    torch.testing.assert_close(natten.na2d(q, k, v, 7, scale=0.7), ours, atol=1e-5, rtol=1e-4)


def test_natten_equals_the_other_forms_without_a_position_bias() -> None:
    pytest.importorskip("natten")
    mixer = NeighborhoodAttention(64, heads=2, kernel_size=5, use_rpb=False).eval()
    x = torch.randn(1, 64, 9, 8)
    with torch.no_grad():
        plain = mixer(x)
        mixer.form = "natten"
        torch.testing.assert_close(mixer(x), plain, atol=1e-5, rtol=1e-4)


def test_exported_graphs_with_dynamic_map_sizes_equal_eager() -> None:
    """Tiles need a known map size, so such a graph uses the plain form."""

    class Attend(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return neighborhood_attention(x, x, x, None, kernel_size=3, scale=0.5)

    free = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(Attend(), (torch.randn(2, 12, 10, 2, 4),), dynamic_shapes=(free,)).module()
    for size in ((12, 10), (17, 23)):
        x = torch.randn(2, *size, 2, 4)
        torch.testing.assert_close(exported(x), Attend()(x), atol=1e-6, rtol=1e-5)


def test_the_gradient_of_the_table_is_summed_in_float32() -> None:
    """In bfloat16, a sum of equal numbers stops growing at 256 times that number."""
    q, k = torch.zeros(2, 512, 8, 8, 1, 8, dtype=torch.bfloat16)
    v = (torch.arange(8) - 3.5).bfloat16()[:, None, None].expand_as(q)  # the keys on the right have larger values
    gradients = []
    for form, dtype in (("tiles_by_hand", torch.bfloat16), ("reference", torch.float64)):
        table = torch.zeros(1, 5, 5, dtype=dtype, requires_grad=True)
        out = neighborhood_attention(*(x.to(dtype) for x in (q, k, v)), table, kernel_size=3, scale=1.0, form=form)
        gradients += torch.autograd.grad(out.double().sum(), table)
    narrow, wide = gradients
    assert narrow.dtype == torch.bfloat16
    assert (narrow - wide).norm() < 0.01 * wide.norm()
