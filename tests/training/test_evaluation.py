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
from tests.tools.samples import tiny_config, write_checkpoint
from training.evaluation import CheckpointEvaluation
from training.resume import start_from_pretrained


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


@pytest.mark.parametrize(
    ("flags", "entry"),
    [
        ((), "ema"),
        (("--weights", "raw"), "model"),
        (("--weights", "ema"), "ema"),
        (("--ema",), "ema"),
        (("--opts", "TRAIN.EMA.ENABLED", "False"), "model"),
    ],
)
def test_the_weights_are_those_that_the_checkpoint_was_chosen_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    entry: str,
) -> None:
    path = write_checkpoint(tmp_path, ema=True)
    config = tmp_path / "own.yaml"
    config.write_text(torch.load(path)["config"], encoding="utf-8")
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(CheckpointEvaluation, "run", lambda self: (seen.append(self.network.cls_head.weight), 0)[1])
    assert main(["--cfg", str(config), "--eval", "--resume", str(path), *flags]) == 0
    assert torch.equal(seen[0], torch.load(path)[entry]["cls_head.weight"])
    monkeypatch.undo()
    assert main(["--cfg", str(config), "--eval", "--resume", str(path), *flags]) == 0
    words = {"ema": "averaged weights", "model": "raw weights"}[entry]
    assert f"evaluating {path}, {words}, on 360 images" in capsys.readouterr().out


@pytest.mark.parametrize(("weights", "entry"), [("", "ema"), ("raw", "model"), ("ema", "ema")])
def test_fine_tuning_starts_from_the_weights_that_the_checkpoint_was_chosen_for(
    tmp_path: Path, weights: str, entry: str
) -> None:
    path = write_checkpoint(tmp_path, ema=True)
    config = tiny_config(tmp_path)
    config.MODEL.PRETRAINED, config.MODEL.WEIGHTS = str(path), weights
    network = build_model(config)
    said = start_from_pretrained(config, network)
    assert torch.equal(network.cls_head.weight, torch.load(path)[entry]["cls_head.weight"])
    assert said[0] == f"starting from {path}, {'averaged' if entry == 'ema' else 'raw'} weights"


def test_weights_of_a_backbone_are_fine_tuned_with_a_new_classifier(tmp_path: Path) -> None:
    state = torch.load(write_checkpoint(tmp_path))["model"]
    backbone = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("cls_head.")}
    config = tiny_config(tmp_path)
    config.MODEL.PRETRAINED = str(tmp_path / "backbone.pth")
    torch.save({"state_dict": backbone}, config.MODEL.PRETRAINED)
    network = build_model(config)
    head = network.cls_head.weight.clone()
    said = "\n".join(start_from_pretrained(config, network))
    assert "newly initialised (the weights have no classifier): cls_head.weight, cls_head.bias" in said
    assert torch.equal(network.cls_norm.norm.weight, state["cls_norm.norm.weight"])
    assert torch.equal(network.cls_head.weight, head)
