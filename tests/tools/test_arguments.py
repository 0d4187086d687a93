"""Arguments that several tools take."""

from __future__ import annotations

import argparse
import importlib
from typing import NoReturn

import pytest

from tools.arguments import add_network, free_name


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
