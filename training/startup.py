"""Checks and signal handling before PyTorch is imported, which takes seconds; imports as little as possible."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
from pathlib import Path

# Modules of the packages in requirements.txt that every command imports.
_MODULES = ("torch", "torchvision", "timm", "yacs", "yaml", "numpy", "PIL", "termcolor", "tqdm")
_PR_SET_PDEATHSIG = 1  # see prctl(2)


def begin() -> None:
    """Exit if a package is missing, and let Ctrl-C end this process without a traceback until a run handles signals.

    Under torchrun the process also stops if torchrun dies: otherwise it would keep training, or wait for the others
    forever.
    """
    _require_packages()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()


def _require_packages() -> None:
    """Exit with one line if a package is missing, for example in a Python outside the environment."""
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{Path(sys.argv[0]).name}: {sys.executable} has no package {', '.join(missing)}; run "
            ".venv/bin/python instead, which `make setup` creates, or install requirements.txt into this Python",
            file=sys.stderr,
        )
        sys.exit(2)


def stop_with_parent() -> None:
    """Stop this process (SIGTERM) when its parent dies; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
