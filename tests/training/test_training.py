"""One complete training run in a separate process, and its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from timm.models import load_state_dict

from config import load_config
from tests.launched import run_forked
from tests.runs import read_metrics, run_command, write_config

pytestmark = pytest.mark.xdist_group("training")  # which share one run

RESULT = re.compile(r" \* Acc@1 (?P<top1>[\d.]+) Acc@5 (?P<top5>[\d.]+)\n \* Loss (?P<loss>[\d.]+)\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Return the config, the output folder and the console of a run of two epochs with averaged weights."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder)
    done = run_command("bash", "train.sh", 1, config, "first", "--output", folder / "output", "--ema")
    assert done.returncode == 0, done.stderr
    return config, folder / "output" / "tiny" / "first", done.stdout


def test_a_run_learns_and_leaves_its_files(trained: tuple[Path, Path, str]) -> None:
    _, folder, console = trained
    for name in ("last.pth", "best.pth", "config.yaml", "metrics.jsonl", "log.txt", "curves.png"):
        assert (folder / name).stat().st_size > 0, name
    losses = [row["loss"] for row in read_metrics(folder, "train")]
    assert losses[-1] < 0.8 * losses[0]
    evaluated = read_metrics(folder, "eval")
    assert [row["epoch"] for row in evaluated] == [1, 2]
    assert evaluated[-1]["top1"] > 30
    assert [row["epoch"] for row in read_metrics(folder, "eval_ema")] == [1, 2]
    assert all(0 < row["grad_norm"] < 1000 for row in read_metrics(folder, "train"))
    for words in ("Max accuracy: ", "of the network on the 360 test images: ", "images/s", "grad norm", "left"):
        assert words in console
    assert str(folder) in console.splitlines()[-1]
    assert "best accuracy" in console.splitlines()[-1]
    assert console.splitlines()[0] in (folder / "log.txt").read_text(encoding="utf-8")


def test_written_config_reproduces_the_run(trained: tuple[Path, Path, str]) -> None:
    config, folder, _ = trained
    expected = load_config(config, ["TAG", "first", "OUTPUT", str(folder.parents[1]), "TRAIN.EMA.ENABLED", True])
    assert load_config(folder / "config.yaml") == expected
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    assert checkpoint["config"] == (folder / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(checkpoint["config"])["MODEL"]["NAME"] == "tiny"
    assert checkpoint["epoch"] == 2


def test_timm_finds_both_sets_of_weights_and_the_file_holds_them_once(trained: tuple[Path, Path, str]) -> None:
    path = trained[1] / "best.pth"
    checkpoint = torch.load(path, weights_only=True)
    for use_ema, entry in ((True, "ema"), (False, "model")):
        weights = load_state_dict(str(path), use_ema=use_ema)
        assert all(torch.equal(value, checkpoint[entry][name]) for name, value in weights.items())
    assert not torch.equal(checkpoint["ema"]["cls_head.weight"], checkpoint["model"]["cls_head.weight"])
    assert all(value is checkpoint["model_ema"][name] for name, value in checkpoint["ema"].items())


def test_evaluation_reproduces_the_accuracy_of_training(trained: tuple[Path, Path, str]) -> None:
    config, folder, _ = trained
    best = max(read_metrics(folder, "eval_ema"), key=lambda row: row["top1"])  # best.pth was chosen for its average
    in_training = (f"{best['top1']:.3f}", f"{best['top5']:.3f}", f"{best['loss']:.4f}")
    done = run_command("bash", "evaluate.sh", 1, config, folder / "best.pth")
    assert done.returncode == 0, done.stderr
    in_three = run_forked("--cfg", config, "--eval", "--resume", folder / "best.pth", processes=3)
    for printed in (done.stdout, in_three):
        assert RESULT.findall(printed) == [in_training]
        assert f"Accuracy of the network on the 360 test images: {float(in_training[0]):.1f}%" in printed


def test_averaged_weights_are_evaluated_on_request(trained: tuple[Path, Path, str]) -> None:
    config, folder, _ = trained
    printed = run_forked("--cfg", config, "--eval", "--resume", folder / "last.pth", "--ema")
    row = read_metrics(folder, "eval_ema")[-1]
    assert f" * Acc@1 {row['top1']:.3f} Acc@5 {row['top5']:.3f}" in printed


def test_a_finished_run_is_not_trained_again(trained: tuple[Path, Path, str]) -> None:
    config, folder, console = trained
    before = (folder / "last.pth").read_bytes()
    printed = run_forked("--cfg", config, "--tag", "first", "--output", folder.parents[1], "--ema")
    assert printed.splitlines()[-1] == console.splitlines()[-1]
    assert (folder / "last.pth").read_bytes() == before


def test_throughput_needs_no_data(trained: tuple[Path, Path, str]) -> None:
    printed = run_forked("--cfg", trained[0], "--throughput", "--batch-size", 2)
    assert float(re.search(r"([\d.]+) images/s", printed)[1]) > 0


def test_throughput_of_several_processes_is_printed_once(trained: tuple[Path, Path, str]) -> None:
    printed = run_forked("--cfg", trained[0], "--throughput", "--batch-size", 2, processes=2)
    assert printed.count("images/s") == 1
    assert printed.rstrip().endswith("on cpu, 2 processes")
