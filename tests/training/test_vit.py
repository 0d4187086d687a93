"""A Vision Transformer in the trainer: exact resuming, and evaluation with the windows of its epoch."""

from __future__ import annotations

from pathlib import Path

import pytest

from main import main
from models.vit import ATTENTIONS
from tests.launched import resumed_equals_whole
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
    whole = resumed_equals_whole(command, tmp_path)
    (first, *_) = read_metrics(whole, "eval")
    # A checkpoint is evaluated with the window and the features that its epoch had.
    capsys.readouterr()
    assert (
        main([*command, "--eval", "--resume", str(whole / "epoch_1.pth"), "--opts", "TRAIN.EMA.ENABLED", "False"]) == 0
    )
    assert f"Loss {first['loss']:.4f}" in capsys.readouterr().out
