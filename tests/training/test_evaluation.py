"""Evaluation from the command line: the precision that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from config import load_config
from main import main
from models import build_model
from models.build import set_num_classes
from models.dat import DAT
from tasks.classes import labels_of
from tasks.classification import LabelledImages
from tests.data.samples import write_folder
from tests.runs import write_config
from tests.tools.samples import tiny_config, write_checkpoint
from training.evaluation import CheckpointEvaluation, build_evaluation
from training.resume import start_from_pretrained
from utils import World

CPU = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


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


@pytest.mark.parametrize(
    ("folders", "known", "labels"),
    [
        (["dog", "emu"], True, [3, 4]),  # by name
        (["0", "3", "7"], False, [0, 3, 7]),  # numbers of labels
        ([str(label) for label in range(10)], False, list(range(10))),
    ],
)
@pytest.mark.parametrize("space", ["all", "present"])
def test_weights_are_evaluated_on_some_of_their_classes(
    tmp_path: Path, folders: list[str], known: bool, labels: list[int], space: str
) -> None:
    path = write_checkpoint(tmp_path, **({} if known else {"classes": None}))
    images = write_folder(tmp_path / "images", {f"val/{name}": 1 for name in folders})
    config = tiny_config(tmp_path)
    config.DATA.DATASET, config.DATA.DATA_PATH, config.MODEL.RESUME = "imagenet", str(images), str(path)
    config.TEST.CLASSES = space
    evaluation = build_evaluation(config, CPU)
    batch = next(iter(evaluation.loader))
    assert batch.targets.tolist() == labels
    meter = evaluation.task.meter(len(labels), CPU.device)
    logits = torch.arange(10.0).expand(len(labels), 10)  # the last class is the most probable
    meter.add(nn.Identity(), LabelledImages(logits, batch.targets))
    right = space == "present" or 9 in labels
    assert meter.result().metrics["top1"] == pytest.approx(100 * right / len(labels))


def test_a_class_map_labels_the_images_to_evaluate(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", {"val/x": 1, "val/y": 1})
    config = tiny_config(tmp_path)
    config.DATA.DATASET, config.DATA.DATA_PATH = "imagenet", str(images)
    config.MODEL.RESUME, config.MODEL.CLASS_MAP = str(write_checkpoint(tmp_path)), str(tmp_path / "map.txt")
    Path(config.MODEL.CLASS_MAP).write_text("9\n2\n")
    evaluation = build_evaluation(config, CPU)
    assert next(iter(evaluation.loader)).targets.tolist() == [9, 2]
    assert "2 classes are found by" in evaluation.notes[0]
    set_num_classes(config, 10)
    Path(config.MODEL.CLASS_MAP).write_text("9\n-1\n")
    with pytest.raises(ValueError, match=r"map\.txt has no class of the weights for y; leave its images out"):
        build_evaluation(config, CPU)


def test_folders_of_wordnet_ids_are_classes_of_imagenet() -> None:
    assert labels_of(["n01443537", "n01440764"], None, 1000, "") == ([1, 0], "by WordNet id")
    assert labels_of(["cat"], None, 1000, "") == ([], "by WordNet id")
    assert labels_of(["cat"], ["dog"], 1, "")[0] == []
