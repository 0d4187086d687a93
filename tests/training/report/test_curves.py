"""Positions of rows on the axis of epochs, and the curves."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib.figure
import pytest

from config import load_config
from lr_scheduler import learning_rates
from tests.runs import ROOT
from tests.training.report.samples import collect_figures, eval_row, legend, train_rows, write_run
from training.report.curves import epochs_of, planned_rates, plot_curves


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Return a list that collects the saved figures."""
    return collect_figures(monkeypatch)


@pytest.mark.parametrize("later", [50, 200])
def test_batch_size_change_keeps_earlier_epochs_in_place(later: int) -> None:
    before = [*train_rows(1, [50, 100]), eval_row(1, 100), *train_rows(2, [150, 200]), eval_row(2, 200)]
    middle = train_rows(3, [210, 225])  # of 300, where the run goes on with updates of another size
    after = [*train_rows(3, [2 * later + later // 2, 3 * later]), eval_row(3, 3 * later)]
    rows = [*before, *middle, *after]
    train = [row for row in rows if row["kind"] == "train"]
    assert epochs_of(train, rows) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.1, 2.25, 2.5, 3.0])


def test_two_batch_size_changes_within_an_epoch_keep_the_order() -> None:
    rows = [*train_rows(1, [50, 100]), eval_row(1, 100), *train_rows(2, [110, 120])]
    rows += [*train_rows(2, [65, 75]), *train_rows(2, [350, 400]), eval_row(2, 400)]  # of 100, 50 and 200 an epoch
    train = [row for row in rows if row["kind"] == "train"]
    assert epochs_of(train, rows) == pytest.approx([0.5, 1.0, 1.1, 1.2, 1.2 + 0.55 / 3, 1.2 + 1.1 / 3, 1.75, 2.0])


def test_unfinished_epoch_has_the_length_of_the_previous_one() -> None:
    rows = [*train_rows(1, [50, 100]), eval_row(1, 100), *train_rows(2, [110, 120])]
    assert epochs_of([row for row in rows if row["kind"] == "train"], rows) == pytest.approx([0.5, 1.0, 1.1, 1.2])
    begun = train_rows(1, [10, 20])
    assert all(0 < position <= 1 for position in epochs_of(begun, begun))


def test_rows_of_a_late_epoch_alone_have_positions() -> None:
    rows = train_rows(7, [16, 17])  # 17 / (17 / 7) is rounded up
    assert epochs_of(rows, rows) == pytest.approx([7 * 16 / 17, 7.0])


def test_legends_name_the_weights_and_the_best(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    rows = [*train_rows(1, [10]), eval_row(1, 10, 40.0), eval_row(1, 10, 30.0, "eval_ema")]
    rows += [*train_rows(2, [20]), eval_row(2, 20, None), eval_row(2, 20, 45.5, "eval_ema")]
    plot_curves({"run": write_run(tmp_path / "run", rows) / "metrics.jsonl"}, tmp_path / "curves.png")
    loss, score, _ = drawn[0].axes
    assert legend(loss) == ["training", "validation, raw weights", "validation, averaged weights"]
    assert legend(score) == [
        "validation, raw weights",
        "best: 40.00 % in epoch 1",
        "validation, averaged weights",
        "best: 45.50 % in epoch 2",
    ]


def test_ten_runs_have_different_colours(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    rows = [*train_rows(1, [50, 100]), eval_row(1, 100)]
    names = [f"run{i}" for i in range(10)]
    plot_curves({name: write_run(tmp_path / name, rows) / "metrics.jsonl" for name in names}, tmp_path / "ten.png")
    colours = {line.get_color() for line in drawn[0].axes[0].lines}
    assert len(colours) == len(drawn[0].axes[0].lines) == 20


def test_part_of_a_line_that_a_killed_run_left_is_not_drawn(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    run = write_run(tmp_path / "run", [*train_rows(1, [10, 20]), eval_row(1, 20)])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "epo')
    plot_curves({"run": run / "metrics.jsonl"}, tmp_path / "curves.png")
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == [0.5, 1.0]


def test_the_planned_schedule_is_that_of_the_run(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    config = load_config(ROOT / "configs/digits.yaml")
    trained = learning_rates(config, list(range(40)), updates_per_epoch=20, world_size=3)
    rows = [row | {"lr": trained[row["update"] - 1]} for row in train_rows(1, [10, 20]) + train_rows(2, [30])]
    run = write_run(tmp_path / "run", [*rows[:2], eval_row(1, 20), rows[2]])
    shutil.copy(ROOT / "configs/digits.yaml", run / "config.yaml")
    rates = planned_rates(run)
    planned = dict(rates)
    assert [planned[(row["update"] - 1) / 20] for row in rows] == pytest.approx([row["lr"] for row in rows])
    assert max(planned) == 399 / 20
    plot_curves({"run": run / "metrics.jsonl"}, tmp_path / "curves.png", planned=rates)
    assert legend(drawn[0].axes[2]) == ["planned", "as trained"]


def test_a_run_without_an_evaluation_says_so(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    begun = train_rows(1, [10])
    for name, rows, texts in (("begun", begun, ["no evaluation yet"]), ("one", [*begun, eval_row(1, 10)], [])):
        plot_curves({name: write_run(tmp_path / name, rows) / "metrics.jsonl"}, tmp_path / "curves.png")
        assert [text.get_text() for text in drawn[-1].axes[1].texts] == texts
