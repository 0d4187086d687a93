"""Weights in files of other trainers, found by the parameter names of the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from training.checkpoint import load_checkpoint
from training.weight_sets import pick_weights


def network(value: float = 0.0) -> nn.Module:
    """Return a network with a child named like a wrapper and all weights set to `value`."""
    made = nn.ModuleDict({"stem": nn.Linear(2, 2), "blocks": nn.ModuleDict({"module": nn.Linear(2, 2)})})
    made.add_module("cls_head", nn.Linear(2, 3))
    for weight in made.parameters():
        nn.init.constant_(weight, value)
    return made


def state(value: float = 1.0, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in network(value).state_dict().items()}


def value_of(checkpoint: dict[str, Any], kind: str = "") -> tuple[float, str]:
    """Return value and kind of the selected weights, whose names must be the network's."""
    picked = pick_weights(checkpoint, "x.pth", network(), kind=kind)
    assert picked.weights.keys() == state().keys()
    return next(iter(picked.weights.values())).max().item(), picked.kind


EXTRA = {"loss.weight": torch.zeros(2), "projector.0.weight": torch.zeros(2, 2)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "exp_avg": state(7.0)}


@pytest.mark.parametrize(
    ("checkpoint", "place"),
    [
        (state(), ""),
        ({"model": state(), "optimizer": OPTIMIZER, "epoch": 3}, ""),
        ({"model": state(prefix="module.")}, "model, names with prefix module."),
        ({"model": state(prefix="_orig_mod.")}, "model, names with _orig_mod."),
        (state(prefix="module._orig_mod."), "a state dict, names with prefix module., names with _orig_mod."),
        ({"model": state(prefix="_orig_mod.module.")}, "model, names with prefix module., names with _orig_mod."),
        (
            {"model": {name.replace("module.", "module._orig_mod."): x for name, x in state().items()}},
            "model, names with _orig_mod.",
        ),
        ({"state_dict": state(), "arch": "dat", "best_acc1": torch.tensor(5.0)}, "state_dict"),
        ({"state_dict": state(prefix="model.") | EXTRA}, "state_dict, names with prefix model."),
        ({"state_dict": state(prefix="backbone."), "meta": {}}, "state_dict, names with prefix backbone."),
        ({"model_state": {"network": state(prefix="encoder.module.")}}, "model_state.network, names with prefix"),
        ({"student": state(prefix="module.backbone."), "epoch": 1}, "student, names with prefix module.backbone."),
        ({"module": state(), "dp_world_size": 8}, "module"),
    ],
)
def test_weights_are_found_and_their_entry_is_noted(checkpoint: dict[str, Any], place: str) -> None:
    assert value_of(checkpoint) == (1.0, "raw")
    notes = pick_weights(checkpoint, "x.pth", network()).notes
    assert [note for note in notes if "recognised" in note] == ([notes[0]] if place else [])
    assert not place or notes[0].startswith(f"x.pth: the weights were recognised in {place}")


def test_entries_without_the_prefix_are_named() -> None:
    notes = pick_weights({"state_dict": state(prefix="model.") | EXTRA}, "x.pth", network()).notes
    assert notes[1:] == ["x.pth: not used: 2 entries without that prefix, loss.weight, projector.0.weight"]


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"state_dict": state(), "state_dict_ema": state(2.0)},
        {"model": state(), "model_ema": state(2.0)},
        {"model": state(), "model_ema": state(3.0), "model_ema_best": state(2.0)},
        {"model": state(), "ema": {"module": state(2.0, "module."), "updates": 5}},
        {"student": state(1.0, "module.backbone."), "teacher": state(2.0, "backbone.") | EXTRA},
        {"state_dict": state(1.0, "model.") | state(2.0, "ema_model.module.")},
        {"params": state(), "params_ema": state(2.0)},
        {"model": state(), "modelEma": state(2.0)},
        {"state_dict": state(), "callbacks": {"EMACallback": {"weights": state(2.0)}}},
        {"model": state(), "polyak_model": state(2.0)},
    ],
)
def test_averaged_weights_are_preferred_by_default(checkpoint: dict[str, Any]) -> None:
    assert value_of(checkpoint) == value_of(checkpoint, "ema") == (2.0, "ema")
    assert value_of(checkpoint, "raw") == (1.0, "raw")
    picked = pick_weights(checkpoint, "x.pth", network())
    assert picked.choice == "averaged weights"
    assert re.fullmatch("x.pth: averaged weights are taken from .*; it also contains .*", picked.notes[-1])


def test_checkpoint_records_which_weights_it_was_selected_by() -> None:
    both = {"model": state(), "ema": state(2.0)}
    assert value_of(both | {"chosen": "raw"}) == (1.0, "raw")
    assert value_of(both | {"chosen": "ema"}) == value_of(both) == (2.0, "ema")
    assert value_of({"model": state(), "ema": None, "chosen": "raw"}) == (1.0, "raw")
    assert pick_weights(both | {"chosen": "raw"}, "x.pth", network()).choice == "raw weights"


def test_one_set_under_two_names_is_one_set() -> None:
    averaged = state(2.0)
    picked = pick_weights({"model": state(), "ema": averaged, "model_ema": averaged}, "x.pth", network())
    assert picked.notes == []


def test_averaged_model_of_torch_is_recognised() -> None:
    assert value_of({"state_dict": AveragedModel(network(2.0)).state_dict()}) == (2.0, "ema")


def test_missing_kind_of_weights_is_rejected() -> None:
    for checkpoint in ({"model": state(), "ema": None}, {"model": state()}):
        with pytest.raises(
            ValueError, match=r"^x.pth holds no averaged weights; use --weights raw, or train with --ema$"
        ):
            pick_weights(checkpoint, "x.pth", network(), kind="ema")
    with pytest.raises(ValueError, match=r"^x.pth holds no raw weights; use --weights ema$"):
        pick_weights({"model_ema": state()}, "x.pth", network(), kind="raw")


@pytest.mark.parametrize("checkpoint", [{}, {"model": {}}, {"model": {"a": 1}}, {"model": None}, {"epoch": 3}])
def test_file_without_weights_is_rejected_with_its_contents(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^x\.pth contains no weights: neither .*; it contains ") as error:
        pick_weights(checkpoint, "x.pth", network())
    assert all(name in str(error.value) for name in checkpoint)


def test_weights_of_another_architecture_are_rejected_with_their_layout() -> None:
    other = {"net": {f"layer{i}.weight": torch.ones(1) for i in range(9)}, "opt": {}, "epoch": 3}
    with pytest.raises(ValueError, match="contains no weights of this architecture") as error:
        pick_weights(other, "x.pth", network())
    assert str(error.value).endswith(
        "such as stem.weight; it contains net: 9 tensors, layer0.weight, layer1.weight, layer2.weight, ...; "
        "2 other entries, opt, epoch"
    )


def test_files_of_safetensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state(prefix="model."), path)
    assert value_of(load_checkpoint(path)) == (1.0, "raw")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, truncated or not a safetensors file"):
        load_checkpoint(path)


def test_files_are_recognised_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_file(state(2.0, prefix="ema_model."), path)
    assert value_of(load_checkpoint(path)) == (2.0, "ema")
    script = torch.jit.script(nn.Linear(2, 2))
    script.save(str(path))
    with pytest.raises(ValueError, match=r"model\.pth is a TorchScript program, .* torch\.save\(torch\.jit\.load"):
        load_checkpoint(path)
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in state().items()})
    with pytest.raises(ValueError, match=r"model\.pth is a NumPy archive; save its arrays as tensors"):
        load_checkpoint(path)


def test_averages_without_names_give_a_note() -> None:
    averages = {"decay": 0.9, "shadow_params": list(state(2.0).values())}
    checkpoint = {"state_dict": state(prefix="model."), "ema_state": averages}
    assert value_of(checkpoint) == (1.0, "raw")
    left = "x.pth: averaged weights in ema_state.shadow_params have no names and are not used"
    assert pick_weights(checkpoint, "x.pth", network()).notes[-1] == left
    assert left not in pick_weights({"model": state(), "unlogged": [[1.0]]}, "x.pth", network()).notes
