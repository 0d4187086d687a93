"""Draw the curves of a run from its metrics.jsonl.

python tools/plot.py output/digits/default
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_NAMES = {"eval": "weights", "eval_ema": "averaged weights"}


def plot_curves(metrics: Path, target: Path) -> None:
    """Draw loss, accuracy and learning rate over epochs.

    Args:
        metrics: a `metrics.jsonl`.
        target: the picture to write.

    Raises:
        ValueError: where `metrics` is missing or holds no rows.
    """
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist; give the output folder of a run")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        raise ValueError(f"{metrics} holds no rows of training yet")
    updates_per_epoch = max(row["update"] / row["epoch"] for row in train)
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["update"] / updates_per_epoch for row in train]
    loss.plot(epochs, [row["loss"] for row in train], label="training, as trained on", linewidth=1)
    rate.plot(epochs, [row["lr"] for row in train], linewidth=1.5)
    for kind, name in _NAMES.items():
        found = [row for row in rows if row["kind"] == kind]
        if found and {"loss", "top1"} <= found[0].keys():
            at = [row["epoch"] for row in found]
            loss.plot(at, [row["loss"] for row in found], label=f"held out, {name}")
            best = max(found, key=lambda row: row["top1"])
            accuracy.plot(at, [row["top1"] for row in found], marker=".", label=f"{name}, best {best['top1']:.2f} %")
            accuracy.plot(best["epoch"], best["top1"], marker="o", color=accuracy.lines[-1].get_color())
    _finish(loss, "loss", legend=True)
    _finish(accuracy, "top-1 accuracy, %", legend=True)
    _finish(rate, "learning rate", legend=False)
    figure.savefig(target, dpi=110)


def _finish(axes: Axes, title: str, *, legend: bool) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python tools/plot.py OUTPUT_FOLDER")
    try:
        plot_curves(Path(sys.argv[1]) / "metrics.jsonl", Path(sys.argv[1]) / "curves.png")
    except ValueError as problem:
        print(f"plot.py: {problem}", file=sys.stderr)
        sys.exit(2)
    print(Path(sys.argv[1]) / "curves.png")
