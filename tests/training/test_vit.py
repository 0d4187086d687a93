"""A Vision Transformer in the trainer: exact resuming, and evaluation with the windows of its epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from main import main
from models.vit import ATTENTIONS
from tests.runs import read_metrics, write_config

pytestmark = pytest.mark.xdist_group("training")

VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "num_features": 8, "span": 1, "drop_rate": 0.1}
WINDOWS = {"locality": "box", "locality_reach": [1, 2], "locality_epochs": [1, 2]}
RELU = {"attention": "performer", "feature_kind": "relu"}


def config_of(folder: Path, options: dict[str, str]) -> str:
    model = {"TYPE": "vit", "NAME": "tiny", "VIT": {**VIT, **WINDOWS, **options}}
    data = {"IMG_SIZE": 16, "BATCH_SIZE": 96, "NUM_WORKERS": 0}
    train = {"EPOCHS": 3, "WARMUP_EPOCHS": 1, "EMA": {"ENABLED": True}}
    return str(write_config(folder, MODEL=model, DATA=data, TRAIN=train, SAVE_FREQ=1))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"attention": name}, id=name, marks=() if name == "performer" else pytest.mark.slow)
        for name in ATTENTIONS
    ]
    + [pytest.param(RELU, id="performer, relu", marks=pytest.mark.slow)],
)
def test_a_resumed_run_ends_bit_for_bit_the_same(
    tmp_path: Path, options: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    command = ["--cfg", config_of(tmp_path, options), "--output", str(tmp_path)]
    assert main([*command, "--tag", "whole"]) == 0
    whole = tmp_path / "tiny" / "whole"
    assert main([*command, "--tag", "resumed", "--resume", str(whole / "epoch_1.pth")]) == 0
    kept = [torch.load(tmp_path / "tiny" / tag / "last.pth", weights_only=True) for tag in ("whole", "resumed")]
    for part in ("model", "ema"):
        torch.testing.assert_close(kept[1][part], kept[0][part], rtol=0, atol=0)
    rows = [read_metrics(tmp_path / "tiny" / tag, "eval") for tag in ("whole", "resumed")]
    assert rows[1][-1]["loss"] == rows[0][-1]["loss"]
    # A checkpoint is evaluated with the window and the features that its epoch had.
    capsys.readouterr()
    assert (
        main([*command, "--eval", "--resume", str(whole / "epoch_1.pth"), "--opts", "TRAIN.EMA.ENABLED", "False"]) == 0
    )
    assert f"Loss {rows[0][0]['loss']:.4f}" in capsys.readouterr().out
