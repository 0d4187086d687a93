"""The learning rate of every update against the numbers of the published training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from config import load_config
from lr_scheduler import build_scheduler
from optimizer import build_optimizer

RECIPE = json.loads((Path(__file__).parent / "golden" / "recipe.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("model", ["dat_tiny", "dat_base_384"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
def test_learning_rates_are_the_published_ones(model: str, schedule: str) -> None:
    recipe = RECIPE[model]
    config = load_config(f"configs/{model}.yaml", ["TRAIN.LR_SCHEDULER.NAME", schedule])
    assert recipe["batch_size_per_rank"] == config.DATA.BATCH_SIZE
    assert recipe["epochs"] == config.TRAIN.EPOCHS
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2), recipe["world_size"])
    scheduler = build_scheduler(
        config, optimizer, updates_per_epoch=recipe["updates_per_epoch"], world_size=recipe["world_size"]
    )
    expected = recipe["lr_after_step_update"][schedule]
    found = {"initial": optimizer.param_groups[0]["lr"]}
    for update in expected.keys() - {"initial"}:
        scheduler.step_update(int(update))
        found[update] = optimizer.param_groups[0]["lr"]
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    for schedule in ("cosine", "linear", "step"):
        config = load_config("configs/dat_tiny.yaml", ["TRAIN.EPOCHS", 1, "TRAIN.LR_SCHEDULER.NAME", schedule])
        optimizer = build_optimizer(config, torch.nn.Linear(2, 2), 1)
        scheduler = build_scheduler(config, optimizer, updates_per_epoch=5, world_size=1)
        rates = []
        for update in range(5):
            scheduler.step_update(update)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates == sorted(rates)
        assert rates[-1] < config.TRAIN.BASE_LR
