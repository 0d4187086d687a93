"""The documentation: the files, commands and flags it names exist, and the programs accept its commands."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed import run as torchrun

from training.command_line import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs of the system, whose arguments are not checked.
OTHERS = {"make", "find", "curl", "pip", "cd", "git", "apt-get", "tar", "wandb", "mlflow"}
# Modules of other packages that commands run by `python -m`.
MODULES = {"uvicorn", "pytest"}


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """Yield the fenced blocks of a language with their pages."""
    for page in PAGES:
        for block in re.findall(
            rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            yield page, block


def lines() -> Iterator[tuple[Path, str]]:
    """Yield the lines of the bash blocks, and commands of tools within sentences, with their pages."""
    for page, block in blocks("bash"):
        yield from ((page, line) for line in block.replace("\\\n", " ").splitlines())
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield from ((page, line) for line in re.findall(r"`(\.venv/bin/python tools/[^`<]+(?<!\.))`", text))


def commands() -> list[tuple[str, list[str]]]:
    """Return the commands of the pages as words, without variables before and without comments."""
    found = []
    for page, line in lines():
        for part in re.split(r"\s\|\s|\s&&\s|;\s", line):
            words = shlex.split(part.partition(" > ")[0], comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append((page.name, words))
    return found


COMMANDS = {tuple(words): page for page, words in commands()}


class Accepted(Exception):
    """The parser of a program took a command line."""


def test_programs_and_files_of_commands_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(COMMANDS) > 20
    for words, page in COMMANDS.items():
        said = f"{page}: {' '.join(words)}"
        for word in words:
            if word.startswith(("configs/", "tools/", "examples/", "docs/")):
                assert any(ROOT.glob(word)), said
        assert words[0] in ("bash", ".venv/bin/python", ".venv/bin/torchrun") or words[0] in OTHERS, said
        assert words[0] != "make" or words[1] in targets, said


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = (re.sub(r"[`*]|\[(.*?)\]\(.*?\)", r"\1", line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings() -> None:
    checked = 0
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
            checked += bool(anchor)
    assert checked > 10


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "bash"], ids=" ".join)
def test_launchers_accept_a_command(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher runs with programs that only print; what it would start is parsed, options and their values too."""
    for item in (words[1], "tools"):
        (tmp_path / item).symlink_to(ROOT / item)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").symlink_to("/bin/echo")
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "echo"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = done.stdout.splitlines()[-1].split()
    program = max(i for i, word in enumerate(started) if word.endswith(("/main.py", "/launch.py")))
    monkeypatch.chdir(ROOT)
    parse(started[program + (2 if started[program].endswith("launch.py") else 1) :])


@pytest.mark.parametrize("words", [words[1:] for words in COMMANDS if words[0].startswith(".venv/bin/")], ids=" ".join)
def test_programs_accept_a_command(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if "--nnodes" in words:
        torchrun.parse_args(list(words))
    if "main.py" in words:
        parse(words[words.index("main.py") + 1 :])
    elif words[0] == "-m":
        assert words[1] in MODULES or importlib.util.find_spec(words[1]), words
    else:
        accept = argparse.ArgumentParser.parse_args

        def stop(parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
            raise Accepted(accept(parser, *given))

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        monkeypatch.setattr("sys.argv", [words[0], *words[1:]])
        with pytest.raises(Accepted):
            importlib.import_module(Path(words[0]).with_suffix("").as_posix().replace("/", ".")).main()


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", ROOT / "docs", tmp_path], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "api.html").is_file()
