"""Public names have docstrings, and functions of tensors document shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    *(ROOT / "models").rglob("*.py"),
    *(ROOT / "tools").glob("*.py"),
    *(ROOT / "training/report").glob("*.py"),
    ROOT / "hubconf.py",
    ROOT / "training/trained_model.py",
    ROOT / "tasks/base.py",
    ROOT / "data/build.py",
]
SHAPE = re.compile(r"\[[^\]]*([A-Z\d]|, )[^\]]*\]|any shape")
# `dict[str, Tensor]` is a state dict or holds what its docstring names.
TENSORS = re.compile(r"(Sequence|list|tuple)\[.*\bTensor\b.*\]|Tensor( \| None)?")


class Public(NamedTuple):
    """A public function, class or method."""

    file: str
    name: str
    node: ast.FunctionDef | ast.ClassDef
    owner: ast.ClassDef | None

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    def __str__(self) -> str:
        return f"{self.file}: {self.owner.name + '.' if self.owner else ''}{self.name}"


def _public(file: str, body: list[ast.stmt], owner: ast.ClassDef | None = None) -> Iterator[Public]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield Public(file, node.name, node, owner)
            if isinstance(node, ast.ClassDef):
                yield from _public(file, node.body, node)


PUBLIC = [
    one
    for path in FILES
    for one in _public(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8")).body)
]
CLASSES = {one.name: one for one in PUBLIC if isinstance(one.node, ast.ClassDef)}
METHODS = {(one.owner.name, one.name): one for one in PUBLIC if one.owner}


def description(one: Public) -> str:
    """Return the docstring; for a method also those of its class and of the method it overrides."""
    if not one.owner:
        return one.doc
    texts, owners = [one.doc], [one.owner]
    for owner in owners:
        bases = [CLASSES[base].node for base in map(_last, owner.bases) if base in CLASSES]
        owners += [base for base in bases if base not in owners]  # a class may have the name of its base
        overridden = METHODS.get((owner.name, one.name))
        texts.append(overridden.doc if overridden else "")
    return "\n".join([*texts, (ast.get_docstring(one.owner) or "") if one.name in ("forward", "backward") else ""])


def _last(base: ast.expr) -> str:
    return ast.unparse(base).partition("[")[0].rpartition(".")[2]


def _tensors(one: Public) -> list[str]:
    arguments = one.node.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *filter(None, [arguments.vararg])]
    return [a.arg for a in given if a.annotation and TENSORS.fullmatch(ast.unparse(a.annotation))]


def gives_shapes(one: Public) -> bool:
    """Whether the docstring has a shape, or refers to one that has."""
    text = description(one)
    named = set(re.findall(r"`[\w.]*?(\w+)`", text))
    others = [other.doc for other in PUBLIC if other.name in named and other.node is not one.node]
    shapes = [ast.get_docstring(one.owner) or ""] if one.owner else []
    return any(map(SHAPE.search, [text, *others, *shapes]))


@pytest.mark.parametrize("file", sorted({one.file for one in PUBLIC}))
def test_public_names_have_docstrings(file: str) -> None:
    assert [str(one) for one in PUBLIC if one.file == file and not description(one).strip()] == []


def test_functions_of_tensors_document_shapes() -> None:
    takers = [
        one
        for one in PUBLIC
        if one.file.startswith("models/") and isinstance(one.node, ast.FunctionDef) and _tensors(one)
    ]
    assert len(takers) > 150
    assert [str(one) for one in takers if not gives_shapes(one)] == []
