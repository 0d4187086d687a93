"""A training run small enough for tests: real digits, a few thousand parameters, seconds per epoch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

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


def call(main: Callable[[], int | None], *words: object) -> tuple[int, str, str]:
    """Call the main function of a program, and return its exit status, output and errors."""
    name, out, err = f"{main.__module__.rpartition('.')[2]}.py", StringIO(), StringIO()
    with mock.patch("sys.argv", [name, *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            status = main()
        except SystemExit as ended:
            status = ended.code
    return int(status or 0), out.getvalue(), err.getvalue()


def printed_by(main: Callable[[], int | None], *words: object) -> str:
    """Call the main function of a program, which must succeed, and return its output."""
    status, out, err = call(main, *words)
    assert status == 0, err
    return out


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the rows of `kind` in the metrics of a run."""
    return [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == kind]


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], over[k]) for k in base.keys() & over.keys() if isinstance(over[k], dict)}
    return base | over | both
