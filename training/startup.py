"""Checks and signal handling before PyTorch is imported, which takes seconds; imports as little as possible."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import os
import platform
import signal
import sys
from pathlib import Path
from typing import NoReturn

# Modules of the packages in requirements.txt that every command imports.
_MODULES = (
    *("torch", "torchvision", "timm", "einops", "yacs", "yaml", "numpy", "PIL", "termcolor", "tqdm", "filelock"),
    *("simplejpeg", "faster_coco_eval", "safetensors"),
)
_OLDEST = (3, 10)
_PR_SET_PDEATHSIG = 1  # see prctl(2)


def begin(*needs: str) -> None:
    """Exit if a package is missing, and let Ctrl-C end this process without a traceback until a run handles signals.

    Under torchrun the process also stops if torchrun dies: otherwise it would keep training, or wait for the others
    forever.

    Args:
        needs: modules of further packages in requirements.txt that this program imports.
    """
    _require_packages(*_MODULES, *needs)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not that of a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # code pages of Windows lack most letters of names
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()


def _require_packages(*modules: str) -> None:
    """Exit with one line if this Python is too old or lacks a package, for example outside the environment."""
    instead = "run .venv/bin/python instead, which `make setup` creates"
    if sys.version_info < _OLDEST:
        refuse(f"{sys.executable} is Python {platform.python_version()}, but 3.10 or later is needed; {instead}")
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        install = "or install requirements.txt into this Python"
        refuse(f"{sys.executable} has no package {', '.join(missing)}; {instead}, {install}")


def refuse(problem: Exception | str) -> NoReturn:
    """End a program that cannot do what is asked: one line on standard error, without the flags, and exit status 2."""
    complain(problem)
    sys.exit(2)


def complain(problem: Exception | str) -> None:
    """Print one line on standard error: what a program cannot do."""
    print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)


def stop_with_parent() -> None:
    """Stop this process (SIGTERM) when its parent dies; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
