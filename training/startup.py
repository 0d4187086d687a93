"""What must hold while PyTorch is still being imported, which takes seconds; imports next to nothing itself."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def end_quietly() -> None:
    """Let Ctrl-C end this process without a traceback, until a run listens, and torchrun's death ask it to stop.

    A process whose launcher was killed would train on unseen, or wait for the others for ever.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
