"""What must hold while PyTorch is still being imported, which takes seconds; imports next to nothing itself."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
from pathlib import Path

# Modules of the packages in requirements.txt that every command imports.
_MODULES = ("torch", "torchvision", "timm", "yacs", "yaml", "numpy", "PIL", "termcolor", "tqdm")
_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def require_packages() -> None:
    """End this process with one line where a package is not installed, as in a Python outside the environment."""
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{Path(sys.argv[0]).name}: {sys.executable} has no package {', '.join(missing)}; run "
            ".venv/bin/python instead, which `make setup` makes, or install requirements.txt into this Python",
            file=sys.stderr,
        )
        sys.exit(2)


def end_quietly() -> None:
    """Let Ctrl-C end this process without a traceback, until a run listens, and torchrun's death ask it to stop.

    A process whose launcher was killed would train on unseen, or wait for the others for ever.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()


def stop_with_parent() -> None:
    """Ask this process to stop (SIGTERM) when the one that started it dies; Linux alone can do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
