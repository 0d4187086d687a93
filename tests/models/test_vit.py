"""The Vision Transformer: it equals timm's with softmax attention, and works with every attention."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.func import jvp

from models.attention.performer import PerformerAttention
from models.ops.locality import Window
from models.vit import ATTENTIONS, VisionTransformer
from models.weights import adapt
from tests.models.small import without_gradient

SMALL = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "drop_rate": 0.0}


def build(attention: str, *, seed: int = 0, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**{**SMALL, "attention": attention, "scales": 2, **options})


def images() -> Tensor:
    return torch.randn(2, 3, 16, 24)


def timm_model(**options: Any) -> TimmViT:
    settings = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    return TimmViT(**{**settings, **options})


def test_softmax_equals_timms_transformer() -> None:
    for pooling in ("token", "avg"):
        model = build("softmax", global_pool=pooling).eval()
        theirs = timm_model(global_pool=pooling, class_token=pooling == "token").eval()
        theirs.load_state_dict(model.state_dict())
        x = images()
        torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_weights_are_initialised_as_configured(attention: str) -> None:
    for weight_init in ("timm", "jax"):
        block = build(attention, weight_init=weight_init).blocks[0]
        assert float(block.mlp.fc1.weight.detach().std()) == pytest.approx(
            0.02 if weight_init == "timm" else (2 / 120) ** 0.5, rel=0.1
        )
    weight = block.attn.value_proj.weight if attention == "deformable" else block.attn.qkv.weight
    assert float(weight.detach().std()) == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("locality", ["none", "sequence", "box"])
@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_parameter_gets_a_gradient(attention: str, pooling: str, locality: str) -> None:
    model = build(attention, global_pool=pooling, locality=locality, scales=1)
    model.set_epoch(0)
    logits = model(images())
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_checkpointed_blocks_change_nothing(attention: str) -> None:
    results = []
    x = images()
    for use_checkpoint in (False, True):
        model = build(attention, use_checkpoint=use_checkpoint)
        loss = model(x).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results)


def test_the_window_grows_and_then_ends() -> None:
    model = build("softmax", locality="box", locality_reach=[1, 2], locality_epochs=[2, 3])
    assert [model.window_at(epoch) for epoch in range(5)] == [
        Window("box", 1),
        Window("box", 1),
        Window("box", 2),
        None,
        None,
    ]
    assert all(block.attn.window is None for block in model.blocks)  # no window before set_epoch
    model.set_epoch(2)
    assert all(block.attn.window == Window("box", 2) for block in model.blocks)
    model.set_epoch(3)
    assert all(block.attn.window is None for block in model.blocks)
    assert build("softmax").window_at(0) is None


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_resumed_run_starts_an_epoch_in_the_same_state(attention: str) -> None:
    model = build(attention, locality="box", locality_reach=[1, 2], locality_epochs=[2, 4]).eval()
    for epoch in range(4):
        model.set_epoch(epoch)
    resumed = build(attention, seed=1, locality="box", locality_reach=[1, 2], locality_epochs=[2, 4]).eval()
    resumed.load_state_dict(model.state_dict())
    resumed.set_epoch(3)
    x = images()
    assert torch.equal(resumed(x), model(x))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_timm_weights_of_other_sizes_and_classes_convert(attention: str) -> None:
    """The weights are for another image and patch size and another number of classes."""
    torch.manual_seed(1)
    state = timm_model(img_size=32, patch_size=8, num_classes=7).state_dict()
    model = build(attention, num_classes=7)
    weights, new, _ = model.convert_weights(state)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert set(missing) == new
    own = {"performer": ["random"], "disentangled": ["relative"], "disentangled_performer": ["random", "relative"]}
    own["deformable"] = ["sampling_offsets", "attention_weights"]
    assert {name.split(".")[3] for name in missing} == set(own.get(attention, []))
    if attention == "deformable":
        qkv = state["blocks.0.attn.qkv.weight"]
        assert torch.equal(model.blocks[0].attn.value_proj.weight, qkv[48:])
        assert torch.equal(model.blocks[0].attn.output_proj.weight, state["blocks.0.attn.proj.weight"])
    assert model.eval()(images()).isfinite().all()


def test_timm_weights_load_strictly_and_new_entries_are_reported() -> None:
    state = timm_model(img_size=32, patch_size=8, num_classes=7).state_dict()
    model = build("deformable")
    weights, report = adapt(state, model)
    model.load_state_dict(weights)
    lines = "\n".join(report.lines())
    assert "newly initialised (number of classes: 7 in the weights, 10 here): head.weight, head.bias" in lines
    assert "newly initialised, not in weights of this kind: blocks.0.attn.sampling_offsets.weight" in lines
    state.pop("norm.weight")
    with pytest.raises(ValueError, match=r"the weights are of another architecture: norm\.weight is missing"):
        adapt(state, model)


@pytest.mark.parametrize("source", ["performer", "disentangled", "disentangled_performer"])
@pytest.mark.parametrize("target", ["softmax", "performer", "disentangled"])
def test_weights_of_one_attention_start_another(source: str, target: str) -> None:
    weights, model = build(source, seed=1).state_dict(), build(target)
    state, report = adapt(weights, model)
    model.load_state_dict(state)
    assert torch.equal(model.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    foreign = {name for name in weights.keys() - model.state_dict().keys() if ".attn." in name}
    assert set(report.left_out) == foreign


def test_a_performer_with_many_features_approximates_pretrained_softmax() -> None:
    softmax, performer = build("softmax").eval(), build("performer", num_features=4096).eval()
    performer.load_state_dict(performer.convert_weights(softmax.state_dict())[0], strict=False)
    x = images()
    torch.testing.assert_close(performer(x), softmax(x), atol=0.01, rtol=0.01)


def test_features_differ_between_blocks_and_epochs() -> None:
    model = build("performer", redraw_epochs=2)
    layers = [module for module in model.modules() if isinstance(module, PerformerAttention)]
    assert not torch.equal(layers[0].random(), layers[1].random())
    first = layers[0].random().clone()
    model.set_epoch(1)
    assert torch.equal(layers[0].random(), first)
    model.set_epoch(2)
    assert not torch.equal(layers[0].random(), first)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_export_with_any_number_of_images(attention: str) -> None:
    model = build(attention).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, 3, 16, 24)
    torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "linear"}, "attention = 'linear' must be one of softmax, performer"),
        ({"embed_dim": 25}, "embed_dim = 25 is not divisible by num_heads = 2"),
        (
            {"attention": "performer", "attn_drop_rate": 0.1},
            "attn_drop_rate = 0.1 cannot be used with attention = 'perf",
        ),
        ({"weight_init": "moco"}, "weight_init = 'moco' must be one of timm, jax"),
        ({"locality": "circle"}, "locality = 'circle' must be one of none, sequence, box"),
        ({"depth": 0}, "depth = 0 must be at least 1"),
        ({"locality_epochs": 5}, "locality_epochs = 5 must be a list"),
        *(
            ({name: 1.0}, rf"{name} = 1.0 must be a number in \[0, 1\)")
            for name in ("drop_rate", "attn_drop_rate", "drop_path_rate")
        ),
        ({"mlp_ratio": -1.0}, "mlp_ratio = -1.0 must be above 0"),
        ({"img_size": 16, "patch_size": 32}, "img_size = 16 must be one or two numbers of at least patch_size = 32"),
        ({"img_size": (16,)}, r"img_size = \(16,\) must be one or two numbers"),
        (
            {"locality_reach": [1]},
            r"locality_reach = \[1\] and locality_epochs = \[5, 10, 15, 20\] differ in length; give one",
        ),
        ({"locality_reach": [1, 2], "locality_epochs": [4, 2]}, r"locality_epochs = \[4, 2\] must increase"),
        ({"locality_reach": [1], "locality_epochs": [0]}, r"locality_epochs = \[0\] must be whole numbers of at"),
        ({"locality_reach": [True], "locality_epochs": [1]}, r"locality_reach = \[True\] must be whole numbers of at"),
        ({"locality_reach": ["a"], "locality_epochs": [1]}, r"locality_reach = \['a'\] must be whole numbers of at"),
    ],
    ids=str,
)
def test_options_that_are_not_allowed_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**SMALL, **options})


def test_pixels_that_no_patch_sees_give_a_warning() -> None:
    with pytest.warns(UserWarning, match="img_size = 33 is not a multiple of patch_size = 4: pixels at the right"):
        VisionTransformer(**{**SMALL, "img_size": 33})


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_pickled_models_load(attention: str) -> None:
    model = build(attention).eval()
    x = images()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_the_input_size_is_fixed() -> None:
    with pytest.raises(ValueError, match="the grid of patches is fixed"):
        build("softmax").set_input_size((32, 32))


def test_windows_may_be_numbers_of_numpy() -> None:
    model = build("softmax", locality="box", locality_reach=list(np.arange(1, 3)), locality_epochs=[2, 4])
    assert model.window_at(1) == Window("box", 1)


def test_forward_derivatives_of_softmax_attention() -> None:
    model, x = build("softmax").double().eval(), images().double()
    value, change = jvp(lambda x: model(x).sum(), (x,), (torch.ones_like(x),))
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    torch.testing.assert_close(value, model(x).sum())
    torch.testing.assert_close(change, leaf.grad.sum())


def test_a_moving_average_of_a_performer_has_its_features_after_set_epoch() -> None:
    model, x = build("performer").eval(), images()
    average = ModelEmaV3(model, decay=0.0)
    model.set_epoch(3)
    average.update(model)
    assert not torch.allclose(average.module(x), model(x))
    average.module.set_epoch(3)
    torch.testing.assert_close(average.module(x), model(x))
