"""The command line of the report."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.runs import ROOT, call
from tests.training.report.samples import eval_row, train_rows, write_run
from tools import report


def write_finished(folder: Path) -> Path:
    run = write_run(folder, [*train_rows(1, [10]), eval_row(1, 10, 45.5)])
    shutil.copy(ROOT / "configs/digits.yaml", run / "config.yaml")
    return run


def test_a_page_is_written_with_fresh_curves(tmp_path: Path) -> None:
    run = write_finished(tmp_path / "run")
    assert call(report.main, run, "--device", "cpu") == (0, f"{run / 'report.html'}\n", "")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<b>45.50 %</b>best accuracy, in epoch 1" in page
    assert '<img class="curves" src="data:image/png;base64,' in page


def test_folder_that_is_not_a_run_does_not_end_the_others(tmp_path: Path) -> None:
    runs = [tmp_path, write_finished(tmp_path / "run"), tmp_path / "gone"]
    status, out, err = call(report.main, *runs, "--device", "cpu")
    assert status == 2
    assert out == f"{runs[1] / 'report.html'}\n"
    said = "report.py: {}/metrics.jsonl does not exist; give the output folder of a run"
    assert [line[: len(said) - 2 + len(str(run))] for line, run in zip(err.splitlines(), runs[::2], strict=True)] == [
        said.format(run) for run in runs[::2]
    ]
