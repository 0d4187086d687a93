"""A training run small enough for tests: real digits, a few thousand parameters, seconds per epoch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from logger import read_rows

ROOT = Path(__file__).resolve().parents[1]

TINY = {
    "BASE": str(ROOT / "configs" / "digits.yaml"),
    "DATA": {"BATCH_SIZE": 64, "NUM_WORKERS": 0},
    "MODEL": {
        "NAME": "tiny",
        "DAT": {
            "dim_stem": 8,
            "dims": [8, 16, 16, 16],
            "depths": [1, 1, 1, 1],
            "stage_spec": ["N", "D", "D", "D"],
            "heads": [1, 2, 2, 2],
            "groups": [1, 1, 1, 1],
        },
    },
    "TRAIN": {"EPOCHS": 2, "WARMUP_EPOCHS": 1},
    "DEVICE": "cpu",
    "REPORT": False,
}


class Killed(BaseException):
    """Interrupts a write like a kill: no exception handler of the writer runs."""


def write_config(folder: Path, **sections: Any) -> Path:
    """Write the tiny config, `sections` merged over it, into `folder` and return its path."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(_merged(TINY, sections)), encoding="utf-8")
    return path


def run_command(*command: str | Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository with one thread per process and return its result."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **env}
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True
    )


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the rows of `kind` in the metrics of a run."""
    return [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == kind]


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], over[k]) for k in base.keys() & over.keys() if isinstance(over[k], dict)}
    return base | over | both
