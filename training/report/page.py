"""The page report.html of a run: result, curves, mistakes of a classifier, cost, environment and config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from yacs.config import CfgNode

from config import default_config, differences, load_config
from data.build import is_stream
from data.images import StoredImage
from data.wording import counted
from logger import read_rows
from tasks import TASKS, build_task
from tasks.classification import Classification
from training.environment import read_environment
from training.report import markup
from training.report.held_out import HeldOutPredictions, check_classes, predict_held_out
from training.trained_model import load_trained
from utils import World, write_atomically

FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
WORST = 24  # mistakes shown as pictures
MOST_ROWS = 200  # of a table
MOST_CELLS = 25  # maximum classes of a matrix of numbers; above, it is a picture
GREEN, RED = "26 127 75", "179 38 30"
MOST_PIXELS = 2000  # maximum classes of a picture; above, there is none


def write_report(
    folder: Path, device: torch.device, *, data_path: str = "", wanted: Callable[[], bool] = lambda: True
) -> Path:
    """Write the report of a run into its folder and return the file.

    Args:
        folder: with config.yaml, metrics.jsonl and optionally best.pth and curves.png.
        device: to run the network on.
        data_path: the data set; empty for that of the run.
        wanted: called repeatedly; returns whether to continue.

    Raises:
        ValueError: the folder is not that of a run, or its data set is not there.
        training.report.held_out.NotWanted: the report is not wanted any more.
    """
    config = load_config(folder / "config.yaml", ["DATA.DATA_PATH", data_path] if data_path else [])
    rows, speed = (read_rows(folder / f"{name}.jsonl") for name in ("metrics", "speed"))
    evaluations = [row for row in rows if row["kind"] in ("eval", "eval_ema")]
    kind = TASKS.get(config.TASK)
    classifies = kind is not None and issubclass(kind, Classification) and not config.DATA.MULTI_LABEL
    mistakes = ""  # a stream has no random access, and its commands must not be executed
    if classifies and not is_stream(config.DATA.DATASET) and (folder / "best.pth").is_file():
        mistakes = _mistakes(folder / "best.pth", config, device, wanted)
    page = markup.fill(
        _TEMPLATES / "report.html",
        title=markup.text(f"{config.MODEL.NAME} / {config.TAG}"),
        summary=_tiles(config, evaluations, speed),
        curves=_curves(folder / "curves.png"),
        evaluations=_evaluations(evaluations),
        mistakes=mistakes,
        cost=_table(_cost(speed)),
        environment=_table([(name, value) for name, value in read_environment(folder).items()]),
        options=_table([(key, now) for key, _, now in differences(default_config(), config)]),
        config=markup.text(config.dump()),
    )
    write_atomically(folder / FILE, page)
    return folder / FILE


def _tiles(config: CfgNode, evaluations: Sequence[dict[str, Any]], speed: Sequence[dict[str, Any]]) -> str:
    """Return the headline numbers."""
    score = TASKS[config.TASK].score_of(config) if config.TASK in TASKS else None
    tiles = [("epochs", f"{max((row['epoch'] for row in evaluations), default=0)} of {config.TRAIN.EPOCHS}")]
    scored = [row for row in evaluations if score and row.get(score.key) is not None]
    if scored:
        best = max(scored, key=lambda row: score.of({score.key: row[score.key]}))
        averaged = ", averaged weights" if best["kind"] == "eval_ema" else ""
        shown = score.show(score.of({score.key: best[score.key]}))
        tiles.insert(0, (f"best {score.title}, in epoch {best['epoch']}{averaged}", shown))
    if speed:
        tiles.append(("training time", _time_of_updates(speed)))
        tiles.append(("images per second", f"{np.median([row['images_per_second'] for row in speed]):.0f}"))
    cells = (f'<div class="card"><b>{markup.text(value)}</b>{markup.text(name)}</div>' for name, value in tiles)
    return "\n".join(cells)


def _curves(picture: Path) -> str:
    if not picture.is_file():
        return ""
    source = markup.address("png", picture.read_bytes())
    return f'<img class="curves" src="{source}" alt="loss, score and learning rate by epoch">'


def _evaluations(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return '<p class="soft">No evaluation yet.</p>'
    names = [name for name in rows[-1] if name not in ("kind", "epoch", "update")]
    head = "".join(f'<th class="number">{markup.text(name)}</th>' for name in names)
    body = "".join(
        f'<tr><td class="number">{row["epoch"]}</td><td>{"averaged" if row["kind"] == "eval_ema" else "raw"}</td>'
        + "".join(f'<td class="number">{_number(row.get(name))}</td>' for name in names)
        + "</tr>"
        for row in rows[-MOST_ROWS:]
    )
    return f'<table><tr><th class="number">epoch</th><th>weights</th>{head}</tr>{body}</table>'


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _cost(speed: Sequence[dict[str, Any]]) -> list[tuple[str, object]]:
    if not speed:
        return []
    rates = [row["images_per_second"] for row in speed]
    begun, ended = (_time(row["time"]) for row in (speed[0], speed[-1]))
    return [
        ("training time without evaluations and interruptions", _time_of_updates(speed)),
        ("first and last line of the log", f"{begun} and {ended}"),
        ("images per second, median", f"{np.median(rates):.1f}"),
        (
            "images per second, 10th and 90th percentile",
            f"{np.quantile(rates, 0.1):.1f} to {np.quantile(rates, 0.9):.1f}",
        ),
        ("peak memory of a process, GiB", max((row["memory_gib"] for row in speed if row["memory_gib"]), default="")),
    ]


def _time_of_updates(speed: Sequence[dict[str, Any]]) -> str:
    """Return the time of all updates as h:mm:ss, including those lost in an interruption and repeated."""
    return str(timedelta(seconds=round(sum(row.get("seconds", 0) for row in speed))))


def _mistakes(checkpoint: Path, config: CfgNode, device: torch.device, wanted: Callable[[], bool]) -> str:
    """Return the section of the page on the held-out images."""
    model = load_trained(checkpoint)
    config.DATA.CACHE = False  # each image is read once
    task = build_task(config, World(0, 1, 0, device), training=False)
    check_classes(task, str(checkpoint))
    network = model.network.to(device, memory_format=torch.channels_last)
    found = predict_held_out(task.as_evaluated(network), task, task.eval_loader(), model.classes, wanted=wanted)
    pictures = (_mistake(found, place, task.held_out(int(found.index[place]))) for place in found.worst(WORST))
    return markup.fill(
        _TEMPLATES / "mistakes.html",
        summary=f"{found.is_right().sum()} of {len(found.index)} correct: {100 * found.accuracy():.2f} %",
        classes=_classes(found),
        confusions=_confusions(found),
        matrix=_matrix(found),
        pictures="\n".join(pictures) or '<p class="soft">None.</p>',
    )


def _classes(found: HeldOutPredictions) -> str:
    """Return accuracy by class, the lowest first."""
    images, accuracy, confused = found.images_by_class(), found.accuracy_by_class(), {}
    for label, other, _ in found.confusions():
        confused.setdefault(label, found.classes[other])
    order = [label for label in np.argsort(accuracy, kind="stable").tolist() if images[label]]
    rows = "".join(
        f'<tr><td>{markup.text(found.classes[label])}</td><td class="number">{images[label]}</td>'
        f"<td>{markup.bar('', accuracy[label])}</td><td>{markup.text(confused.get(label, ''))}</td></tr>"
        for label in order[:MOST_ROWS]
    )
    head = '<tr><th>class</th><th class="number">images</th><th>accuracy</th><th>most often confused with</th></tr>'
    return f"<table>{head}{rows}</table>{_left_off(len(order))}"


def _confusions(found: HeldOutPredictions) -> str:
    pairs = found.confusions()
    rows = "".join(
        f"<tr><td>{markup.text(found.classes[label])}</td><td>{markup.text(found.classes[other])}</td>"
        f'<td class="number">{count}</td></tr>'
        for label, other, count in pairs[:MOST_CELLS]
    )
    return f'<table><tr><th>class</th><th>predicted</th><th class="number">images</th></tr>{rows}</table>'


def _matrix(found: HeldOutPredictions) -> str:
    """Return the confusion matrix: numbers for a few classes, a picture for many, nothing for too many."""
    if len(found.classes) > MOST_PIXELS:
        return f'<p class="soft">Not drawn for {len(found.classes)} classes.</p>'
    matrix = found.matrix()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    if len(found.classes) > MOST_CELLS:
        grey = (255 * (1 - share**0.5)).astype(np.uint8)  # the square root makes rare mistakes visible
        source = markup.picture(Image.fromarray(grey).convert("RGB"), lossless=True)
        return f'<img class="matrix" src="{source}" alt="confusion matrix, a row for each class">'
    names = [markup.text(name) for name in found.classes]
    head = "".join(f"<th><span>{name}</span></th>" for name in names)
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(_cell(*cell, i == j) for j, cell in enumerate(zip(*row, strict=True)))}</tr>"
        for i, (name, row) in enumerate(zip(names, zip(matrix.tolist(), share.tolist(), strict=True), strict=True))
    )
    return f'<table class="matrix"><tr><td></td>{head}</tr>{rows}</table>'


def _cell(count: int, share: float, right: bool) -> str:
    shade = share**0.5
    ink = "; color: white" if shade > 0.6 else ""
    ground = f"rgb({GREEN if right else RED} / {shade:.2f})"
    return f'<td class="number" style="background: {ground}{ink}">{count or ""}</td>'


def _mistake(found: HeldOutPredictions, place: int, stored: StoredImage) -> str:
    predicted, true = found.classes[found.predicted[place]], found.classes[found.target[place]]
    bars = markup.bar(f"predicted: {predicted}", found.confidence[place])
    bars += markup.bar(f"true: {true}", found.truth[place])
    return markup.figure(stored.decode(), stored.name, bars)


def _table(rows: Sequence[tuple[str, object]]) -> str:
    if not rows:
        return '<p class="soft">Not known.</p>'
    cells = (f"<tr><td>{markup.text(name)}</td><td>{markup.text(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _left_off(rows: int) -> str:
    left = counted(rows - MOST_ROWS, "more class", "more classes")
    return f'<p class="soft">and {left}</p>' if rows > MOST_ROWS else ""


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
