"""The output of --check: warnings of the run, its schedule, and the size of its checkpoints."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from main import main
from tests.data.samples import write_folder
from tests.runs import write_config
from training.build import assemble
from training.command_line import parse
from training.preview import checkpoint_bytes, checkpoint_files, draw_schedule
from utils import World

CPU = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def doubtful(folder: Path) -> list[str]:
    """Return the flags of a run on images of which one class is not held out."""
    images = write_folder(folder / "images", {"train/blue": 5, "train/red": 4, "val/blue": 1})
    config = write_config(folder, OUTPUT=str(folder / "output"), DATA={"DATASET": "imagenet", "DATA_PATH": str(images)})
    return ["--cfg", str(config), "--batch-size", "6", "--warmup-epochs", "2"]


def test_check_reports_the_warnings_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = doubtful(tmp_path)
    warnings = assemble(parse(flags)[1], CPU).warnings
    assert len(warnings) == 3
    assert main([*flags, "--check"]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(warning) == 1 for warning in warnings)
    assert "9 training and 1 validation image, 2 epochs of 1 update of 6 images on 1 x cpu" in printed
    assert re.search(r"learning rate: \S+e-\d+ [▁▂▃▄▅▆▇█]{2,} \S+e-\d+, highest", printed)
    assert re.search(r"a checkpoint takes [\d.]+ MiB; the run keeps at most 4 \([\d.]+ MiB\)", printed)
    assert printed.splitlines()[-1] == "checked: tiny, 2 classes"
    assert not (tmp_path / "output").exists()


def test_check_fills_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("data.build.CachedSource")
    flags = [*doubtful(tmp_path), "--opts", "DATA.CACHE", "True"]
    assert main([*flags, "--check"]) == 0
    with pytest.raises(NameError, match="CachedSource"):
        assemble(parse(flags)[1], CPU)


def test_one_of_several_processes_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = doubtful(tmp_path)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main([*flags, "--batch-size", "4", "--check"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert main([*flags, "--batch-size", "4", "--check"]) == 0
    assert "2 epochs of 1 update of 8 images on 2 x cpu" in capsys.readouterr().out


def test_disk_that_is_too_small_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = doubtful(tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(2**18 if "output" in str(path) or path == tmp_path else 2**40)
    )
    assert main([*flags, "--check"]) == 0
    assert re.search(r"at most 4 \([\d.]+ MiB\), but \S+/output/tiny/default has 0.2 MiB free", capsys.readouterr().out)


def test_the_size_of_a_checkpoint_is_that_of_its_file(tmp_path: Path) -> None:
    state = assemble(parse([*doubtful(tmp_path), "--ema"])[1], CPU).state
    expected = checkpoint_bytes(state)
    torch.save(state.to_dict(), tmp_path / "last.pth")
    assert expected == pytest.approx((tmp_path / "last.pth").stat().st_size, rel=0.5)  # of small tensors, names weigh
    weights = sum(weight.numel() for weight in state.network.parameters())
    assert 4 * 4 * weights <= expected < 4.4 * 4 * weights  # weights, average, and two moments in float32


@pytest.mark.parametrize(
    ("epochs", "every", "keep", "files"), [(20, 10, 3, 6), (20, 1, 3, 7), (20, 1, 0, 24), (20, 0, 3, 4)]
)
def test_the_number_of_checkpoints(tmp_path: Path, epochs: int, every: int, keep: int, files: int) -> None:
    options = ["TRAIN.EPOCHS", str(epochs), "SAVE_FREQ", str(every), "KEEP_CHECKPOINTS", str(keep)]
    assert checkpoint_files(parse(["--cfg", str(write_config(tmp_path)), "--opts", *options])[1]) == files


def test_a_schedule_is_drawn_in_its_proportions() -> None:
    rates = [(0.0, 0.0), (1.0, 0.8), (2.0, 0.4), (3.0, 0.0)]
    assert draw_schedule(rates) == "learning rate: 0.00e+00 ▁█▅▁ 0.00e+00, highest 8.00e-01 at epoch 1"
