"""The output folder: one run at a time writes into it, and a killed run releases it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.runs import ROOT
from training.output_folder import LOCK, lock_folder, open_folder, set_aside, try_folder

HOLD = "import sys, time; from pathlib import Path; from training.output_folder import lock_folder; "
HOLD += "file = lock_folder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def other_run(folder: Path) -> subprocess.Popen[str]:
    """Start a process that locks the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_simultaneous_runs_create_their_parent_folders(tmp_path: Path) -> None:
    def start(tag: int) -> bool:
        folder = tmp_path / str(tag // 4) / "tiny" / str(tag % 4)
        try_folder(folder)
        return open_folder(folder).is_dir()

    with ThreadPoolExecutor(4) as runs:
        assert all(runs.map(start, range(400)))


def test_try_folder_creates_nothing(tmp_path: Path) -> None:
    try_folder(tmp_path / "tiny" / "default")
    assert not list(tmp_path.iterdir())
    (tmp_path / "tiny").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"output folder .* cannot be written"):
        try_folder(tmp_path / "tiny" / "default")


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with other_run(tmp_path) as first:
        try:
            holder = rf"another run is using {tmp_path} \(process {first.pid} on .+\)"
            with pytest.raises(
                ValueError, match=rf"{holder}; stop it, or give another --tag; .*, remove {tmp_path}/.lock"
            ):
                lock_folder(tmp_path, patience=0)
            assert capsys.readouterr().err == ""
            with pytest.raises(ValueError, match=holder):
                lock_folder(tmp_path, patience=0.3)
            assert re.fullmatch(rf"{holder}; waiting for it to end\n", capsys.readouterr().err)
        finally:
            first.kill()
    with lock_folder(tmp_path, patience=0) as file:
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        assert not file.closed


def test_files_of_an_earlier_run_are_set_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path) is None
    with lock_folder(tmp_path):
        assert set_aside(tmp_path) is None
        for number in (1, 2):
            (tmp_path / "last.pth").write_text(str(number))
            assert set_aside(tmp_path) == tmp_path / f"earlier_{number}"
            assert (tmp_path / f"earlier_{number}" / "last.pth").read_text() == str(number)
        (tmp_path / "earlier_1" / "last.pth").unlink()
        (tmp_path / "earlier_1").rmdir()
        (tmp_path / "tensorboard").mkdir()
        (tmp_path / "other_run").mkdir()
        (tmp_path / "last.tmp").write_text("half a file")
        assert set_aside(tmp_path) == tmp_path / "earlier_3"
        assert (tmp_path / "earlier_3" / "tensorboard").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, "earlier_2", "earlier_3", "other_run", "last.tmp"}
