"""The documentation: the files, commands and flags it names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs of the system, whose arguments are not checked.
OTHERS = {"make", "find", "curl", "pip", "python", "cd", "git", "torchrun", "apt-get", "tar", "wandb", "mlflow"}
# Where the flags of a program are declared, if not in its own file.
TRAINER = ("training/command_line.py", "config.py")
DECLARED = dict.fromkeys(("main.py", "train.sh", "evaluate.sh", "train_slurm.sh"), TRAINER)


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """Yield the fenced blocks of a language with their pages."""
    for page in PAGES:
        for block in re.findall(
            rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            yield page, block


def commands() -> list[tuple[str, list[str]]]:
    """Return the commands of the bash blocks as words, without variables before and without comments."""
    found = []
    for page, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s\|\s|\s&&\s|;\s", line):
                words = shlex.split(part.partition(" > ")[0], comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    found.append((page.name, words))
    return found


def test_commands_name_files_and_flags_that_exist() -> None:
    """Commands are parsed, not run: programs and configs exist, and the program declares each flag."""
    found = commands()
    assert len(found) > 20
    for page, words in found:
        said = f"{page}: {' '.join(words)}"
        for word in words:
            if word.startswith(("configs/", "tools/", "examples/", "docs/")) and not re.search(r"[*<]", word):
                assert (ROOT / word).exists(), said
        program = next((word for word in words if word in DECLARED or word.startswith("tools/")), "")
        assert program or Path(words[0]).name in OTHERS, said
        sources = DECLARED.get(program, (program,) if program else ())
        declared = "".join((ROOT / source).read_text(encoding="utf-8") for source in sources)
        for flag in (word for word in words[words.index(program) :] if word.startswith("--")) if program else ():
            assert re.search(rf"[\"']{flag}[\"']", declared), f"{said}: {flag}"


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", ROOT / "docs", tmp_path], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "api.html").is_file()
