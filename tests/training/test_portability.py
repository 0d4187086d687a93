"""Runs without the modules and signals that Windows lacks, simulated here, and in other threads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.runs import run_command, write_config

pytestmark = pytest.mark.xdist_group("portability")  # groups start before single tests, and these are long

# Windows, as far as it concerns this code: no fcntl, resource, SIGUSR1 and SIGHUP; folders cannot be opened; locks by
# msvcrt, here implemented with those of this system; processes are spawned.
WINDOWS = """
import errno, fcntl, multiprocessing, os, shutil, signal, sys, types
import torch, timm, torchvision, sklearn.datasets, matplotlib.figure  # which see the system that they are on

def locking(descriptor, mode, count):
    assert mode == 2
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, os.lseek(descriptor, 0, os.SEEK_CUR))
    except OSError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

open_file = os.open
def open_no_folder(path, *arguments, **settings):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return open_file(path, *arguments, **settings)

def pretend():
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    sys.modules["fcntl"] = sys.modules["resource"] = None
    for name in ("SIGUSR1", "SIGHUP", "sigwaitinfo"):
        delattr(signal, name)
    os.open, shutil._use_fd_functions = open_no_folder, False

if __name__ in ("__main__", "__mp_main__"):
    pretend()
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from main import main
    sys.exit(main(sys.argv[1:]))
"""

IN_A_THREAD = """
import sys, threading
from main import main
statuses = []
thread = threading.Thread(target=lambda: statuses.append(main(sys.argv[1:])))
thread.start()
thread.join()
print("status", *statuses)
"""


@pytest.mark.slow
def test_run_trains_resumes_and_is_evaluated_with_the_modules_of_windows(tmp_path: Path) -> None:
    script = tmp_path / "windows.py"
    script.write_text(WINDOWS, encoding="utf-8")
    config = write_config(tmp_path, TRAIN={"EPOCHS": 1}, OUTPUT=str(tmp_path / "output"), DATA={"NUM_WORKERS": 1})
    here = {"PYTHONPATH": str(Path.cwd())}
    done = run_command(sys.executable, script, "--cfg", config, "--opts", "SAVE_EVERY_UPDATES", "3", **here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory unknown" in done.stdout
    best = tmp_path / "output" / "tiny" / "default" / "best.pth"
    alone = ("--cfg", config, "--workers", "0")
    again = run_command(sys.executable, script, *alone, **here)
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stdout
    evaluated = run_command(sys.executable, script, *alone, "--eval", "--resume", best, **here)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "Accuracy of the network on the 360 test images" in evaluated.stdout


def test_a_lock_of_windows_keeps_a_second_run_out_and_can_be_read(tmp_path: Path) -> None:
    script = tmp_path / "windows.py"
    script.write_text(WINDOWS.split("if __name__")[0], encoding="utf-8")
    holder = (
        "import subprocess, sys; from windows import *; pretend(); from pathlib import Path; "
        "from training.output_folder import lock_folder; held = lock_folder(Path(sys.argv[1]), patience=0); "
        "print(sys.argv[2], flush=True); "
        "sys.argv[2] == 'first' and subprocess.run([sys.executable, '-c', sys.argv[3], sys.argv[1], 'second', ''])"
    )
    path = {"PYTHONPATH": f"{Path.cwd()}:{tmp_path}"}
    done = run_command(sys.executable, "-c", holder, tmp_path, "first", holder, **path)
    assert done.stdout == "first\n"
    assert "another run is using" in done.stderr
    assert "(process " in done.stderr


def test_training_in_a_thread(tmp_path: Path) -> None:
    config = write_config(tmp_path, TRAIN={"EPOCHS": 1}, OUTPUT=str(tmp_path / "output"))
    done = run_command(sys.executable, "-c", IN_A_THREAD, "--cfg", config)
    assert done.stdout.splitlines()[-1] == "status 0", done.stderr
