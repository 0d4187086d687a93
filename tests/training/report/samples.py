"""Metrics of runs, and the figures drawn from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.axes
import matplotlib.figure
import pytest


def train_rows(epoch: int, updates: list[int]) -> list[dict[str, Any]]:
    """Return rows of training."""
    return [{"kind": "train", "epoch": epoch, "update": n, "lr": 0.1, "loss": 1.0, "grad_norm": 1.0} for n in updates]


def eval_row(epoch: int, update: int, top1: float | None = 50.0, kind: str = "eval") -> dict[str, Any]:
    """Return the row of an evaluation."""
    return {"kind": kind, "epoch": epoch, "update": update, "top1": top1, "top5": 90.0, "loss": 1.0}


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the metrics of a run and return its folder."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def collect_figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Return a list that collects the figures which would be saved."""
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def legend(axes: matplotlib.axes.Axes) -> list[str]:
    """Return the words of a legend."""
    return [text.get_text() for text in axes.get_legend().get_texts()]
