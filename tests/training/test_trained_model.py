"""Loading a network from a checkpoint: its config, classes and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

from config import load_config
from data.images import read_image
from tests.runs import write_config
from tests.tools.samples import CLASSES, write_checkpoint, write_photograph
from tests.training.test_vit import VIT, WINDOWS
from training.build import assemble
from training.trained_model import TrainedModel, load_trained, untrained
from utils import World


def holds(network: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("ema", "asked", "entry"),
    [(False, "", "model"), (True, "", "ema"), (True, "raw", "model"), (True, "ema", "ema"), (False, "raw", "model")],
)
def test_the_weights_are_those_that_the_checkpoint_was_chosen_for(
    tmp_path: Path, ema: bool, asked: str, entry: str
) -> None:
    path = write_checkpoint(tmp_path, ema=ema)
    model = load_trained(path, weights=asked)
    assert holds(model.network, torch.load(path, weights_only=True)[entry])
    assert model.weights == ("ema" if entry == "ema" else "raw")
    assert model.classes == CLASSES
    assert model.config.MODEL.NAME == "tiny"
    assert not model.network.training


def test_missing_averaged_weights_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no averaged weights"):
        load_trained(write_checkpoint(tmp_path), weights="ema")


def test_weights_alone_need_a_config_and_their_head_counts_the_classes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    whole = torch.load(path, weights_only=True)
    bare = tmp_path / "bare.pth"
    head = {"cls_head.weight": torch.zeros(7, 16), "cls_head.bias": torch.zeros(7)}
    torch.save(whole["model"] | head, bare)
    with pytest.raises(ValueError, match=r"bare.pth has no config; .* --cfg"):
        load_trained(bare)
    config = tmp_path / "own.yaml"
    config.write_text(whole["config"], encoding="utf-8")
    model = load_trained(bare, cfg=config)
    assert model.classes == [f"class {label}" for label in range(7)]
    assert model.network(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_a_thousand_classes_without_names_are_those_of_imagenet(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    whole = torch.load(path, weights_only=True)
    whole["model"] |= {"cls_head.weight": torch.zeros(1000, 16), "cls_head.bias": torch.zeros(1000)}
    del whole["classes"]
    torch.save(whole, path)
    names = load_trained(path).classes
    assert len(names) == 1000
    assert "tench" in names[0]


def test_options_added_since_the_checkpoint_have_their_defaults(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    whole = torch.load(path, weights_only=True)
    options = yaml.safe_load(whole["config"])
    del options["TEST"]
    torch.save(whole | {"config": yaml.safe_dump(options)}, path)
    assert load_trained(path).config.TEST.CROP is True


def test_a_network_has_the_window_of_its_last_epoch(tmp_path: Path) -> None:
    config = load_config(
        write_config(tmp_path, MODEL={"TYPE": "vit", "VIT": {**VIT, **WINDOWS}}, DATA={"IMG_SIZE": 16})
    )
    network = untrained(config).network
    for epoch in (1, 2, 3):
        torch.save(
            {"model": network.state_dict(), "config": config.dump(), "epoch": epoch, "update": 0}, tmp_path / "vit.pth"
        )
        attention = load_trained(tmp_path / "vit.pth").network.blocks[0].attn
        assert attention.window == network.window_at(epoch - 1)
    assert network.window_at(0) != network.window_at(1)


def test_untrained_weights_are_those_that_a_run_starts_from(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, SEED=3))
    started = assemble(config, World(0, 1, 0, torch.device("cpu"))).state.network
    assert holds(untrained(config).network, started.state_dict())


def test_the_transform_is_that_of_evaluation(tmp_path: Path) -> None:
    model = load_trained(write_checkpoint(tmp_path))
    image = read_image(write_photograph(tmp_path / "a.png"))
    assert model.transform()(image).shape == (3, 32, 32)
    assert model.transform((48, 64))(image).shape == (3, 48, 64)


def test_a_network_of_timm_has_as_many_classes_as_its_weights(tmp_path: Path) -> None:
    config = tmp_path / "timm.yaml"
    config.write_text("MODEL: {TYPE: timm, TIMM: {NAME: test_vit, ARGS: {img_size: 32}}}\nDATA: {IMG_SIZE: 32}\n")
    network = timm.create_model("test_vit", img_size=32, num_classes=7)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    model = load_trained(tmp_path / "vit.pth", cfg=config)
    assert holds(model.network, network.state_dict())
    assert model.classes == [f"class {label}" for label in range(7)]
    assert model.transform()(Image.new("RGB", (50, 60))).shape == (3, 32, 32)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_transform_of_dense_tasks_is_that_of_their_evaluation(tmp_path: Path, task: str) -> None:
    config = load_config(
        write_config(
            tmp_path,
            TASK=task,
            DATA={"DATASET": "digit_scenes", "IMG_SIZE": 48},
            **({"DETECTION": {"TEST_SHORT_SIDE": 48, "LONG_SIDE": 80}} if task == "detection" else {}),
        )
    )
    image = Image.new("RGB", (60, 40), (200, 30, 90))
    pixels = TrainedModel(nn.Identity(), config, [], "", "").transform()(image)
    assert pixels.shape == (3, 48, 72)
    assert TrainedModel(nn.Identity(), config, [], "", "").transform((32, 32))(image).shape == (3, 32, 32)
