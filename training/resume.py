"""The starting point of a run: its newest checkpoint, --resume, or pretrained weights; and checks for changes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import yaml
from torch import nn
from yacs.config import CfgNode

from config import complete, differences, flatten, options
from data.wording import counted
from models.weights import adapt
from tasks import Task
from training.checkpoint import FORMAT, CheckpointFolder, load_checkpoint
from training.weight_sets import pick_weights
from utils import was_restarted

# Entries needed to resume a run, besides its format, with their types.
_TRAINING_STATE: dict[str, Any] = {
    **dict.fromkeys(("model", "optimizer", "scaler"), dict),
    "ema": (dict, NoneType),
    "config": str,
    "unlogged": list,
    "best_accuracy": float,
    **dict.fromkeys(("images_per_update", "epoch", "update", "best_epoch"), int),
    **dict.fromkeys(("nonfinite_in_row", "nonfinite", "unreadable"), int),
}


class Resumed(NamedTuple):
    """A checkpoint to resume from, with warnings."""

    path: Path
    checkpoint: dict[str, Any]
    warnings: list[str]


def find_resumed(config: CfgNode, task: Task, *, training_images: int) -> Resumed | None:
    """Return the checkpoint to resume from: the newest in the output folder, or --resume; None for a new run.

    Args:
        config: options of this run. Without --resume, MODEL.RESUME is set to what the run in the folder began from.
        task: its task.
        training_images: size of its training set.

    Raises:
        ValueError: it cannot be resumed with this config.
    """
    found, warnings = None, []
    since = _accepted_since(auto_resume=config.TRAIN.AUTO_RESUME)
    if since < math.inf:
        try:
            folder = CheckpointFolder(config.run_folder, keep=config.KEEP_CHECKPOINTS)
            found = folder.newest(warnings.append, since=since)
        except ValueError as error:
            if not config.MODEL.RESUME:
                raise
            warnings.append(f"{error}; continuing from {config.MODEL.RESUME} instead")
    began_from = _began_from(found[1]) if found else ""
    if not config.MODEL.RESUME:
        config.MODEL.RESUME = began_from  # so that the first command, with --resume, also continues the run
    elif not is_same_file(began_from, config.MODEL.RESUME):
        found = Path(config.MODEL.RESUME), load_checkpoint(config.MODEL.RESUME)
    if found is None:
        return None
    path, state = found
    check_training_state(state, path)
    images_per_update = config.images_per_update(task.world.size)
    changes = config_changes(state, config, images_per_update=images_per_update, training_images=training_images)
    changes += task.changes(state)
    if changes and not config.TRAIN.ALLOW_CONFIG_CHANGE:
        raise ValueError(
            f"{path} was written with other options: {'; '.join(changes)}. Give another --tag to train "
            "another run (from its weights with --pretrained), or --allow-config-change to continue this one anyway; "
            "the config.yaml next to the checkpoint has its options"
        )
    return Resumed(path, state, warnings + [f"continuing with other options: {change}" for change in changes])


def _accepted_since(*, auto_resume: bool) -> float:
    """Return the time in seconds since 1970 from which on checkpoints of the output folder belong to this run.

    Without TRAIN.AUTO_RESUME the first start accepts none, and a restart those written since the launch: the run may
    have died before it had set the files of an earlier run aside. torchrun alone does not tell when it was launched.
    """
    if auto_resume:
        return 0
    return float(os.environ.get("DAT_LAUNCHED", "0")) if was_restarted() else math.inf


def is_same_file(one: str | Path, other: str | Path) -> bool:
    """Return whether two paths lead to the same file; an empty one leads to none."""
    return bool(one and other) and Path(one).resolve() == Path(other).resolve()


def _began_from(state: dict[str, Any]) -> str:
    """Return the --resume of the run that wrote `state`: the same command has already resumed from that file."""
    written = written_config(state) if state.get("format") == FORMAT else None
    return dict(flatten(written)).get("MODEL.RESUME", "") if written else ""


def check_weight_options(config: CfgNode) -> None:
    """Check that a run has weights to start from if it has options for them.

    Raises:
        ValueError: it does not.
    """
    if config.MODEL.PRETRAINED:
        return
    if config.MODEL.CLASS_MAP:
        raise ValueError("MODEL.CLASS_MAP needs the weights of --pretrained; give those too, or remove it")
    if config.MODEL.WEIGHTS:
        raise ValueError("--weights needs --pretrained or --eval; give one, or remove it")


def start_from_pretrained(config: CfgNode, network: nn.Module, task: Task) -> tuple[list[str], list[str]]:
    """Load the weights of --pretrained, if any, into `network`; return notes and warnings for the log.

    Raises:
        ValueError: they cannot be read or do not match.
    """
    path = config.MODEL.PRETRAINED
    if not path:
        return [], []
    checkpoint = load_checkpoint(path)
    class_map = Path(config.MODEL.CLASS_MAP) if config.MODEL.CLASS_MAP else None
    given = pick_weights(checkpoint, path, network, kind=config.MODEL.WEIGHTS)
    classes, known = (data.get("classes") or [] for data in (task.describe(), checkpoint))
    known = known if isinstance(known, list) else []
    try:
        weights, report = adapt(given.weights, network, class_map=class_map, classes=classes, names=known)
    except ValueError as error:
        raise ValueError(f"--pretrained {path}: {error}") from None
    network.load_state_dict(weights)
    notes = [f"starting from {', '.join(filter(None, (path, given.choice)))}", *given.notes, *report.lines()]
    trained = checkpoint.get("epoch")
    if not known or classes != known or not isinstance(trained, int):
        return notes, []
    return notes, [
        f"{path} has been trained on these classes for {counted(trained, 'epoch')}: optimizer and schedule start from "
        "scratch, so accuracy may drop while the learning rate is high; docs/training.md describes how to train it for "
        "longer"
    ]


def check_training_state(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Check that a run can be resumed from a checkpoint.

    Raises:
        ValueError: for example, it contains only weights, or is from another version of this code.
    """
    hint = "to start from its weights use --pretrained"
    if isinstance(checkpoint.get("format"), int) and checkpoint["format"] != FORMAT:
        raise ValueError(
            f"{path} is from another version of this code: its format is {checkpoint['format']}, the current one is "
            f"{FORMAT}; resume it with that version; {hint}"
        )
    whole = all(_is_entry(checkpoint.get(name, ...), kind) for name, kind in _TRAINING_STATE.items())
    whole = whole and all(isinstance(row, list) and len(row) >= 2 for row in checkpoint["unlogged"])
    if checkpoint.get("format") != FORMAT or not whole or written_config(checkpoint) is None:
        raise ValueError(f"{path} has no training state that can be resumed; {hint}")


def _is_entry(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not (kind is int and value < 0)


def written_config(checkpoint: dict[str, Any]) -> CfgNode | None:
    """Return the config of the run that wrote a checkpoint, or None."""
    try:
        options = yaml.safe_load(checkpoint.get("config"))
        return CfgNode(options) if isinstance(options, dict) else None
    except (yaml.YAMLError, AttributeError, AssertionError):  # not YAML, not text, or invalid values
        return None


def config_changes(
    checkpoint: dict[str, Any], config: CfgNode, *, images_per_update: int, training_images: int
) -> list[str]:
    """Return the differences from the options of the run that wrote `checkpoint` that affect the result."""
    free = options(may_change=True)  # including BATCH_SIZE and ACCUMULATION_STEPS: only their product matters
    changes = [
        f"{key}: {before!r} in the checkpoint, {now!r} now"
        for key, before, now in differences(complete(written_config(checkpoint)), config)
        if key not in free and not (key == "AMP" and _may_become(now, before))
    ]
    if checkpoint["images_per_update"] != images_per_update:
        changes.append(
            f"images per update: {checkpoint['images_per_update']} in the checkpoint, {images_per_update} now "
            "(batch size x processes x accumulation steps)"
        )
    if (before := checkpoint.get("training_images", training_images)) != training_images:
        changes.append(f"training images: {before} in the checkpoint, {training_images} now")
    return changes


def _may_become(now: str, before: str) -> bool:
    """Return whether the GPU of the run may choose the precision of its checkpoint; only `--check` leaves that open."""
    return now == "auto" and before != "off"
