"""Run main.py in several processes on this machine, and restart them if one dies.

    python tools/launch.py 2 --cfg configs/digits.yaml

The processes are started by torchrun, which by itself restarts a run after any exit status and then exits with 1. Here
a run that was asked to stop, or for which retrying will not help, is not restarted, and the exit status is that of its
processes. The environment variable MAX_RESTARTS is the maximum number of restarts, 3 by default.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import startup

if __name__ == "__main__":
    startup.begin()

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from training.exit_status import LOST_PEER

ROOT = Path(__file__).resolve().parents[1]
_USAGE = "usage: python tools/launch.py <processes> <flags of main.py...>"

# Seconds for stopping processes to finish their update and save, before torchrun kills them.
SHUTDOWN_SECONDS = 180


def main(words: Sequence[str]) -> int:
    """Run `main.py` in several processes: the first argument is their number; return the exit status."""
    if list(words) in (["--help"], ["-h"]):
        print(_USAGE)
        return 0
    if not words or not re.fullmatch("[1-9][0-9]*", words[0]):
        print(_USAGE, file=sys.stderr)
        return 2
    processes, *arguments = words
    wanted = os.environ.get("MAX_RESTARTS", "3")
    if not re.fullmatch("[0-9]+", wanted):
        print(
            f"launch.py: the variable MAX_RESTARTS must be a whole number, such as 3, not {wanted!r}", file=sys.stderr
        )
        return 2
    restarts = int(wanted)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":  # a requeued job also continues from before this launch
        os.environ["DAT_LAUNCHED"] = str(time.time())
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, _stop)  # as torchrun does for the other signals
    try:
        for restart in range(restarts + 1):
            os.environ["DAT_RESTART_COUNT"] = str(restart)
            os.environ["DAT_RESTARTS_LEFT"] = str(restarts - restart)
            statuses = run_once(processes, arguments)
            decided = [status for status in statuses if status >= 0 and status != LOST_PEER]
            if decided or restart == restarts:
                break
            print(f"launch.py: a process died; restart {restart + 1} of {restarts}", file=sys.stderr, flush=True)
    except SignalException as error:
        return 128 + error.sigval
    return max(decided, default=LOST_PEER)


def run_once(processes: str, arguments: Sequence[str]) -> list[int]:
    """Return the exit statuses of the processes that failed, below 0 if a signal ended them; [0] if none did.

    Raises:
        SignalException: where this process was asked to stop, after it has stopped the others.
    """
    options = ["--standalone", "--nproc-per-node", processes, "--max-restarts", "0", str(ROOT / "main.py")]
    try:
        torchrun.run(torchrun.parse_args([*options, *arguments]))
    except ChildFailedError as error:
        return [failure.exitcode for failure in error.failures.values()]
    return [0]


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise SignalException("asked to stop", signal.Signals(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
