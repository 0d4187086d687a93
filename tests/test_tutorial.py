"""Commands of README and docs: the tutorial, with two epochs, and those on the digits, after one epoch."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_docs import COMMANDS, ROOT, blocks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serial")]

TUTORIAL = [
    line
    for page, block in blocks("bash")
    if page.name == "tutorial.md"
    for line in block.splitlines()
    if line != "make setup"
]
DEMO = re.search(r"^demo:.*?\t@(\.venv/\S+ main\.py .*?)$", (ROOT / "Makefile").read_text("utf-8"), re.M | re.S)[1]
SHORT = " TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 DATA.NUM_WORKERS 0"
# They use digits, which need no download, or what `make demo` left; those that train are only checked.
ON_DIGITS = [
    shlex.join(words) + " --check" * ("evaluate.sh" not in words and not words[1].startswith("tools/"))
    for words in COMMANDS
    if any(re.match(r"configs/.*digits|output/demo/", word) for word in words)
    and not {"--data-path", "tools/compare.py"} & set(words)
]
WRITTEN = {
    "train.sh": "output/cifar10_dat_small/pets/best.pth",
    "predict.py": "page.html",
    "visualize.py": "output/visualize/index.html",
    "export.py": "output/export/cifar10_dat_small.onnx",
}


def write_pets(folder: Path) -> None:
    """Write images of two classes that are easy to learn: horizontal and vertical stripes with noise."""
    random = np.random.default_rng(0)
    for part, number in (("train", 64), ("val", 8)):
        for axis, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                stripes = 127 * (1 + np.sin(np.indices((80, 96))[axis] / 3 + random.uniform(0, 6)))
                noisy = stripes[..., None] * random.uniform(0.4, 1, 3) + random.normal(0, 15, (80, 96, 3))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / part / name / f"{i}.jpg")


def link_clone(folder: Path) -> None:
    """Make a folder a clone of this repository with a separate output folder."""
    for item in ROOT.iterdir():
        if item.name not in (".git", ".venv", "output"):
            (folder / item.name).symlink_to(item)
    (folder / ".venv").symlink_to(sys.prefix)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command: str, folder: Path) -> str:
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands_of_the_tutorial_lead_to_a_served_prediction(tmp_path: Path) -> None:
    link_clone(tmp_path)
    write_pets(tmp_path / "pets")
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "pets" / "val" / "dog" / "0.jpg").read_bytes())
    *steps, serve, ask = TUTORIAL
    assert len(steps) == len(WRITTEN)
    for command, (program, file) in zip(steps, WRITTEN.items(), strict=True):
        assert program in command
        begin = time.monotonic()
        run(command + " --opts TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0" * (program == "train.sh"), tmp_path)
        assert (tmp_path / file).is_file()
        print(f"{program}: {time.monotonic() - begin:.0f} s")

    port = free_port()
    server = subprocess.Popen(
        ["bash", "-c", f"{serve} --port {port}"],
        cwd=tmp_path,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        begin = time.monotonic()
        while "running on" not in (line := server.stderr.readline()):
            assert line, "the server ended"
        answers = json.loads(run(ask.replace("8000", str(port)).replace("curl", "curl -sf"), tmp_path))
        print(f"serve and ask: {time.monotonic() - begin:.0f} s")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
    assert {answer["class"] for answer in answers} == {"cat", "dog"}
    assert sum(answer["probability"] for answer in answers) == pytest.approx(1, abs=1e-4)


def test_the_commands_on_digits_run(tmp_path: Path) -> None:
    link_clone(tmp_path)
    write_pets(tmp_path / "folder")
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "folder" / "val" / "dog" / "0.jpg").read_bytes())
    assert len(ON_DIGITS) > 8
    for command in (DEMO + SHORT, *ON_DIGITS):
        begin = time.monotonic()
        run(command, tmp_path)
        print(f"{time.monotonic() - begin:.0f} s  {command}")
