"""The launchers for one machine: class folders, several processes, ports and the published checkpoint layout."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from yacs.config import CfgNode

from config import load_config
from models.build import build_model
from tests.data.samples import write_folder
from tests.launched import run_forked, start_launcher
from tests.runs import ROOT, read_metrics, run_command, write_config

FOLDERS = {"train/cat": 5, "train/dog": 5, "train/owl": 5, "val/cat": 2, "val/dog": 3, "val/owl": 10}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of three classes."""
    return write_folder(tmp_path_factory.mktemp("photographs"), FOLDERS)


@pytest.mark.slow
def test_two_jobs_at_once_on_one_machine(photographs: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, DATA={"DATASET": "imagenet", "BATCH_SIZE": 3}, TRAIN={"EPOCHS": 1})
    output = tmp_path / "output"
    # The second is what train.sh ends with, after a check.
    words = ["--cfg", config, "--tag", "second", "--output", output, "--data-path", photographs]
    second = start_launcher(words, tmp_path / "second.txt")
    first = run_command("bash", "train.sh", 2, config, "first", "--output", output, DATA_PATH=str(photographs))
    assert first.returncode == 0, first.stderr
    second.join(240)
    printed = (tmp_path / "second.txt").read_text(encoding="utf-8")
    assert second.exitcode == 0, printed
    for console in (first.stdout, printed):
        assert "updates of 6 images on 2 x cpu" in console
        assert "Accuracy of the network on the 15 test images" in console
        assert "3 classes as in the data set" in console
    rows = [read_metrics(output / "tiny" / tag, "train") for tag in ("first", "second")]
    assert rows[0] == rows[1]


def test_two_processes_give_a_warning_once(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", {name: 4 for name in FOLDERS if name != "val/owl"})
    config = write_config(tmp_path, DATA={"DATASET": "imagenet", "BATCH_SIZE": 4}, TRAIN={"EPOCHS": 1})
    printed = run_forked("--cfg", config, "--data-path", images, "--output", tmp_path / "output", processes=2)
    assert printed.count("1 of 3 classes without validation images: owl") == 1


def test_a_published_checkpoint_is_evaluated_and_fine_tuned(photographs: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, DATA={"DATASET": "imagenet", "BATCH_SIZE": 4}, TRAIN={"EPOCHS": 1})
    nested = CfgNode({"MODEL": CfgNode({"NAME": "dat_tiny"}), "TAG": "default"})
    for classes in (3, 1000):
        model = build_model(load_config(config, ["MODEL.DAT.num_classes", classes]))
        torch.nn.init.zeros_(model.cls_head.bias).data[1] = 100.0  # each image is a dog
        published = {
            "model": model.state_dict(),
            "optimizer": {},
            "lr_scheduler": {},
            "max_accuracy": 83.9,
            "epoch": 299,
        }
        torch.save({**published, "config": nested}, tmp_path / f"published_{classes}.pth")
    words = ["--cfg", config, "--data-path", photographs, "--output", tmp_path / "output"]
    printed = run_forked(*words, "--eval", "--resume", tmp_path / "published_3.pth")
    assert re.findall(r"^ \* Acc@1 .*", printed, flags=re.MULTILINE) == [" * Acc@1 20.000 Acc@5 100.000"]
    assert "Accuracy of the network on the 15 test images: 20.0%" in printed
    printed = run_forked(*words, "--pretrained", tmp_path / "published_1000.pth")
    assert "newly initialised" in printed
    assert "cls_head.weight, cls_head.bias" in printed


@pytest.mark.parametrize(
    "words", [["train.sh", "1", "--help"], ["evaluate.sh", "-h"], ["train_slurm.sh", "8", "tiny.yaml", "job", "--help"]]
)
def test_launchers_print_help(words: list[str]) -> None:
    done = run_command("bash", *words, PYTHON="echo")
    assert done.returncode == 0, done.stderr
    usage, flags = done.stdout.splitlines()
    assert usage.startswith(f"usage: bash {words[0]} <gpus> <config>")
    assert flags == f"{ROOT}/main.py --help"


@pytest.mark.parametrize("words", [["train.sh", "1", "--amp"], ["evaluate.sh", "1", "tiny.yaml", "--amp"]])
def test_flag_is_not_taken_for_a_file(words: list[str]) -> None:
    done = run_command("bash", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: bash {words[0]} <gpus> <config>")


def test_check_of_several_processes_prints_once() -> None:
    done = run_command("bash", "train.sh", 3, "tiny.yaml", "--check", PYTHON="echo")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ROOT}/main.py --cfg tiny.yaml --check\n"


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    """Return a folder for PATH with an sbatch that writes its arguments into a file there."""
    for name, script in (("sbatch", 'echo "$@" >"$0.txt"'), ("check", 'echo "$LOCAL_WORLD_SIZE $@"; exit $FOUND')):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    return path.parent


@pytest.mark.parametrize(
    ("found", "first", "queued"), [(0, "1", True), (2, "1", False), (1, "1", False), (2, "0", True)]
)
def test_a_job_is_checked_before_it_is_queued(queue: Path, found: int, first: str, queued: bool) -> None:
    env = {"PATH": f"{queue}:{os.environ['PATH']}", "PYTHON": "check", "FOUND": str(found), "CHECK_FIRST": first}
    done = run_command("bash", "train_slurm.sh", 16, "tiny.yaml", "job", "--opts", "SEED", 1, **env)
    assert done.returncode == (0 if queued else found)
    command = f"{ROOT}/main.py --cfg tiny.yaml --tag job --opts SEED 1"
    checked = f"16 {command} --opts DATA.NUM_WORKERS 0 --device cpu --check\n"
    assert done.stdout == (checked if first == "1" else "")
    called = queue / "sbatch.txt"
    assert called.exists() == queued
    assert not queued or called.read_text(encoding="utf-8").endswith(f" check {command} --device cuda\n")


def test_check_of_a_job_needs_neither_its_gpus_nor_its_cores(queue: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, OUTPUT=str(tmp_path / "output"), DATA={"NUM_WORKERS": 10_000}, DEVICE="cuda")
    done = run_command("bash", "train_slurm.sh", 2, config, "job", PATH=f"{queue}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checked: ") == 1
    assert (queue / "sbatch.txt").exists()
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "flags",
    [["--device", "cpu"], ["--device=cuda"], ["--opts", "SEED", 1, "DEVICE", "cuda"], ["--opts", "TAG", "cuda"]],
)
def test_job_does_not_train_on_the_cpu_of_a_node_without_gpus(queue: Path, flags: list[str | int]) -> None:
    env = {"PATH": f"{queue}:{os.environ['PATH']}", "PYTHON": "check", "CHECK_FIRST": "0"}
    done = run_command("bash", "train_slurm.sh", 2, "tiny.yaml", "job", *flags, **env)
    assert done.returncode == 0, done.stderr
    submitted = (queue / "sbatch.txt").read_text(encoding="utf-8")
    added = "--device cuda" if "TAG" in flags else ""
    assert submitted.endswith(f"--tag job {' '.join(map(str, flags))} {added}".rstrip() + "\n")


@pytest.mark.parametrize(
    "flags", [["--device", "cpu"], ["--device=cpu"], ["--opts", "DEVICE", "cpu", "SEED", 1], ["--opts", "TAG", "cpu"]]
)
def test_cpu_job_requests_no_gpus(queue: Path, flags: list[str | int]) -> None:
    env = {"PATH": f"{queue}:{os.environ['PATH']}", "PYTHON": "check", "CHECK_FIRST": "0"}
    done = run_command("bash", "train_slurm.sh", 2, "tiny.yaml", "job", *flags, **env)
    assert done.returncode == 0, done.stderr
    assert ("--gres" in (queue / "sbatch.txt").read_text(encoding="utf-8").split()) == ("TAG" in flags)


@pytest.mark.parametrize(
    ("name", "value"),
    [("GPUS_PER_NODE", "0"), ("GPUS_PER_NODE", "eight"), ("MAX_RESTARTS", "-1"), ("MAX_RESTARTS", "x")],
)
def test_wrong_number_for_a_job_gets_one_line(queue: Path, name: str, value: str) -> None:
    env = {"PATH": f"{queue}:{os.environ['PATH']}", "PYTHON": "check", "CHECK_FIRST": "0", name: value}
    done = run_command("bash", "train_slurm.sh", 2, "tiny.yaml", "job", **env)
    assert done.returncode == 2
    assert re.fullmatch(f"{name} must be a .*whole number, not '{value}'\n", done.stderr)
    assert not (queue / "sbatch.txt").exists()


def test_machine_without_slurm_gets_one_line(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "python3"):
        (tmp_path / name).symlink_to(shutil.which(name))
    folder = ROOT / "output" / "slurm"
    before = folder.exists()
    done = run_command("bash", "train_slurm.sh", 1, "tiny.yaml", "job", PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "train_slurm.sh: there is no sbatch here; run it where SLURM is, or use train.sh\n"
    assert folder.exists() == before
