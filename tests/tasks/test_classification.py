"""Class names in checkpoints, and metrics of classification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

import main
from tasks.classification import F1, LabelledImages
from tasks.labelled import class_changes
from tests.data.samples import write_folder
from tests.runs import read_metrics, write_config
from training.report.page import write_report
from training.trained_model import load_trained
from utils import EvaluationFailed


def test_classes_are_known_by_name() -> None:
    assert class_changes({}, ["cat", "dog"]) == class_changes({"classes": ["cat", "dog"]}, ["cat", "dog"]) == []
    assert class_changes({"classes": ["cat", "dog"]}, ["ape", "dog"]) == ["class 0: 'cat' in the checkpoint, 'ape' now"]


SCORES = torch.tensor([[2.0, -1.0, 0.5], [-0.3, 0.7, -2.0], [1.0, 1.0, 1.0]])


class Linear(nn.Module):
    """Returns fixed logits; the images of a batch are row numbers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return SCORES[images.long()]


def test_f1_of_several_labels() -> None:
    targets = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [-1.0, -1.0, -1.0]])
    meter = F1(3, torch.device("cpu"))
    for rows in ([0, 2], [1]):
        meter.add(Linear(), LabelledImages(torch.tensor(rows), targets[rows]))
    found = meter.result()
    assert found.metrics["f1"] == pytest.approx(100 * f1_score(targets[:2], SCORES[:2] > 0, average="micro"))
    expected = nn.functional.binary_cross_entropy_with_logits(SCORES[:2], targets[:2])
    assert found.metrics["loss"] == pytest.approx(expected.item())
    assert found.warnings == ["1 image could not be read and is not counted"]


def test_no_image_that_can_be_read_is_an_error() -> None:
    meter = F1(1, torch.device("cpu"))
    meter.add(Linear(), LabelledImages(torch.tensor([0]), torch.full((1, 3), -1.0)))
    with pytest.raises(EvaluationFailed, match=r"^no validation image of 1 can be evaluated; repair the files"):
        meter.result()


def test_a_run_on_images_of_several_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, {"images": 12})
    names = ("cat", "dog", "cat;dog", "")
    for part, numbers in (("train", range(8)), ("val", range(8, 12))):
        rows = [f"images/{number}.jpg,{names[number % 4]}\n" for number in numbers]
        (tmp_path / f"{part}.csv").write_text("".join(rows))
    data = {"DATASET": "csv", "DATA_PATH": str(tmp_path), "MULTI_LABEL": True, "BATCH_SIZE": 4}
    config = write_config(tmp_path, OUTPUT=str(tmp_path), DATA=data, TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0})
    assert main.main(["--cfg", str(config)]) == 0
    (row,) = read_metrics(tmp_path / "tiny" / "default", "eval")
    assert 0 <= row["f1"] <= 100
    assert row["loss"] > 0
    assert "best F1, in epoch 1" in write_report(tmp_path / "tiny" / "default", torch.device("cpu")).read_text()
    assert main.main(["--cfg", str(config), "--opts", "AUG.MIXUP", "0.8", "TAG", "mixed"]) == 2


def test_evaluation_with_mirror_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_folder(tmp_path, {"train/cat": 6, "train/dog": 6, "val/cat": 4, "val/dog": 4})
    data = {"DATASET": "imagenet", "DATA_PATH": str(tmp_path), "BATCH_SIZE": 4}
    config = write_config(tmp_path, OUTPUT=str(tmp_path), DATA=data, TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0})
    assert main.main(["--cfg", str(config), "--opts", "TEST.FLIP", "True"]) == 0
    run = tmp_path / "tiny" / "default"
    (row,) = read_metrics(run, "eval")
    model = load_trained(run / "last.pth")
    images = torch.stack([model.transform()(model.read(path)) for path in sorted(tmp_path.glob("val/*/*.jpg"))])
    with torch.inference_mode():
        logits = (model.network(images) + model.network(images.flip(3))) / 2
    targets = torch.tensor([0] * 4 + [1] * 4)
    assert row["loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)
    capsys.readouterr()
    assert main.main(["--cfg", str(config), "--eval"]) == 0
    assert f"Loss {row['loss']:.4f}" not in capsys.readouterr().out
