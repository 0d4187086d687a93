"""The command line of the report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runs import ROOT
from tests.training.report.samples import eval_row, train_rows, write_run
from tools import report


def test_a_page_is_written_with_fresh_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "run", [*train_rows(1, [10]), eval_row(1, 10, 45.5)])
    shutil.copy(ROOT / "configs/digits.yaml", run / "config.yaml")
    monkeypatch.setattr("sys.argv", ["report.py", str(run), "--device", "cpu"])
    report.main()
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<b>45.50 %</b>best accuracy, in epoch 1" in page
    assert '<img class="curves" src="data:image/png;base64,' in page


def test_folder_that_is_not_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "metrics.jsonl does not exist; give the output folder of a run" in capsys.readouterr().err
