"""DAT with any image size, letter, option and precision."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from models.attention import deformable
from models.attention.letters import MIXERS
from models.dat import DAT
from models.ops.tiles import tiles_of
from tests.models.small import SMALL, VARIANTS, build_small, variant_id, without_gradient

OFFSET_NETWORK = ("0.weight", "0.bias", "1.norm.weight", "1.norm.bias", "3.weight")
SIZES = [(32, 32), (33, 47), (40, 132), (64, 64)]


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_size_gives_finite_values_and_gradients(variant: tuple[str, dict[str, Any]], size: tuple) -> None:
    letter, options = variant
    torch.manual_seed(0)
    model = build_small(letter, **options)
    x = torch.randn(2, 3, *size, requires_grad=True)
    logits = model(x)
    logits.square().sum().backward()
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert x.grad.isfinite().all()
    assert without_gradient(model) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
@pytest.mark.parametrize("form", ["auto", "reference"])
def test_a_batch_without_images_gives_no_logits(variant: tuple[str, dict[str, Any]], form: str) -> None:
    letter, options = variant
    model = build_small(letter, **options)
    for module in model.modules():
        if hasattr(module, "form"):
            module.form = form
    x = torch.zeros(0, 3, 64, 64, requires_grad=True)
    logits = model(x)
    logits.sum().backward()
    assert logits.shape == (0, 10)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_networks_run_on_the_meta_device(variant: tuple[str, dict[str, Any]]) -> None:
    letter, options = variant
    with torch.device("meta"):
        model = build_small(letter, **options)
    images = torch.zeros(2, 3, 50, 40, device="meta")
    logits = model(images)
    logits.sum().backward()
    assert (logits.shape, logits.device.type) == ((2, 10), "meta")
    tiles_of.cache_clear()
    with torch.device("meta"):
        assert model(images).shape == (2, 10)


@pytest.mark.parametrize("letters", ["LS", "ND", "PQ", "EX"])
def test_large_rectangle(letters: str) -> None:
    torch.manual_seed(0)
    model = build_small(letters, use_dwc_mlps=True, use_lpus=True)
    x = torch.randn(1, 3, 512, 768, requires_grad=True)
    logits = model(x)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert x.grad.isfinite().all()
    assert without_gradient(model) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_half_precision_autocast_is_finite(variant: tuple[str, dict[str, Any]]) -> None:
    letter, options = variant
    torch.manual_seed(0)
    model = build_small(letter, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(2, 3, 50, 40))
    assert logits.isfinite().all()
    logits.float().square().sum().backward()
    assert without_gradient(model) == []


def test_the_backward_pass_may_run_under_autocast() -> None:
    model = build_small("ND", use_dwc_mlps=True, use_lpus=True)
    x = torch.randn(2, 3, 64, 64)  # maps of native size use the fast forms
    gradients = []
    for inside in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
@torch.no_grad()
def test_half_precision_weights_run(variant: tuple[str, dict[str, Any]]) -> None:
    letter, options = variant
    torch.manual_seed(0)
    logits = build_small(letter, **options).bfloat16()(torch.randn(2, 3, 50, 40).bfloat16())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("letter", "options", "frozen"),
    [
        ("LSNDPQ", {}, set()),
        ("E", {}, {"dep_conv.weight"}),
        ("X", {"layer_scale_values": 0.1}, {"layer_scales.0.weight", "layer_scales.1.weight"}),
        ("D", {"no_offs": True}, {f"conv_offset.{name}" for name in OFFSET_NETWORK}),
    ],
)
def test_only_unused_parameters_are_frozen(letter: str, options: dict[str, Any], frozen: set[str]) -> None:
    """Published weights contain unused parameters; they are frozen, so all trainable parameters get a gradient."""
    names = {
        name for name, parameter in build_small(letter, **options).named_parameters() if not parameter.requires_grad
    }
    assert {re.sub(r"^stages\.\d\.(attns\.0\.)?", "", name) for name in names} == frozen


def test_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    model = build_small("ND", use_dwc_mlps=True, use_lpus=True).double()
    recomputing = copy.deepcopy(model)
    for stage in recomputing.stages:
        stage.use_checkpoint = True
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    gradients = []
    for network in (model, recomputing):
        network(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_block_that_is_recomputed_computes_its_keys_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable, "RECOMPUTE_FROM", 0)
    model = build_small("D")
    model.set_grad_checkpointing()
    calls = []
    model.stages[0].attns[0].proj_k.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert len(calls) == 2


def test_use_checkpoint_reaches_every_stage() -> None:
    assert all(stage.use_checkpoint for stage in DAT(**SMALL, stage_spec=["L"] * 4, use_checkpoint=True).stages)


def test_drop_path_rises_linearly_over_all_blocks() -> None:
    model = DAT(**{**SMALL, "depths": [1, 2, 1, 2]}, stage_spec=["N", "NX", "N", "NN"], drop_path_rate=0.5)
    rates = [drop.rate for stage in model.stages for drop in stage.residuals]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_dropout_is_random_in_training_and_off_in_evaluation() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    for letter in "LSNDPQE":
        # Q does not compute attention weights; it only has dropout of its output.
        options = {"drop_rate": 0.5} if letter == "Q" else {"attn_drop_rate": 0.5}
        model = DAT(**SMALL, stage_spec=[letter] * 4, **options)
        assert not torch.equal(model(x), model(x)), letter
        model.eval()
        assert torch.equal(model(x), model(x)), letter


def test_maps_stay_channels_last() -> None:
    for letter in MIXERS:
        maps = build_small(letter, use_lpus=True, use_dwc_mlps=True).forward_intermediates(
            torch.randn(2, 3, 64, 64), intermediates_only=True
        )
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps), letter


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_nan_pixels_give_nan_logits_for_their_image_only(variant: tuple[str, dict[str, Any]]) -> None:
    letter, options = variant
    model = build_small(letter, **options)
    images = torch.randn(2, 3, 64, 64)
    images[0, 0, 0, 0] = torch.nan
    logits = model(images)  # no error: the trainer skips non-finite updates
    logits.sum().backward()
    assert not logits[0].isfinite().any()
    assert logits[1].isfinite().all()


def test_images_that_are_too_small_are_rejected() -> None:
    model = build_small("L", use_conv_patches=False)
    with pytest.raises(ValueError, match=r"31 x 64 pixels .* at least 32 x 32"):
        model(torch.zeros(1, 3, 31, 64))


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3)])
def test_images_of_a_wrong_shape_are_rejected(shape: tuple[int, ...]) -> None:
    model, images = build_small("N"), torch.rand(shape)
    says = re.escape(f"images must have the shape [B, 3, H, W], not {list(shape)}; x[None] makes a batch")
    for method in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=says):
            method(images)


def test_compiles_without_a_graph_break() -> None:
    torch.manual_seed(0)
    options = {"depths": [2] * 4, "use_dwc_mlps": [True] * 4, "use_lpus": [True] * 4}
    model = DAT(**{**SMALL, **options}, stage_spec=["ND", "LS", "PQ", "EX"])
    x = torch.randn(2, 3, 64, 64)
    logits = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    logits.square().sum().backward()
    assert without_gradient(model) == []
    torch.testing.assert_close(logits, model(x))


def test_position_tables_start_small() -> None:
    torch.manual_seed(0)
    tables = {"rpb": 0.02, "rpb_table": 0.02, "rpe_table": 0.01, "relative_position_bias_table": 0.01}
    model = DAT(**{**SMALL, "depths": [2] * 4, "nat_ksizes": [13] * 4}, stage_spec=["ND", "LS", "QX", "ED"])
    seen = set()
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind in tables:
            std = 0.02 if ".3.attns.0." in name else tables[kind]  # E
            assert parameter.std().item() == pytest.approx(std, rel=0.35), name
            seen.add(kind)
    assert seen == set(tables)


@pytest.mark.parametrize("letter", ["N", "D", "S"])
def test_the_network_runs_on_fake_tensors(letter: str) -> None:
    model, mode = build_small(letter), FakeTensorMode()
    weights = {name: mode.from_tensor(value) for name, value in model.state_dict().items()}
    with mode:
        assert functional_call(model, weights, torch.empty(2, 3, 50, 40)).shape == (2, 10)


@pytest.mark.parametrize(
    "size", [384.5, "384", None, -1, (), (384,), (3, 384, 384), (384, 384.5), (True, True)], ids=str
)
def test_an_input_size_that_is_not_allowed_changes_nothing(size: Any) -> None:
    model = build_small("DS")
    before = {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"img_size = .* must be"):
        model.set_input_size(size)
    assert {name: value.shape for name, value in model.state_dict().items()} == before


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_modules_initialise_the_tensors_that_they_hold(variant: tuple[str, dict[str, Any]]) -> None:
    letter, options = variant
    model = build_small(letter, **options)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    for module in reversed(list(model.modules())):  # children first
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, value in model.state_dict().items():
        constant = expected[name].unique().numel() <= 2 or not value.is_floating_point()
        assert torch.equal(value, expected[name]) if constant else value.isfinite().all(), name
