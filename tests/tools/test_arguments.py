"""Arguments that several tools take."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch

from benchmarks import launches, model
from tests.runs import call
from tools import check_data, compare, complexity, predict, report, visualize
from tools.arguments import add_network, check_least, device_of, free_name
from utils import DeviceLost


@pytest.mark.parametrize("required", [False, True])
def test_a_network_is_named_by_checkpoint_config_and_weights(
    required: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_network(parser, required=required)
    args = parser.parse_args(["--checkpoint", "best.pth", "--cfg", "tiny.yaml", "--weights", "raw"])
    assert vars(args) == {"checkpoint": "best.pth", "cfg": "tiny.yaml", "weights": "raw"}
    assert ("random weights" in parser.format_help()) is not required
    if not required:
        assert vars(parser.parse_args([])) == {"checkpoint": None, "cfg": None, "weights": ""}
        return
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([])
    assert "required: --checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("program", [check_data, compare, complexity, visualize, launches, model])
def test_options_may_be_given_several_times(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("tiny.yaml",) if program in (compare, complexity) else ()
    parsed: list[argparse.Namespace] = []
    accept = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: object) -> NoReturn:
        parsed.append(accept(parser, *given))
        raise ParserBuilt(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for _ in range(2):  # the second one starts from no options again
        with pytest.raises(ParserBuilt):
            call(program.main, *words, "--opts", "SEED", "1", "--opts", "TAG", "a")
        assert parsed.pop().opts == ["SEED", "1", "TAG", "a"]


@pytest.mark.parametrize(("name", "says"), [("cuda", "PyTorch sees no CUDA device"), ("mps", "needs an Apple GPU")])
def test_a_device_that_is_missing_is_reported_before_anything_is_read(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    for program, words in ((predict, ("--checkpoint", "gone.pth", tmp_path)), (report, (tmp_path,))):
        status, _, err = call(program.main, *words, "--device", name)
        assert status == 2
        assert f"--device {name}: {says}" in err
        assert err.count("\n") == 1


def test_a_device_that_slurm_gave_and_that_does_not_work_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> NoReturn:
        raise DeviceLost("SLURM gave this job 1 of its GPUs")

    monkeypatch.setattr("tools.arguments.pick_device", lose)
    with pytest.raises(ValueError, match="SLURM gave this job 1"):
        device_of(argparse.Namespace(device="cuda"))


def test_numbers_are_at_least_the_smallest_that_makes_sense() -> None:
    args = argparse.Namespace(batch_size=0, top=None)
    check_least(args, 0, "--batch-size", "--top")
    with pytest.raises(ValueError, match="--batch-size must be at least 1, not 0"):
        check_least(args, 1, "--top", "--batch-size")


class ParserBuilt(Exception):
    """A tool is about to parse its command line."""


@pytest.mark.parametrize(
    "tool",
    ["check_data", "compare", "complexity", "export", "make_shards", "plot", "predict", "report", "visualize"],
)
def test_help_describes_every_argument_and_its_default(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(parser: argparse.ArgumentParser, *given: object) -> NoReturn:
        raise ParserBuilt(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(ParserBuilt) as stopped:
        importlib.import_module(f"tools.{tool}").main()
    for action in stopped.value.args[0]._actions:
        assert action.help, action.dest
        assert action.default in (None, False, "", [], argparse.SUPPRESS) or "default: " in action.help, action.dest


def test_names_of_files_are_numbered() -> None:
    taken: set[str] = set()
    assert [free_name(stem, taken) for stem in ("cat", "cat", "cat-2", "cat")] == ["cat", "cat-2", "cat-2-2", "cat-3"]
