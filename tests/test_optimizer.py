"""Parameter groups of the published training, and updates that are skipped on the device."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from yacs.config import CfgNode

from config import load_config
from lr_scheduler import build_scheduler, learning_rates
from models.build import build_model
from models.contract import classifier, no_weight_decay
from optimizer import (
    OPTIMIZERS,
    build_optimizer,
    decays,
    freeze,
    keep_frozen_in_eval,
    learning_rate,
    learning_rate_scale,
    optimizer_names,
    parameter_groups,
    step_unless,
)

RECIPE = json.loads((Path(__file__).parent / "golden" / "recipe.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["dat_tiny", "dat_base_384"])
def test_the_published_parameters_are_not_decayed(name: str) -> None:
    config = load_config(f"configs/{name}.yaml")
    with torch.device("meta"):
        model = build_model(config)
    exceptions = no_weight_decay(model)
    kept = [name for name, value in model.named_parameters() if not decays(name, value, exceptions)]
    assert sorted(kept) == sorted(RECIPE[name]["no_decay"])
    groups = build_optimizer(config, model, 1).param_groups
    assert [len(group["params"]) for group in groups] == [RECIPE[name]["num_decay"], len(kept)]
    assert [group["weight_decay"] for group in groups] == [config.TRAIN.WEIGHT_DECAY, 0.0]


def test_tables_of_windows_are_not_decayed_and_frozen_weights_are_left_out() -> None:
    with torch.device("meta"):
        model = build_model(load_config("configs/cvpr22/dat_tiny.yaml"))
    tables = [name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert tables
    assert not any(decays(name, dict(model.named_parameters())[name], no_weight_decay(model)) for name in tables)
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
def test_skipped_step_changes_neither_weights_nor_state(name: str) -> None:
    config = load_config("configs/dat_tiny.yaml", ["TRAIN.OPTIMIZER.NAME", name])
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(config, layer, 1)
    states = []
    before = copy.deepcopy(layer.state_dict())
    for skip, gradient in ((1.0, float("nan")), (0.0, 1.0), (1.0, float("nan")), (0.0, 1.0)):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        step_unless(torch.tensor(skip), optimizer)
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


def small_network() -> torch.nn.Module:
    """Return a network with a convolution, norms, a wide matrix and a head, the same each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.GroupNorm(2, 8),
        torch.nn.Flatten(),
        torch.nn.Linear(72, 140),
        torch.nn.Linear(140, 4),
    )


def take_updates(network: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Train like the loop, with a changing learning rate; update 1 is not finite and is skipped."""
    for update in range(first, last):
        torch.manual_seed(update)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - update / 10)
        images = torch.randn(6, 3, 5, 5) * (float("nan") if update == 1 else 1.0)
        torch.nn.functional.cross_entropy(network(images), torch.arange(6) % 4).backward()
        step_unless(torch.tensor(float(update == 1)), optimizer)
        optimizer.zero_grad()


def named(name: str, *overrides: object) -> CfgNode:
    """Return a config with the optimizer `name`."""
    return load_config("configs/dat_tiny.yaml", ["TRAIN.OPTIMIZER.NAME", name, *overrides])


# Kron compiles its steps, which takes half a minute.
OFFERED = [pytest.param(n, marks=pytest.mark.slow) if n.startswith("kron") else n for n in optimizer_names()]


@pytest.mark.parametrize("name", OFFERED)
def test_every_optimizer_skips_what_is_not_finite_and_resumes_exactly(name: str) -> None:
    check_that_it_skips_and_resumes(name)


class Signs(torch.optim.Optimizer):
    """Steps by the sign of an average of the gradients."""

    def __init__(self, groups: list[dict], lr: float, beta: float = 0.9) -> None:
        super().__init__(groups, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(average.sign(), alpha=group["lr"])


def test_custom_optimizer_needs_only_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "signs", lambda groups, settings, **arguments: Signs(groups, **arguments))
    check_that_it_skips_and_resumes("signs")
    optimizer = build_optimizer(named("signs", "TRAIN.OPTIMIZER.ARGS.beta", "0.5"), torch.nn.Linear(2, 2), 1)
    assert optimizer.param_groups[0]["beta"] == 0.5
    with pytest.raises(ValueError, match=r"TRAIN\.OPTIMIZER: .*'betta'"):
        build_optimizer(named("signs", "TRAIN.OPTIMIZER.ARGS.betta", "0.5"), torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="no optimizer 'sings'; did you mean signs"):
        build_optimizer(named("sings"), torch.nn.Linear(2, 2), 1)


def check_that_it_skips_and_resumes(name: str) -> None:
    """Check that training with and without resuming gives the same weights, with a skipped update."""
    whole, broken = small_network(), small_network()
    optimizer, first = (build_optimizer(named(name), network, 1) for network in (whole, broken))
    take_updates(whole, optimizer, 0, 5)
    take_updates(broken, first, 0, 3)
    file = io.BytesIO()
    torch.save({"model": broken.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = small_network()
    resumed.load_state_dict(saved["model"])
    second = build_optimizer(named(name), resumed, 1)
    second.load_state_dict(saved["optimizer"])
    take_updates(resumed, second, 3, 5)
    for key, value in whole.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert not torch.equal(whole[3].weight, small_network()[3].weight)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adamv", "there is no optimizer 'adamv'; did you mean adam"),
        ("zzz", "there is no optimizer 'zzz'; timm.optim.list_optimizers"),
        ("lookahead_adam", "there is no optimizer 'lookahead_adam'"),
        ("adahessian", "adahessian cannot be used here: it needs second derivatives"),
        ("bnbadam8bit", "bnbadam8bit cannot be used here: it needs the package bitsandbytes"),
        ("fusedlamb", "fusedlamb cannot be used here: it needs the package apex"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_with_the_reason(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        build_optimizer(named(name), torch.nn.Linear(2, 2), 1)


def test_arguments_reach_the_optimizer_and_wrong_ones_are_named() -> None:
    layer = torch.nn.Linear(2, 2)
    lion = build_optimizer(named("lion", "TRAIN.OPTIMIZER.ARGS.betas", "[0.95, 0.98]"), layer, 1)
    assert tuple(lion.param_groups[0]["betas"]) == (0.95, 0.98)
    assert build_optimizer(named("adamw", "TRAIN.OPTIMIZER.ARGS", "{amsgrad: true}"), layer, 1).defaults["amsgrad"]
    with pytest.raises(ValueError, match=r"TRAIN\.OPTIMIZER: .*beta3"):
        build_optimizer(named("lion", "TRAIN.OPTIMIZER.ARGS.beta3", "1"), layer, 1)
    with pytest.raises(ValueError, match=r"ARGS\.lr is set by TRAIN\.BASE_LR; remove it"):
        build_optimizer(named("lion", "TRAIN.OPTIMIZER.ARGS.lr", "1"), layer, 1)
    with pytest.raises(ValueError, match=r"TRAIN\.OPTIMIZER\.BETAS is only for adamw; .*ARGS\.betas for lion"):
        named("lion", "TRAIN.OPTIMIZER.BETAS", "[0.9, 0.99]")


def test_rates_fall_from_layer_to_layer_and_the_head_has_its_own() -> None:
    network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    groups = parameter_groups(network, weight_decay=0.05, layer_decay=0.5, head_scale=10.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    scales = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    assert scales["head.weight"] == (10.0, 0.05)
    assert scales["head.bias"] == (10.0, 0.0)
    assert scales["norm.weight"] == (0.5, 0.0)
    assert scales["blocks.1.mlp.fc1.weight"] == (0.5, 0.05)
    assert scales["blocks.0.mlp.fc1.weight"] == (0.25, 0.05)
    assert scales["patch_embed.proj.weight"] == (0.125, 0.05)
    assert scales["pos_embed"] == (0.125, 0.0)  # which timm's model exempts


def test_the_backbone_has_its_own_learning_rate() -> None:
    config = load_config(
        "configs/segmentation/digits_fpn.yaml", ["TRAIN.BACKBONE_LR_SCALE", 0.1, "TRAIN.HEAD_LR_SCALE", 5]
    )
    network = build_model(config)
    optimizer = build_optimizer(config, network, 1)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    seen = {name: scales[id(parameter)] for name, parameter in network.named_parameters()}
    head = classifier(network)
    assert seen.keys() == {name for name, _ in network.named_parameters()}
    for name, scale in seen.items():
        assert scale == (0.1 if name.startswith("backbone.") else 5.0 if name.startswith(f"{head}.") else 1.0), name
    assert set(seen.values()) == {0.1, 1.0, 5.0}
    assert optimizer.param_groups[0]["lr_scale"] == 5.0  # the head, whose factor `learning_rate` divides by


def test_a_schedule_applies_the_factors_of_the_groups() -> None:
    config = load_config("configs/dat_tiny.yaml", ["TRAIN.HEAD_LR_SCALE", 10])
    network = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    optimizer = build_optimizer(config, network, 1)
    scheduler = build_scheduler(config, optimizer, updates_per_epoch=5, world_size=1)
    plain = learning_rates(config, [0, 50, 1000], updates_per_epoch=5, world_size=1)
    for update, rate in plain.items():
        if update:
            scheduler.step_update(update - 1)
        assert learning_rate(optimizer) == pytest.approx(rate)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([10 * rate] * 2 + [rate] * 2)


def test_frozen_parts_do_not_change_and_stay_in_evaluation_mode() -> None:
    network = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout()),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Dropout(),
    )
    assert freeze(network, ["0", "1.bias"]) == sum(p.numel() for p in network[0].parameters()) + 4
    network.train()
    keep_frozen_in_eval(network)
    assert [module.training for module in network[0].modules()] == [False] * 4
    assert network[1].training
    assert network[2].training
    before = copy.deepcopy(network[0].state_dict())
    optimizer = build_optimizer(load_config("configs/dat_tiny.yaml"), network, 1)
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(network[0].state_dict(), before, rtol=0, atol=0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["weigth"], "no part named 'weigth'; did you mean weight"),
        (["stem"], "no part named 'stem'"),
        (["*"], "leaves nothing to train"),
    ],
)
def test_unknown_frozen_part_is_rejected(patterns: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=rf"TRAIN\.FREEZE.*{says}"):
        freeze(torch.nn.Linear(2, 2), patterns)


@pytest.mark.parametrize(
    ("option", "needs"),
    [
        ("LAYER_DECAY", "does not define its layers"),
        ("HEAD_LR_SCALE", "no classifier"),
        ("BACKBONE_LR_SCALE", "no backbone"),
    ],
)
def test_factor_without_matching_part_of_the_network_is_rejected(option: str, needs: str) -> None:
    config = load_config("configs/dat_tiny.yaml", [f"TRAIN.{option}", "0.5"])
    with pytest.raises(ValueError, match=rf"TRAIN\.{option}: Linear .*{needs}"):
        build_optimizer(config, torch.nn.Linear(2, 2), 1)


def test_learning_rates_are_scaled_by_name() -> None:
    linear = torch.nn.Linear
    network = torch.nn.ModuleDict({"a": linear(2, 2), "b": linear(2, 2), "backbone": torch.nn.PReLU()})
    overrides = ["TRAIN.LR_SCALES", '{"a": 0.1, "*.bias": 0.5}', "TRAIN.BACKBONE_LR_SCALE", "0.2"]
    optimizer = build_optimizer(load_config("configs/dat_tiny.yaml", overrides), network, 1)
    scale = {id(x): group["lr_scale"] for group in optimizer.param_groups for x in group["params"]}
    scales = {name: round(scale[id(x)], 6) for name, x in network.named_parameters()}
    assert scales == {"a.weight": 0.1, "a.bias": 0.05, "b.weight": 1.0, "b.bias": 0.5, "backbone.weight": 0.2}


def test_scales_of_unknown_parts_and_wrong_factors_are_rejected() -> None:
    config = load_config("configs/dat_tiny.yaml", ["TRAIN.LR_SCALES", "{weigth: 0.1}"])
    with pytest.raises(ValueError, match=r"TRAIN\.LR_SCALES: .* no part named 'weigth'; did you mean weight"):
        build_optimizer(config, torch.nn.Linear(2, 2), 1)
    for factor in ("0", "-1", "true", "much"):
        with pytest.raises(ValueError, match=r"TRAIN\.LR_SCALES must have a factor above 0 for 'weight'"):
            load_config("configs/dat_tiny.yaml", ["TRAIN.LR_SCALES", f"{{weight: {factor}}}"])


def test_published_configs_of_deformable_detr_sample_with_a_tenth_of_the_learning_rate() -> None:
    config = load_config("configs/detection/deformable_detr_dat_tiny_12e.yaml")
    with torch.device("meta"):
        groups = parameter_groups(build_model(config), weight_decay=0.1, scales=config.TRAIN.LR_SCALES)
    assert {round(group["lr_scale"], 6) for group in groups} == {0.1, 1.0}
