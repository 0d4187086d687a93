"""Numbered files of a split: `train-000000.tar`, `train-000001.tar`, or `train-00000-of-00002.parquet`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from data.wording import shorten

# Sizes and checksums of the shards next to it, written by tools/make_shards.py. Labels in these shards are positions in
# classes.txt.
MANIFEST = "shards.json"


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Return the sorted files of a folder that match a pattern, or those of an absolute pattern."""
    absolute = Path(pattern).expanduser()
    if absolute.is_absolute():
        folder, pattern = Path(absolute.anchor), str(absolute.relative_to(absolute.anchor))
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def check_series(paths: Sequence[Path]) -> None:
    """Check that no file of a numbered series is missing.

    Without a total number in the names, missing last files are not detected.

    Raises:
        ValueError: a file is missing.
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
        named = shorten([str(number) for number in missing])
        raise ValueError(
            f"{'shards' if len(missing) > 1 else 'shard'} {named} missing next to {there}; copy again what is "
            "missing, or number the others without gaps"
        )


def check_shards(paths: Sequence[Path]) -> None:
    """Check that no shard of a numbered series, or of its manifest, is missing.

    Raises:
        ValueError: one is missing, or the manifest is damaged.
    """
    manifest = paths[0].with_name(MANIFEST)
    if not manifest.is_file():
        check_series(paths)
        return
    try:
        listed = sorted(json.loads(manifest.read_text(encoding="utf-8"))["shards"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest} is damaged or of another program; copy it again, or remove it") from None
    names = {path.name for path in paths}
    missing = [name for name in listed if _series(name) == _series(paths[0].name) and name not in names]
    if missing:
        raise ValueError(
            f"{paths[0].parent} lacks {shorten(missing)}, which {manifest} lists; copy again what is missing"
        )


def _series(name: str) -> str:
    return re.sub(r"\d+", "", name)


def first_may_be_missing(paths: Sequence[Path]) -> str:
    """Return a warning if a series begins with 1, as it would without a first file 0; empty otherwise."""
    match = re.search(r"-0*1\.\w+$", paths[0].name)
    if match is None or len(paths) == 1:
        return ""
    return f"the first shard is {paths[0]}; if they are numbered from 0, one is missing"
