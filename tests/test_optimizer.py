"""Parameter groups of the published training, and updates that are skipped on the device."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from config import load_config
from models import build_model
from optimizer import build_optimizer, decays, learning_rate_scale, skip_next_step

RECIPE = json.loads((Path(__file__).parent / "golden" / "recipe.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["dat_tiny", "dat_base_384"])
def test_the_published_parameters_are_not_decayed(name: str) -> None:
    config = load_config(f"configs/{name}.yaml")
    with torch.device("meta"):
        model = build_model(config)
    undecayed = [parameter for parameter, value in model.named_parameters() if not decays(parameter, value)]
    assert sorted(undecayed) == sorted(RECIPE[name]["no_decay"])
    groups = build_optimizer(config, model, 1).param_groups
    assert [len(group["params"]) for group in groups] == [RECIPE[name]["num_decay"], len(undecayed)]
    assert [group["weight_decay"] for group in groups] == [config.TRAIN.WEIGHT_DECAY, 0.0]


def test_tables_of_windows_are_not_decayed_and_frozen_weights_are_left_out() -> None:
    with torch.device("meta"):
        model = build_model(load_config("configs/cvpr22/dat_tiny.yaml"))
    tables = [name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert tables
    assert not any(decays(name, dict(model.named_parameters())[name]) for name in tables)
    model.cls_head.requires_grad_(False)
    groups = build_optimizer(load_config("configs/cvpr22/dat_tiny.yaml"), model, 1).param_groups
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in groups) == trained


def test_the_learning_rate_scales_with_images_per_update() -> None:
    config = load_config("configs/dat_tiny.yaml", ["TRAIN.ACCUMULATION_STEPS", 2])
    assert learning_rate_scale(config, 32) == 128 * 32 * 2 / 512
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2), 32)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4 * 16)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_skipped_step_leaves_weights_and_state_as_they_are(name: str) -> None:
    config = load_config("configs/dat_tiny.yaml", ["TRAIN.OPTIMIZER.NAME", name])
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(config, layer, 1)
    states = []
    before = copy.deepcopy(layer.state_dict())
    for skip, gradient in ((1.0, float("nan")), (0.0, 1.0), (1.0, float("nan")), (0.0, 1.0)):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        skip_next_step(optimizer, torch.tensor(skip))
        optimizer.step()
        states.append(copy.deepcopy((layer.state_dict(), optimizer.state_dict()["state"])))
    first, done, skipped, after = states
    torch.testing.assert_close(first[0], before, rtol=0, atol=0)
    for index in range(2):
        torch.testing.assert_close(skipped[index], done[index], rtol=0, atol=0)
    assert not torch.equal(after[0]["weight"], done[0]["weight"])
    assert after[0]["weight"].isfinite().all()


def test_sgd_takes_the_steps_of_plain_sgd() -> None:
    config = load_config("configs/dat_tiny.yaml", ["TRAIN.OPTIMIZER.NAME", "sgd"])
    ours, plain = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(config, ours, 1)
    lr, decay = optimizer.param_groups[0]["lr"], config.TRAIN.WEIGHT_DECAY
    groups = [{"params": [plain.weight], "weight_decay": decay}, {"params": [plain.bias], "weight_decay": 0.0}]
    reference = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    for _ in range(3):
        for parameter in (*ours.parameters(), *plain.parameters()):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
