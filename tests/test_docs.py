"""The documentation: the files, commands and flags it names exist, and the programs accept its commands."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed import run as torchrun

from training.command_line import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages for contributors, whose commands are checked, too.
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# Programs of the system, whose arguments are not checked.
OTHERS = {"make", "find", "curl", "pip", "cd", "git", "apt-get", "tar", "wandb", "mlflow"}
# Modules of other packages that commands run by `python -m`, whose arguments are not checked.
MODULES = {"uvicorn", "pytest"}


def blocks(language: str, pages: Sequence[Path] = PAGES) -> Iterator[tuple[Path, str]]:
    """Yield the fenced blocks of a language with their pages."""
    for page in pages:
        for block in re.findall(
            rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            yield page, block


def lines() -> Iterator[tuple[Path, str]]:
    """Yield the lines of bash blocks, indented commands, and those of programs within sentences, with their pages."""
    pages = [*PAGES, *OTHER_PAGES]
    for page, block in blocks("bash", pages):
        yield from ((page, line) for line in block.replace("\\\n", " ").splitlines())
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        within = r"`(\.venv/bin/python (?:tools/|-m (?:examples|benchmarks)\.[a-z])[^`<]+(?<!\.))`"
        for command in (within, r"^    (\.venv/bin/python .+)$"):
            yield from ((page, line) for line in re.findall(command, text, re.MULTILINE))


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


def arguments_of(words: Sequence[str]) -> list[str]:
    """Return the arguments that a launcher, `bash <script> <processes> <config> ...`, gives to main.py."""
    script, _, config, *rest = words[1:]
    if script == "evaluate.sh":
        return ["--cfg", config, "--eval", "--resume", *rest]
    return ["--cfg", config, *(["--tag"] if rest and not rest[0].startswith("-") else []), *rest]


def test_links_lead_to_files_and_headings() -> None:
    checked = 0
    for page in [*PAGES, *OTHER_PAGES]:
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
    given, expected = started[program + (2 if started[program].endswith("launch.py") else 1) :], arguments_of(words)
    assert given[: len(expected)] == expected  # a job on SLURM also gets --device cuda
    monkeypatch.chdir(ROOT)
    parse(given)


def check_program(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program parse the words after `python` of a command; those of `python -m` begin with `-m`."""
    if "main.py" in words:
        parse(words[words.index("main.py") + 1 :])
        return
    path, *given = words[1:] if words[0] == "-m" else words
    if path in MODULES:
        return
    program = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    if not hasattr(program, "argparse"):  # takes its arguments as they are
        inspect.signature(program.main).bind(*given)
        return
    accept = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        raise Accepted(accept(parser, *given))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr("sys.argv", [path, *given])
        with pytest.raises(Accepted):
            program.main()


@pytest.mark.parametrize("words", [words[1:] for words in COMMANDS if words[0].startswith(".venv/bin/")], ids=" ".join)
def test_programs_accept_a_command(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if "--nnodes" in words:
        torchrun.parse_args(list(words))
    check_program(words, monkeypatch)


def test_programs_accept_the_commands_in_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checked = 0
    for path in CONFIGS:
        header = re.findall(r"^#(?: .*:)? ((?:bash|python) .+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        for command in header:
            program, *words = shlex.split(command)
            assert str(path.relative_to(ROOT)) in words, f"{path}: {command}"
            if program == "bash":
                assert (ROOT / words[0]).is_file(), f"{path}: {command}"
                parse(arguments_of([program, *words]))
            else:
                check_program(words, monkeypatch)
            checked += 1
    assert checked > 150


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", ROOT / "docs", tmp_path], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "api.html").is_file()
