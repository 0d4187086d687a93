"""Timings on a shared machine: functions take turns in one process, and the best of several runs counts."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import timm
import torch

from data.wording import counted
from training.environment import processor

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def take_turns(
    candidates: Mapping[str, Callable[[], object]], *, runs: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every run of every function, after one warm-up run each."""
    seconds = {name: [] for name in candidates}
    for run in range(runs + 1):
        for name, candidate in candidates.items():
            start = _now(device)
            candidate()
            elapsed = _now(device) - start
            if run > 0:
                seconds[name].append(elapsed)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(seconds: list[float]) -> str:
    """Return by how much the median run is slower than the best, in percent."""
    return f"{sorted(seconds)[len(seconds) // 2] / min(seconds) - 1:.0%}"


def precision(name: str, device: torch.device) -> AbstractContextManager:
    """Return the autocast context for a key of `AMP_DTYPES`."""
    dtype = AMP_DTYPES[name]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def environment(device: torch.device, threads: int) -> str:
    """Return device and versions, for the line above a table."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{processor()}, {counted(threads, 'thread')}"
    return f"{where}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
