"""Curves of runs: loss, score and learning rate by epoch, from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from config import load_config
from logger import read_rows
from lr_scheduler import learning_rates, planned_schedule

_KINDS = {"eval": "validation, raw weights", "eval_ema": "validation, averaged weights"}
_TAB20 = colormaps["tab20"].colors  # pairs of a dark and a light colour
_COLOURS = (*_TAB20[::2], *_TAB20[1::2])

Row = dict[str, Any]


def plot_curves(runs: dict[str, Path], target: Path, *, planned: Sequence[tuple[float, float]] = ()) -> None:
    """Draw loss, score and learning rate over epochs.

    Args:
        runs: the `metrics.jsonl` of each run, by the name of the run.
        target: the picture to write.
        planned: learning rates of all epochs, as `lr_scheduler.planned_schedule` gives them.

    Raises:
        ValueError: a file is missing or has no training rows.
    """
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    loss, score, rate = figure.subplots(1, 3)
    if planned:
        rate.plot(*zip(*planned, strict=True), color="0.6", linestyle="--", linewidth=1, label="planned")
    colours = cycle(_COLOURS)
    for name, metrics in runs.items():
        rows = _read(metrics)
        prefix = f"{name}: " if len(runs) > 1 else ""
        train = [row for row in rows if row["kind"] == "train"]
        at = epochs_of(train, rows)
        colour = next(colours)
        loss.plot(at, _column(train, "loss"), color=colour, linewidth=1, label=f"{prefix}training")
        rate.plot(at, _column(train, "lr"), color=colour, linewidth=1.5, label=f"{prefix}as trained")
        for kind, title in _KINDS.items():
            found = [row for row in rows if row["kind"] == kind]
            if found:
                _draw_evaluations(loss, score, found, f"{prefix}{title}", next(colours))
    if not score.lines:
        score.text(0.5, 0.5, "no evaluation yet", ha="center", va="center", transform=score.transAxes)
    _finish(loss, "loss")
    _finish(score, "score on the validation set")
    _finish(rate, "learning rate")
    figure.savefig(target, dpi=110, format=target.suffix[1:] or "png")


def epochs_of(train: list[Row], rows: list[Row]) -> list[float]:
    """Return the positions of training rows in epochs.

    A row tells its epoch and how many updates of the size of that time the run has taken. The last row of a finished
    epoch gives the updates of an epoch. After a change of the batch size, that is another number: a row takes the
    latest one that puts it into its own epoch. If there is none, as after two changes within an epoch, it is placed
    between its neighbours.
    """
    sizes = {row["epoch"]: Fraction(row["update"], row["epoch"]) for row in rows}
    finished = {row["epoch"] for row in rows if row["kind"] != "train"} | {
        epoch for epoch in sizes if epoch < max(sizes)
    }
    positions: dict[int, float] = {}
    for number, row in enumerate(train):
        epoch, update = row["epoch"], row["update"]
        known = [sizes[other] for other in sorted(finished, reverse=True) if other <= epoch]
        inside = (update / size for size in [*known, sizes[epoch]] if epoch - 1 < update / size <= epoch)
        if (position := next(inside, None)) is not None:
            positions[number] = float(position)
    return np.interp(range(len(train)), list(positions), list(positions.values())).tolist()


def planned_rates(run: Path) -> list[tuple[float, float]]:
    """Return the planned learning rates of a run, as `lr_scheduler.planned_schedule`.

    Raises:
        ValueError: the folder holds no config.yaml or no rows of training.
    """
    config = load_config(run / "config.yaml")
    rows = _read(run / "metrics.jsonl")
    last = [row for row in rows if row["kind"] == "train"][-1]
    updates_per_epoch = round(last["update"] / epochs_of([last], rows)[0])
    shape = {"updates_per_epoch": updates_per_epoch, "world_size": 1}
    # Learning rates are proportional to the number of processes, which is not recorded.
    one_process = learning_rates(config, [last["update"] - 1], **shape)[last["update"] - 1]
    shape["world_size"] = max(1, round(last["lr"] / one_process)) if one_process else 1
    return planned_schedule(config, **shape)


def _read(metrics: Path) -> list[Row]:
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist; give the output folder of a run")
    rows = read_rows(metrics)
    if not any(row["kind"] == "train" for row in rows):
        raise ValueError(f"{metrics} has no training rows yet")
    return rows


def _column(rows: list[Row], name: str) -> list[float]:
    """Return a column; null values (non-finite) leave a gap."""
    return [float("nan") if row[name] is None else row[name] for row in rows]


def _draw_evaluations(loss: Axes, score: Axes, rows: list[Row], label: str, colour: str) -> None:
    at = [row["epoch"] for row in rows]
    metrics = [name for name in rows[0] if name not in ("kind", "epoch", "update")]
    if "loss" in metrics:
        loss.plot(at, _column(rows, "loss"), color=colour, label=label)
    if "top1" not in metrics:  # another task, for which it is unknown whether larger is better
        for name in metrics:
            if name != "loss":
                score.plot(at, _column(rows, name), marker=".", label=f"{label}: {name}")
        return
    values = _column(rows, "top1")
    best = max(range(len(rows)), key=lambda i: values[i] if values[i] == values[i] else float("-inf"))
    score.plot(at, values, color=colour, marker=".", label=label)
    score.plot(
        at[best],
        values[best],
        color=colour,
        marker="*",
        markersize=12,
        linestyle="",
        label=f"best: {values[best]:.2f} % in epoch {at[best]}",
    )


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize="small")
