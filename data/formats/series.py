"""Files of a part that are numbered: `train-000000.tar`, `train-000001.tar`, or `train-00000-of-00002.parquet`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data.sources import shorten


def check_series(paths: Sequence[Path]) -> None:
    """Check that no file of a numbered series is missing, as far as their names tell: the last ones may be.

    Raises:
        ValueError: one is.
    """
    matches = [re.search(r"-(\d+)(?:-of-(\d+))?\.\w+$", path.name) for path in paths]
    numbers = [int(match[1]) for match in matches if match]
    if len(numbers) < len(paths):
        return
    total = matches[0][2]
    if total is None and len(paths) == 1:
        return
    wanted = range(int(total)) if total else range(min(numbers[0], 1), max(numbers) + 1)
    missing = sorted(set(wanted) - set(numbers))
    if missing:
        there = f"{paths[0]} and {paths[-1].name}" if len(paths) > 1 else str(paths[0])
        raise ValueError(
            f"shards {shorten([str(number) for number in missing])} are missing next to {there}; copy them again, or "
            f"number the others without gaps"
        )


def first_may_be_missing(paths: Sequence[Path]) -> str:
    """Return a remark where a series begins with 1, as it would without its first file; empty otherwise."""
    match = re.search(r"-0*1\.\w+$", paths[0].name)
    if match is None or len(paths) == 1:
        return ""
    return f"the shards begin with {paths[0]}: if they count from 0, the first one is missing"
