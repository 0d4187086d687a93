"""Evaluation from the command line: the precision that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config import load_config
from main import main
from models import build_model
from models.dat import DAT
from tests.runs import write_config


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), torch.float32),
        (("--amp",), torch.bfloat16),
        (("--amp", "bf16"), torch.bfloat16),
        (("--amp", "off"), torch.float32),
        (("--opts", "AMP", "bf16"), torch.float32),  # the precision of training, as in the config.yaml of a run
    ],
)
def test_an_evaluation_has_the_precision_that_its_flag_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    expected: torch.dtype,
) -> None:
    config = write_config(tmp_path)
    weights = build_model(load_config(config, ["MODEL.DAT.num_classes", 10])).state_dict()
    torch.save({"model": weights}, tmp_path / "weights.pth")
    seen, forward = set(), DAT.forward

    def watch(model: DAT, images: torch.Tensor) -> torch.Tensor:
        logits = forward(model, images)
        seen.add(logits.dtype)
        return logits

    monkeypatch.setattr(DAT, "forward", watch)
    assert main(["--cfg", str(config), "--eval", "--resume", str(tmp_path / "weights.pth"), *flags]) == 0
    assert seen == {expected}
    said = capsys.readouterr().out
    assert ("process, in bf16\n" in said) == (expected == torch.bfloat16)
