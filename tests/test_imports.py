"""Which file may import which: the layout of the repository, kept."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {path.stem for path in ROOT.glob("*.py")} | {"models", "data", "tools", "benchmarks", "tests"}
FILES = [path for path in ROOT.rglob("*.py") if not {".venv", "output", "tests"} & set(path.relative_to(ROOT).parts)]


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.add(".".join((*base, *(node.module or "").split("."))).strip("."))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_place_allows(path: Path) -> None:
    place = path.relative_to(ROOT)
    tops = {name.split(".")[0] for name in imports_of(path)} & OURS
    if len(place.parts) == 1 and place.stem not in ("main", "engine"):
        assert not tops & {"models", "data", "main", "engine"}
    if place.stem == "config" and len(place.parts) == 1:
        assert not tops
    if place.parts[0] in ("models", "data"):
        assert tops <= {place.parts[0]}
        if place.name != "build.py":
            assert "yacs.config" not in imports_of(path)
    if place.parts[:2] == ("models", "ops"):
        outside = {name.split(".")[0] for name in imports_of(path)} - {"__future__", "models", "torch", "triton"}
        assert outside <= {"collections", "functools", "math", "typing", "dataclasses", "itertools", "enum", "weakref"}
    if place.parts[0] in ("tools", "benchmarks"):
        assert "main" not in tops
    assert not tops & {"tests"}
    if place.stem != "main":
        assert "main" not in tops
