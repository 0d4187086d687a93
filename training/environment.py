"""The environment of a run: device, system and versions, saved with the run."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from utils import World, write_atomically

FILE = "environment.json"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "triton")


def write_environment(folder: Path, world: World) -> None:
    """Write the environment of a run into its folder, replacing that of an earlier start."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    found = {
        "processes": world.size,
        "device": device,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads of a process": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }
    write_atomically(
        folder / FILE, json.dumps({name: value for name, value in found.items() if value}, indent=1) + "\n"
    )


def read_environment(folder: Path) -> dict[str, object]:
    """Return the environment written by `write_environment`; empty if there is none."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def processor() -> str:
    """Return the model name of the CPU on Linux, elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
