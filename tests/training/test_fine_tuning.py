"""The options of fine-tuning: their effects and exact resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from config import load_config
from main import main
from optimizer import keep_frozen_in_eval
from tasks import build_task
from tasks.classification import Classification, LabelledImages, balancing_weights
from tests.data.samples import write_folder
from tests.launched import resumed_equals_whole
from tests.runs import read_metrics, write_config
from tests.tools.samples import write_checkpoint
from utils import World

pytestmark = pytest.mark.xdist_group("training")

PHOTOS = {"train/cat": 17, "train/dog": 6, "train/emu": 2, "val/cat": 3, "val/dog": 2, "val/emu": 1}


def write(folder: Path, **sections: Any) -> list[str]:
    """Write photographs of uneven classes and a config of three epochs, and return the command line."""
    write_folder(folder, PHOTOS)
    data = {"DATASET": "imagenet", "DATA_PATH": str(folder), "BATCH_SIZE": 8, **sections.pop("DATA", {})}
    train = {"EPOCHS": 3, "WARMUP_EPOCHS": 0, **sections.pop("TRAIN", {})}
    config = write_config(folder, DATA=data, TRAIN=train, SAVE_FREQ=1, PRINT_FREQ=1, **sections)
    return ["--cfg", str(config), "--output", str(folder)]


def teacher_of(folder: Path, kind: str) -> dict[str, Any]:
    """Write a teacher of three classes and return the options that name it."""
    if kind == "own":
        return {"TEACHER": str(write_checkpoint(folder, classes=["cat", "dog", "emu"], num_classes=3))}
    torch.manual_seed(2)
    save_for_hf(timm.create_model("resnet10t", num_classes=3), folder / "published", model_config={"num_classes": 3})
    return {"TIMM": f"local-dir:{folder / 'published'}", "KIND": "hard"}


OPTIONS = {
    "mixup ends": {"AUG": {"MIXUP": 0.8, "CUTMIX": 1.0, "MIXUP_OFF_EPOCHS": 2}},
    "weights in the loss": {"DATA": {"BALANCE": "loss"}},
    "balanced sampling": {"DATA": {"BALANCE": "sampling"}},
    "teacher of ours": {"DISTILL": "own"},
    "teacher of timm": {"DISTILL": "timm", "AUG": {"MIXUP": 0.8}},
    "sgd without momentum, which keeps no state": {"TRAIN": {"OPTIMIZER": {"NAME": "sgd", "MOMENTUM": 0.0}}},
    **{name: {"TRAIN": {"OPTIMIZER": {"NAME": name}}} for name in ("adafactor", "lamb", "lion", "muon")},
}


@pytest.mark.parametrize("sections", OPTIONS.values(), ids=OPTIONS)
def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path: Path, sections: dict[str, Any]) -> None:
    sections = dict(sections)
    if "DISTILL" in sections:
        sections["DISTILL"] = teacher_of(tmp_path, sections["DISTILL"])
    command = write(tmp_path, **sections)
    rows = read_metrics(resumed_equals_whole(command, tmp_path), "train")
    if "DISTILL" in sections:
        assert all(row["loss"] == pytest.approx(row["label_loss"] + row["teacher_loss"]) for row in rows)
        assert min(row["teacher_loss"] for row in rows) > 0


def test_mixup_is_off_in_the_last_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[float] = []
    prepare = Classification.prepare

    def note(*args: Any) -> Any:
        batch = prepare(*args)
        largest.append(batch.targets.max(1).values.min().item())
        return batch

    monkeypatch.setattr(Classification, "prepare", note)
    aug = {"MIXUP": 100.0, "MIXUP_OFF_EPOCHS": 2}  # halves, about
    assert main(write(tmp_path, AUG=aug)) == 0
    updates = len(largest) // 3
    assert max(largest[:updates]) < 0.9
    assert min(largest[updates:]) > 0.9  # smoothed labels


def test_a_run_without_progress_ends_and_stays_ended(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = write(tmp_path, TRAIN={"EPOCHS": 9, "PATIENCE": 2, "BASE_LR": 0.0, "MIN_LR": 0.0})
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "no better accuracy for 2 epochs (TRAIN.PATIENCE): the run ends after epoch 3 of 9" in printed
    folder = tmp_path / "tiny" / "default"
    assert [row["epoch"] for row in read_metrics(folder, "eval")] == [1, 2, 3]
    before = (folder / "last.pth").read_bytes()
    assert main(command) == 0
    assert (folder / "last.pth").read_bytes() == before


def test_longer_run_continues_the_schedule_of_its_length(tmp_path: Path) -> None:
    command = write(tmp_path, TRAIN={"EPOCHS": 2})
    assert main(command) == 0
    assert main([*command, "--epochs", "3"]) == 2
    assert main([*command, "--epochs", "3", "--allow-config-change"]) == 0
    assert main([*command, "--epochs", "3", "--tag", "planned"]) == 0
    last = [read_metrics(tmp_path / "tiny" / tag, "train")[-1] for tag in ("default", "planned")]
    assert last[0]["epoch"] == 3
    assert last[0]["lr"] == last[1]["lr"]


def test_weights_of_classes() -> None:
    weights = balancing_weights([17, 6, 2, 0])
    torch.testing.assert_close(weights[:3] * torch.tensor([17.0, 6, 2]), torch.full((3,), 25 / 3))
    assert weights[3] == 0


def test_the_balanced_loss_of_a_batch_is_the_mean_over_its_parts(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/cat": 9, "train/dog": 3, "val/cat": 1, "val/dog": 1})
    data = {"DATASET": "imagenet", "DATA_PATH": str(tmp_path), "BALANCE": "loss"}
    config = load_config(write_config(tmp_path, DATA=data, AUG={"MIXUP": 0.0, "CUTMIX": 0.0}))
    task = build_task(config, World(0, 1, 0, torch.device("cpu")), training=True)
    images, targets = torch.randn(4, 2), torch.tensor([0, 0, 0, 1])
    whole, *parts = (
        task.loss(nn.Identity(), LabelledImages(images[part], targets[part]))
        for part in (slice(None), slice(0, 2), slice(2, 4))
    )
    torch.testing.assert_close(whole, sum(parts) / 2)


def test_frozen_norms_and_dropout_stay_in_evaluation_mode() -> None:
    network = timm.create_model("resnet10t", num_classes=3, drop_rate=0.5)
    for parameter in network.layer1.parameters():
        parameter.requires_grad_(False)
    keep_frozen_in_eval(network.train())
    before = {name: value.clone() for name, value in network.state_dict().items() if "running" in name}
    network(torch.randn(4, 3, 64, 64))
    changed = {
        name.split(".")[0]
        for name, value in network.state_dict().items()
        if "running" in name and not torch.equal(value, before[name])
    }
    assert "layer1" not in changed
    assert {"layer2", "layer3", "layer4"} <= changed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["DISTILL.TEACHER", "best.pth"], "the teacher best.pth has 10 classes, but the data set has 3; train it on"),
        (["DISTILL.TEACHER", "three.pth"], "has class 1 as 'cow', but the data set has 'dog'"),
        (["DISTILL.TIMM", "resnet10"], "DISTILL.TIMM: timm cannot load a pretrained 'resnet10': "),
        (["DISTILL.TIMM", "resnet10t", "DISTILL.TEACHER", "best.pth"], "both name a teacher; remove one of them"),
    ],
)
def test_wrong_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path, classes=["cat", "cow", "emu"], num_classes=3).rename("three.pth")
    write_checkpoint(tmp_path)
    assert main([*write(tmp_path), "--opts", *options]) == 2
    assert says in capsys.readouterr().err
