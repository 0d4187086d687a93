"""Every config of the repository builds, and trains all of its parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

from config import default_config, load_config
from models import build_model
from tests.models.small import without_gradient

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml") if path.parent.name != "_base")


def narrow(config: CfgNode) -> CfgNode:
    """Make the widths of a config as small as its heads allow."""
    dat = config.MODEL.DAT
    dat.dims = [4 * heads for heads in dat.heads]
    dat.dim_stem = dat.dims[0]
    return config


@pytest.mark.parametrize("file", FILES)
def test_every_config_trains_every_parameter(file: str) -> None:
    config = narrow(load_config(CONFIGS / file))
    torch.manual_seed(0)
    model = build_model(config)
    logits = model(torch.randn(1, 3, 64, 64))
    logits.square().sum().backward()
    assert logits.shape == (1, config.MODEL.DAT.num_classes)
    assert without_gradient(model) == []


def test_checkpointing_comes_from_the_training_section() -> None:
    for use_checkpoint in (False, True):
        config = load_config(CONFIGS / "digits.yaml", ["TRAIN.USE_CHECKPOINT", str(use_checkpoint)])
        assert {stage.use_checkpoint for stage in build_model(config).stages} == {use_checkpoint}


def test_unknown_type_is_refused() -> None:
    config = default_config()
    config.MODEL.TYPE = "dit"
    with pytest.raises(ValueError, match=r"MODEL\.TYPE = 'dit' is unknown; choose one of dat"):
        build_model(config)
