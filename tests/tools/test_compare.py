"""The comparison: its variants, continuing after an interruption, and its table and figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config import load_config
from models.build import build_model
from tests.runs import call
from tools import compare
from tools.complexity import count_macs

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ["digits", "cifar10", "cifar10_small", "cifar100"]
TINY = ["MODEL.VIT.depth", "1", "MODEL.VIT.embed_dim", "16", "MODEL.VIT.num_heads", "2", "TRAIN.EPOCHS", "4"]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_build_and_are_of_about_the_same_cost(name: str) -> None:
    path = str(ROOT / f"configs/compare/{name}.yaml")
    macs = {}
    for variant in ("softmax", "deformable_local", "dat"):
        config = load_config(path, compare.ATTENTION_OPTIONS[variant])
        macs[variant] = count_macs(build_model(config), (config.DATA.IMG_SIZE,) * 2)
    assert macs["dat"] == pytest.approx(macs["softmax"], rel=0.25)


def test_variants_are_all_attentions_with_and_without_windows() -> None:
    path = str(ROOT / "configs/compare/digits.yaml")
    seen = set()
    for options in compare.ATTENTION_OPTIONS.values():
        config = load_config(path, options)
        seen.add((config.MODEL.TYPE, config.MODEL.VIT.attention, config.MODEL.VIT.locality))
    assert len(seen) == len(compare.ATTENTION_OPTIONS) == 11


def write_run(folder: Path, top1: list[float]) -> None:
    folder.mkdir(parents=True)
    rows = [{"kind": "train", "epoch": 1, "loss": 2.0}]
    rows += [{"kind": "eval", "epoch": epoch, "top1": value} for epoch, value in enumerate(top1, 1)]
    rows.append(rows[-1])  # evaluated once more after an interruption
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_table_and_figure(tmp_path: Path) -> None:
    costs = {"softmax": compare.Cost(1_500_000, 25_000_000, 123.4), "softmax_local": compare.Cost(1, 2, 3.0)}
    write_run(tmp_path / "softmax_seed0", [50.0, 90.0])
    write_run(tmp_path / "softmax_seed1", [40.0, 80.0])
    write_run(tmp_path / "softmax_local_seed0", [60.0])
    runs = {name: [tmp_path / f"{name}_seed{seed}" for seed in (0, 1)] for name in costs}
    compare.write(tmp_path, costs, runs)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[2] == "| softmax | 1.50 M | 25.0 M | 123 | 85.00 | 80.00 to 90.00 | 2 |"
    assert lines[3].endswith("| 60.00 | 60.00 to 60.00 | 1 |")
    assert (tmp_path / "comparison.png").stat().st_size > 5000


def test_finished_runs_are_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []

    def train(command: list[str]) -> object:
        tag = command[command.index("--tag") + 1]
        started.append(tag)
        if tag.startswith("dat"):
            return type("Done", (), {"returncode": 75})
        write_run(tmp_path / "compare_digits" / tag, [1.0, 2.0, 3.0, 4.0])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(compare.subprocess, "run", train)
    write_run(tmp_path / "compare_digits" / "performer_seed7", [1.0, 2.0, 3.0, 9.0])
    arguments = [str(ROOT / "configs/compare/digits.yaml"), "--variants", "softmax", "performer", "dat"]
    arguments += ["--seeds", "7", "--opts", "OUTPUT", str(tmp_path), *TINY]
    ended, out, _ = call(compare.main, *arguments)
    assert ended == 75
    assert started == ["softmax_seed7", "dat_seed7"]
    assert "dat_seed7 ended with status 75; the same command continues" in out
    for status, advice in (
        (1, "repeating the command does not help"),
        (2, "correct the options, or choose another OUT"),
    ):
        monkeypatch.setattr(compare, "_train", lambda _, status=status: status)
        ended, out, _ = call(compare.main, *arguments)
        assert ended == status
        assert f"dat_seed7 ended with status {status}; {advice}" in out
    assert len((tmp_path / "compare_digits" / "comparison.md").read_text().splitlines()) == 4


def test_several_configs_are_trained_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []

    def train(command: list[str]) -> object:
        config = load_config(command[command.index("--cfg") + 1])
        tag = command[command.index("--tag") + 1]
        started.append((config.MODEL.NAME, tag))
        write_run(tmp_path / config.MODEL.NAME / tag, [1.0, 2.0])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(compare.subprocess, "run", train)
    monkeypatch.setattr(compare, "measure", lambda _: compare.Cost(1, 2, 3.0))
    paths = [str(ROOT / f"configs/cifar10/{name}.yaml") for name in ("dat_small", "ablations/one_group", "resnet")]
    arguments = [*paths, "--variants", "dat_small", "one_group", "--opts", "OUTPUT", str(tmp_path), "TRAIN.EPOCHS", "2"]
    assert call(compare.main, *arguments)[0] == 0
    assert started == [
        ("cifar10_dat_small", "dat_small_seed0"),
        ("cifar10_ablations_one_group", "one_group_seed0"),
    ]
    rows = (tmp_path / "comparison.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| dat_small", "| one_group"]


def test_wrong_variants_are_named() -> None:
    one, other = (str(ROOT / f"configs/{folder}/resnet.yaml") for folder in ("cifar10", "cifar100"))
    for arguments, said in (
        ([one, other], "same file name"),
        ([one, "--variants", "vit"], "choose from resnet"),
        ([one, str(ROOT / "configs/detection/digits_retinanet.yaml")], "digits_retinanet.yaml is not compared: only"),
        ([one, "--opts", "DATA.MULTI_LABEL", "True"], "resnet.yaml is not compared: only classifiers of one label"),
    ):
        status, _, err = call(compare.main, *arguments)
        assert status == 2
        assert said in err
