"""The attentions of the Vision Transformer: windows, precision and approximation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attention.disentangled import DisentangledAttention, DisentangledPerformer
from models.attention.patch_deformable import PatchDeformableAttention, token_places
from models.attention.performer import PerformerAttention
from models.attention.tokens import SoftmaxAttention, TokenAttention
from models.ops.linear_attention import choose_form, linear_attention
from models.ops.locality import Window, window_mask

GRID, DIM = (4, 5), 12
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "softmax": (SoftmaxAttention, {}),
    "performer": (PerformerAttention, {"num_features": 9, "form": "sums"}),
    "relu performer": (PerformerAttention, {"num_features": 9, "feature_kind": "relu", "form": "sums"}),
    "disentangled": (DisentangledAttention, {"span": 2}),
    "disentangled performer": (DisentangledPerformer, {"span": 1, "form": "reference", "num_features": 5}),
    "disentangled performer, sums": (DisentangledPerformer, {"span": 1, "form": "sums", "num_features": 5}),
    "deformable": (PatchDeformableAttention, {}),
    "deformable, scales": (PatchDeformableAttention, {"scales": 2}),
}
WINDOWS = [Window("sequence", 0), Window("sequence", 3), Window("sequence", 7), Window("box", 1), Window("box", 2)]


def build(kind: str, prefix: int = 1) -> nn.Module:
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    module = cls(DIM, heads=2, grid=GRID, prefix=prefix, **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def tokens(prefix: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, prefix + GRID[0] * GRID[1], DIM, dtype=torch.float64, requires_grad=True)


def seen(module: nn.Module, prefix: int) -> Tensor:
    """Return which output depends on which input token, ``[N, N]``."""
    x = tokens(prefix, batch=1)
    out = module(x)[0]
    # Sampling positions of deformable attention have rounding errors.
    rows = [torch.autograd.grad(row.sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 1e-5 for row in out]
    return torch.stack(rows)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", [k for k in KINDS if "erformer" not in k])
def test_tokens_outside_the_window_have_no_influence(kind: str, window: Window) -> None:
    module = build(kind)
    module.window = window
    mask = window_mask(GRID, 1, window)
    influence = seen(module, 1)
    assert not influence[~mask].any()
    if "deformable" not in kind:
        assert influence[mask].all()


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("kind", ["positive", "relu"])
def test_performer_with_a_window_equals_a_mask(kind: str, prefix: int, window: Window) -> None:
    module = build("performer" if kind == "positive" else "relu performer", prefix)
    module.window = window
    x = tokens(prefix)
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    weights = module.features(q, "query") @ module.features(k, "key").mT * window_mask(GRID, prefix, window)
    dense = weights @ v / weights.sum(-1, keepdim=True)
    out, expected = module(x), module.proj(dense.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y in (out, expected)]
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-8)


def test_unknown_forms_are_rejected() -> None:
    q = torch.rand(1, 1, 4, 3)
    for call in (
        lambda: PerformerAttention(DIM, heads=2, grid=GRID, prefix=1, form="dense"),
        lambda: linear_attention(q, q, q, grid=(2, 2), window=Window("box", 1), form="dense"),
    ):
        with pytest.raises(ValueError, match="form 'dense' of linear attention is unknown; choose one of auto"):
            call()


def test_the_form_depends_on_the_number_of_tokens() -> None:
    assert choose_form(1 + 64, 266, 65) == "reference"
    assert choose_form(784, 64, 65) == choose_form(12544, 64, 65) == "sums"
    results = []
    for form in ("sums", "reference"):
        module = build("performer")
        module.form, module.window = form, Window("box", 1)
        x = tokens()
        out = module(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), module.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows_in_single_precision(window: Window) -> None:
    torch.manual_seed(0)
    grid, prefix = (14, 14), 1
    q, k = (torch.rand(1, 2, 197, 24) for _ in range(2))
    v = torch.randn(1, 2, 197, 16)
    weights = q.double() @ k.double().mT * window_mask(grid, prefix, window)
    expected = weights @ v.double() / weights.sum(-1, keepdim=True)
    out = linear_attention(q, k, v, grid=grid, prefix=prefix, window=window)
    assert (out - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["performer", "disentangled performer, sums"])
def test_computing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    module = build(kind)
    module.window = Window("box", 1)
    x = tokens()
    results = []
    for size in (1 << 22, 20 * 7 * 20, 20 * 7 * 2, 1):  # all at once; two heads; two features; one
        monkeypatch.setattr("models.ops.linear_attention.AT_ONCE", size)
        out = module(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("window", [None, *WINDOWS], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_position_terms_in_linear_time_are_exact(prefix: int, window: Window | None) -> None:
    x = tokens(prefix)
    results = []
    for kind in ("disentangled performer", "disentangled performer, sums"):
        module = build(kind, prefix)
        module.window = window
        out = module(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_window_over_the_whole_map_changes_nothing(kind: str) -> None:
    if kind == "deformable, scales":
        pytest.skip("looks at the finest grid alone while it has a window")
    module, x = build(kind), tokens()
    if kind == "deformable":
        nn.init.normal_(module.sampling_offsets.weight, std=0.01)
    expected = module(x)
    for window in (Window("sequence", 19), Window("box", 4)):
        if kind == "deformable" and window.kind == "sequence":
            continue  # its window is only a part of the band
        module.window = window
        torch.testing.assert_close(module(x), expected)


def test_disentangled_attention_by_its_formula() -> None:
    module, x = build("disentangled"), tokens(batch=1)
    q, k, v = module.qkv(x)[0].unflatten(-1, (3, 2, -1)).unbind(1)  # [N, heads, d]
    position_q, position_k = module.relative(module.qkv, 2)
    buckets = module.relative.buckets
    count, out = len(q), torch.zeros_like(q)
    for head in range(2):
        logits = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(count):
                there, back = (_row(buckets, a, b) for a, b in ((i, j), (j, i)))
                logits[i, j] = (
                    q[i, head] @ k[j, head] + q[i, head] @ position_k[head, there] + k[j, head] @ position_q[head, back]
                ) / (3 * q.shape[-1]) ** 0.5
        out[:, head] = logits.softmax(-1) @ v[:, head]
    torch.testing.assert_close(module(x)[0], module.proj(out.flatten(1)))


def _row(buckets: Any, i: int, j: int) -> int:
    """Return the row of the table for two tokens; token 0 is the prefix token."""
    if i == 0 or j == 0:
        return buckets.rows - (1 if i == j else 3 if i == 0 else 2)
    (y, x), (v, u) = divmod(i - 1, GRID[1]), divmod(j - 1, GRID[1])
    return (buckets.of(y - v) + buckets.last) * buckets.side + buckets.of(x - u) + buckets.last


def test_performers_approximate_exact_attention() -> None:
    torch.manual_seed(0)
    x = tokens(batch=1).detach() / 2
    pairs = [(SoftmaxAttention, PerformerAttention, {}), (DisentangledAttention, DisentangledPerformer, {"span": 2})]
    for exact, approximate, options in pairs:
        reference = exact(DIM, heads=2, grid=GRID, prefix=1, **options).double()
        performer = approximate(DIM, heads=2, grid=GRID, prefix=1, num_features=30000, **options).double()
        performer.load_state_dict(reference.state_dict(), strict=False)
        assert (performer(x) - reference(x)).abs().max() < 0.03 * reference(x).abs().max()


def test_features_are_redrawn_only_by_set_epoch() -> None:
    module, x = build("performer"), tokens()
    first = module(x)
    torch.testing.assert_close(module(x), first)
    module.set_epoch(1)
    second = module(x)
    assert not torch.allclose(second, first)
    module.set_epoch(0)
    torch.testing.assert_close(module(x), first)
    other = build("performer")
    nn.init.zeros_(other.random.source)
    module.set_epoch(1)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), second)  # loaded weights have the same features
    module.redraw_epochs = 0
    module.set_epoch(7)
    torch.testing.assert_close(module(x), second)


@pytest.mark.parametrize("window", [None, Window("box", 1)], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_attentions_are_built_and_run_on_the_meta_device(kind: str, window: Window | None) -> None:
    with torch.device("meta"):
        module = build(kind)
    module.window = window
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}
    x = tokens().to("meta")
    assert module(x).shape == x.shape


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_attention_built_on_the_meta_device_equals_the_one_whose_weights_it_loads(kind: str, assign: bool) -> None:
    module, x = build(kind), tokens()
    with torch.device("meta"):
        other = build(kind)
    other = other if assign else other.to_empty(device="cpu")
    other.load_state_dict(module.state_dict(), assign=assign)
    torch.testing.assert_close(other(x), module(x))


def test_without_offsets_a_patch_attends_to_its_own_position_on_every_grid() -> None:
    module = build("deformable, scales")
    for projection in (module.sampling_offsets, module.attention_weights):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    x = tokens()
    assert module.shapes == [(4, 5), (2, 3)]
    planes = [nn.functional.adaptive_avg_pool2d(x[:, 1:].mT.unflatten(-1, GRID), shape) for shape in module.shapes]
    places = (2 * token_places(GRID, 1, dtype=torch.float64, device=x.device) - 1).expand(2, 1, -1, -1)
    samples = [nn.functional.grid_sample(plane, places, align_corners=False).squeeze(2) for plane in planes]
    # Beyond the border values are zero, so the bias of the projection counts only for the part of a sample inside.
    inside = [nn.functional.grid_sample(p[:, :1] * 0 + 1, places, align_corners=False).squeeze(2) for p in planes]
    values = sum(
        nn.functional.linear(y.mT, module.value_proj.weight) + part.mT * module.value_proj.bias
        for y, part in zip(samples, inside, strict=True)
    )
    torch.testing.assert_close(module(x), module.output_proj(values / 2))


@pytest.mark.parametrize("window", [None, Window("box", 1)], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_low_precision_is_close_to_float32(kind: str, window: Window | None) -> None:
    module, x = build(kind).float(), tokens().float()
    module.window = window
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    out.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("window", [None, Window("box", 1)], ids=str)
@pytest.mark.parametrize("kind", ["softmax", "performer", "disentangled performer", "deformable, scales"])
def test_compiled_equals_eager(kind: str, window: Window | None) -> None:
    torch._dynamo.reset()
    module, x = build(kind), tokens()
    module.window = window
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_the_base_class_is_abstract() -> None:
    with pytest.raises(NotImplementedError):
        TokenAttention(DIM, heads=2, grid=GRID, prefix=1)(tokens().float())


@pytest.mark.parametrize("kind", ["softmax", "deformable"])
def test_masks_are_rejected(kind: str) -> None:
    module, x = build(kind), tokens()
    for mask in ({"attn_mask": torch.zeros(21, 21)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="attn_mask and is_causal are not supported"):
            module(x, **mask)


def test_positions_are_projected_by_the_layer_of_the_content() -> None:
    """An adapter that replaces the layer, or a hook on it, takes effect on both."""
    module = build("disentangled")
    plain = module.relative(module.qkv, 2)
    module.qkv.register_forward_hook(lambda _module, _inputs, out: 3 * out)
    torch.testing.assert_close(module.relative(module.qkv, 2), tuple(3 * x for x in plain))


def test_places_of_tokens_do_not_depend_on_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        places = token_places((3, 7), 1, dtype=torch.float32, device=torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert places[1].tolist() == pytest.approx([0.5 / 7, 0.5 / 3])
