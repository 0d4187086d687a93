"""The command line of the curves: names of the runs, the picture, and what cannot be drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib.figure
import pytest

from tests.runs import ROOT
from tests.training.report.samples import collect_figures, eval_row, legend, train_rows, write_run
from tools.plot import main


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Return a list that collects the saved figures."""
    return collect_figures(monkeypatch)


def test_several_runs_share_a_picture(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure], capsys: pytest.CaptureFixture
) -> None:
    rows = [*train_rows(1, [10]), eval_row(1, 10)]
    runs = [write_run(tmp_path / name / "default", rows) for name in ("one", "two")]
    main([str(run) for run in runs])
    assert capsys.readouterr().out.strip() == str(runs[0] / "comparison.png")
    labels = legend(drawn[0].axes[0])
    assert labels[0::2] == ["one/default: training", "two/default: training"]
    assert len({line.get_color() for line in drawn[0].axes[0].lines}) == 4


def test_the_folder_of_the_run_may_be_the_current_one(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*train_rows(1, [10]), eval_row(1, 10)]
    monkeypatch.chdir(write_run(tmp_path / "one", rows))
    write_run(tmp_path / "two", rows)
    main(["."])
    main([".", "../two"])
    assert legend(drawn[1].axes[0])[0::2] == ["one: training", "two: training"]


def test_names_of_runs_are_no_formulas_and_none_is_left_out(tmp_path: Path) -> None:
    rows = [*train_rows(1, [10]), eval_row(1, 10)]
    runs = [write_run(tmp_path / "tiny" / name, rows) for name in ("$x^$", "_second")]
    main([str(run) for run in runs] + ["--output", str(tmp_path / "both.svg")])
    drawn = (tmp_path / "both.svg").read_text(encoding="utf-8")
    assert "<!-- tiny/$x^$: training -->" in drawn
    assert "<!-- tiny/_second: training -->" in drawn
    main([str(runs[0]), "--output", str(tmp_path / "curves")])
    assert (tmp_path / "curves").read_bytes().startswith(b"\x89PNG")


def test_the_planned_rates_are_drawn_on_request(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    run = write_run(tmp_path / "run", [*train_rows(1, [10, 20]), eval_row(1, 20)])
    shutil.copy(ROOT / "configs/digits.yaml", run / "config.yaml")
    main(["--planned", str(run)])
    assert legend(drawn[0].axes[2]) == ["planned", "as trained"]


@pytest.mark.parametrize(
    ("name", "says"), [("none", "does not exist; give the output"), ("empty", "has no training rows")]
)
def test_error_if_nothing_can_be_drawn(name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(tmp_path / "empty", [])
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / name)])
    assert says in capsys.readouterr().err


def test_a_picture_is_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [*train_rows(1, [10]), eval_row(1, 10)])
    main([str(run)])
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
