"""The learning rate of every update, compared with the published training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from config import load_config
from lr_scheduler import build_scheduler, drop_warning, learning_rates, planned_schedule, schedule_warnings
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


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_with_a_prefix_the_decay_begins_after_the_warm_up(schedule: str) -> None:
    options = ["TRAIN.EPOCHS", 30, "TRAIN.LR_SCHEDULER.NAME", schedule, "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 2]
    shape = {"updates_per_epoch": 10, "world_size": 4}
    config = load_config("configs/dat_tiny.yaml", [*options, "TRAIN.LR_SCHEDULER.WARMUP_PREFIX", True])
    rates = learning_rates(config, list(range(300)), **shape)
    peak = config.TRAIN.BASE_LR
    assert rates[200] == pytest.approx(peak, rel=0.01)  # the first update after 20 epochs of warm-up
    assert rates[210] > 0.9 * peak
    if schedule == "cosine":
        assert rates[250] == pytest.approx((peak + config.TRAIN.MIN_LR) / 2, rel=0.05)
        assert rates[299] == pytest.approx(config.TRAIN.MIN_LR, rel=0.1)
    else:
        assert rates[225] == pytest.approx(0.1 * peak)


def test_poly_warms_up_by_updates_and_falls_to_its_power() -> None:
    options = ["TRAIN.EPOCHS", 10, "TRAIN.LR_SCHEDULER.NAME", "poly", "TRAIN.WARMUP_UPDATES", 15, "TRAIN.MIN_LR", 0]
    config = load_config("configs/dat_tiny.yaml", [*options, "TRAIN.LR_SCHEDULER.POWER", 0.9])
    rates = learning_rates(config, list(range(100)), updates_per_epoch=10, world_size=4)
    peak = config.TRAIN.BASE_LR
    assert max(rates.values()) == pytest.approx(peak * (1 - 15 / 100) ** 0.9, rel=0.2)
    for update in (30, 60, 99):  # timm counts the update that was taken
        assert rates[update] == pytest.approx(peak * (1 - (update - 1) / 100) ** 0.9)


def test_milestones_decay_after_their_epochs() -> None:
    options = ["TRAIN.EPOCHS", 12, "TRAIN.LR_SCHEDULER.NAME", "milestones", "TRAIN.WARMUP_UPDATES", 5]
    config = load_config("configs/dat_tiny.yaml", [*options, "TRAIN.LR_SCHEDULER.MILESTONES", [8, 11]])
    rates = learning_rates(config, [50, 79, 82, 109, 112], updates_per_epoch=10, world_size=4)
    peak = config.TRAIN.BASE_LR
    assert list(rates.values()) == pytest.approx([peak, peak, peak / 10, peak / 10, peak / 100])


def test_steep_drop_after_the_warm_up_gives_a_warning() -> None:
    shape = {"updates_per_epoch": 100, "world_size": 4}
    published = load_config("configs/dat_tiny.yaml")
    assert drop_warning(published, **shape) == ""
    short = load_config("configs/dat_tiny.yaml", ["TRAIN.EPOCHS", 30])
    assert "the learning rate falls from 5.00e-04 to 1.29e-04 when the warm-up ends" in drop_warning(short, **shape)
    for remedy in (["TRAIN.LR_SCHEDULER.WARMUP_PREFIX", True], ["TRAIN.WARMUP_EPOCHS", 2], ["TRAIN.WARMUP_EPOCHS", 0]):
        mended = load_config("configs/dat_tiny.yaml", ["TRAIN.EPOCHS", 30, *remedy])
        assert drop_warning(mended, **shape) == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"WARMUP_EPOCHS": 20}, "TRAIN.WARMUP_EPOCHS 20 is not below TRAIN.EPOCHS 10: the learning rate never reaches"),
        ({"WARMUP_UPDATES": 500}, "TRAIN.WARMUP_UPDATES 500 is not below 100, the updates of TRAIN.EPOCHS 10: the"),
        (
            {"WARMUP_EPOCHS": 5, "PLANNED_EPOCHS": 5},
            "TRAIN.WARMUP_EPOCHS 5 is not below TRAIN.LR_SCHEDULER.PLANNED_EPOCHS 5: the learning rate never reaches",
        ),
        (
            {"NAME": "linear", "WARMUP_EPOCHS": 3, "PLANNED_EPOCHS": 7, "AFTER": "rewarm"},
            "TRAIN.WARMUP_EPOCHS 3 is not below the epochs after TRAIN.LR_SCHEDULER.PLANNED_EPOCHS: the learning rate",
        ),
        (
            {"WARMUP_LR": 0.5, "WARMUP_EPOCHS": 2},
            "the warm-up lowers the learning rate, from TRAIN.WARMUP_LR 0.5 to 0.0005",
        ),
        (
            {"MIN_LR": 0.1, "WARMUP_EPOCHS": 0},
            "the learning rate rises to TRAIN.MIN_LR 0.1, which is above TRAIN.BASE_LR 0.0005",
        ),
        ({"WARMUP_EPOCHS": 20, "WARMUP_UPDATES": 5}, ""),  # the updates count
        ({"NAME": "step"}, "does not decay within TRAIN.EPOCHS 10 with TRAIN.LR_SCHEDULER.DECAY_EPOCHS 30"),
        ({"NAME": "milestones", "MILESTONES": "[60, 80]"}, "within TRAIN.EPOCHS 10 with TRAIN.LR_SCHEDULER.MILESTONES"),
        ({"NAME": "step", "DECAY_EPOCHS": 4}, ""),
        ({"NAME": "milestones", "MILESTONES": "[]"}, ""),  # constant on purpose
    ],
)
def test_schedule_that_is_probably_unintended(options: dict[str, object], says: str) -> None:
    words: list[object] = ["TRAIN.EPOCHS", 10]
    for name, value in ({"WARMUP_EPOCHS": 1} | options).items():
        words += [f"TRAIN.{'' if name.startswith(('WARMUP', 'MIN_LR')) else 'LR_SCHEDULER.'}{name}", value]
    warnings = schedule_warnings(load_config("configs/dat_tiny.yaml", words), updates_per_epoch=10, world_size=4)
    assert len(warnings) == bool(says), warnings
    assert says in "".join(warnings)


def test_a_run_may_end_within_its_schedule() -> None:
    words = ["TRAIN.WARMUP_EPOCHS", 1, "TRAIN.EPOCHS"]
    shape = {"updates_per_epoch": 10, "world_size": 1}
    whole = load_config("configs/dat_tiny.yaml", [*words, 6])
    part = load_config("configs/dat_tiny.yaml", [*words, 3, "TRAIN.LR_SCHEDULER.PLANNED_EPOCHS", 6])
    updates = list(range(30))
    assert learning_rates(part, updates, **shape) == learning_rates(whole, updates, **shape)


@pytest.mark.parametrize("schedule", ["cosine", "poly", "linear"])
def test_schedule_of_one_update_is_its_peak_without_a_warning(
    schedule: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.LR_SCHEDULER.NAME", schedule]
    config = load_config("configs/dat_tiny.yaml", words)
    rates = learning_rates(config, [0], updates_per_epoch=1, world_size=4)
    assert rates == {0: pytest.approx(config.TRAIN.BASE_LR)}
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_the_planned_schedule_is_the_one_that_a_run_has() -> None:
    config = load_config("configs/dat_tiny.yaml", ["TRAIN.EPOCHS", 5, "TRAIN.WARMUP_EPOCHS", 1])
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2), 2)
    scheduler = build_scheduler(config, optimizer, updates_per_epoch=7, world_size=2)
    had = []
    for update in range(35):
        had.append((update / 7, optimizer.param_groups[0]["lr"]))
        scheduler.step_update(update)
    assert planned_schedule(config, updates_per_epoch=7, world_size=2) == had
    fewer = planned_schedule(config, updates_per_epoch=7, world_size=2, points=5)
    assert set(fewer) < set(had)
    assert {had[0], had[7], had[-1]} <= set(fewer)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
def test_finished_schedule_is_held_or_restarted(schedule: str) -> None:
    shape = {"updates_per_epoch": 10, "world_size": 1}
    options = ["TRAIN.WARMUP_EPOCHS", 2, "TRAIN.LR_SCHEDULER.NAME", schedule, "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 3]
    finished = load_config("configs/dat_tiny.yaml", [*options, "TRAIN.EPOCHS", 6])
    before = list(learning_rates(finished, list(range(60)), **shape).values())
    longer = [*options, "TRAIN.EPOCHS", 12, "TRAIN.LR_SCHEDULER.PLANNED_EPOCHS", 6]
    held = list(learning_rates(load_config("configs/dat_tiny.yaml", longer), list(range(120)), **shape).values())
    assert held[:60] == before
    assert set(held[60:]) == {held[60]}
    assert 0 < held[60] <= before[-1]
    longer += ["TRAIN.LR_SCHEDULER.AFTER", "rewarm"]
    anew = list(learning_rates(load_config("configs/dat_tiny.yaml", longer), list(range(120)), **shape).values())
    assert anew[:60] == before
    assert anew[60:] == before


def test_a_resumed_schedule_is_the_same_function_of_the_update() -> None:
    config = load_config("configs/digits.yaml")
    rates = learning_rates(config, list(range(100)), updates_per_epoch=10, world_size=1)
    assert learning_rates(config, [57], updates_per_epoch=10, world_size=1) == {57: rates[57]}
