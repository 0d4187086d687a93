"""The launchers for one machine: folders as data, processes, ports and the published checkpoint layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

from config import load_config
from models import build_model
from tests.data.samples import write_folder
from tests.launched import run_forked, start_launcher
from tests.runs import read_metrics, run_command, write_config

FOLDERS = {f"{split}/{name}": 5 for split in ("train", "val") for name in ("cat", "dog", "owl")}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of three classes."""
    return write_folder(tmp_path_factory.mktemp("photographs"), FOLDERS)


def test_two_jobs_at_once_on_one_machine(photographs: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, DATA={"DATASET": "imagenet", "BATCH_SIZE": 3}, TRAIN={"EPOCHS": 1})
    output = tmp_path / "output"
    # The second is what train.sh ends with, after a check.
    words = ["--cfg", config, "--tag", "second", "--output", output, "--data-path", photographs]
    second = start_launcher(words, tmp_path / "second.txt")
    first = run_command("bash", "train.sh", 2, config, "first", "--output", output, DATA_PATH=str(photographs))
    assert first.returncode == 0, first.stderr
    second.join(240)
    said = (tmp_path / "second.txt").read_text(encoding="utf-8")
    assert second.exitcode == 0, said
    for console in (first.stdout, said):
        assert "updates of 6 images on 2 x cpu" in console
        assert "Accuracy of the network on the 15 test images" in console
        assert "3 classes as in the data set" in console
    rows = [read_metrics(output / "tiny" / tag, "train") for tag in ("first", "second")]
    assert rows[0] == rows[1]


def test_a_published_checkpoint_is_evaluated_and_fine_tuned(photographs: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, DATA={"DATASET": "imagenet", "BATCH_SIZE": 4}, TRAIN={"EPOCHS": 1})
    nested = CfgNode({"MODEL": CfgNode({"NAME": "dat_tiny"}), "TAG": "default"})
    for classes in (3, 1000):
        model = build_model(load_config(config, ["MODEL.DAT.num_classes", classes]))
        published = {
            "model": model.state_dict(),
            "optimizer": {},
            "lr_scheduler": {},
            "max_accuracy": 83.9,
            "epoch": 299,
        }
        torch.save({**published, "config": nested}, tmp_path / f"published_{classes}.pth")
    words = ["--cfg", config, "--data-path", photographs, "--output", tmp_path / "output"]
    said = run_forked(*words, "--eval", "--resume", tmp_path / "published_3.pth")
    accuracies = re.findall(r"^ \* Acc@1 [\d.]+ Acc@5 100\.000$", said, flags=re.MULTILINE)
    assert len(accuracies) == 1
    assert "Accuracy of the network on the 15 test images" in said
    said = run_forked(*words, "--pretrained", tmp_path / "published_1000.pth")
    assert "newly initialised" in said
    assert "cls_head.weight, cls_head.bias" in said
