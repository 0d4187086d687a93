"""The allowed imports, and the layout of the repository."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"config", "optimizer", "lr_scheduler", "logger", "utils"}
PACKAGES = {"training", "tasks", "models", "data", "tools", "examples", "benchmarks", "tests"}
OURS = SMALL | PACKAGES | {"main"}
WRITTEN = [path for path in ROOT.rglob("*.py") if not {".venv", "build", "output"} & set(path.relative_to(ROOT).parts)]
FILES = [path for path in WRITTEN if path.relative_to(ROOT).parts[0] != "tests"]

# Allowed imports within the repository; `config` takes the options of the models from where they are declared.
ALLOWED = {
    "main": {"training", "data", *SMALL},
    "training": {"training", "tasks", "models", "data", *SMALL},
    "tasks": {"tasks", "models", "data", *SMALL},
    "models": {"models"},
    "hubconf": {"models"},
    "setup": set(),
    "data": {"data"},
    "config": {"models"},
    "optimizer": {"models"},
    "lr_scheduler": {"optimizer"},
    "logger": {"config", "utils"},
    "utils": set(),
    "docs": set(),
    **dict.fromkeys(("tools", "examples", "benchmarks"), OURS - {"main", "tests"}),
}


def imports_of(path: Path, *, at_once: bool = False) -> set[str]:
    """Return the dotted names of the modules that a file imports or imports from, and of what it takes from them.

    Args:
        path: the file.
        at_once: only imports that run when the file is imported.
    """
    package = path.relative_to(ROOT).parent.parts
    module, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in module.body if at_once else ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def tops_of(path: Path) -> set[str]:
    """Return the first parts of what a file imports."""
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layout(path: Path) -> None:
    place = path.relative_to(ROOT)
    assert tops_of(path) & OURS <= ALLOWED[place.with_suffix("").parts[0]]


@pytest.mark.parametrize("package", ["models", "data"])
def test_only_build_imports_the_config_class(package: str) -> None:
    knowing = [path.name for path in (ROOT / package).rglob("*.py") if "yacs.config" in imports_of(path)]
    assert set(knowing) <= {"build.py"}


def test_operations_import_torch_alone() -> None:
    for path in (ROOT / "models" / "ops").rglob("*.py"):
        assert tops_of(path) <= {"models", "torch", "triton", "__future__", *sys.stdlib_module_names}, path
        assert all(name.startswith("models.ops") for name in imports_of(path) if name.startswith("models")), path


def test_early_imports_need_only_the_standard_library() -> None:
    for name in ("__init__", "startup"):
        assert tops_of(ROOT / "training" / f"{name}.py") <= {"__future__", *sys.stdlib_module_names}


def test_the_report_and_matplotlib_are_imported_only_at_the_end_of_a_run() -> None:
    report = set((ROOT / "training" / "report").glob("*.py"))
    for path in {ROOT / "main.py", *(ROOT / "training").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")} - report:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                names = [f"{module}{alias.name}." for alias in node.names]
                assert not any(name.startswith(("training.report.", "matplotlib.")) for name in names), path


def test_root_has_only_the_documented_files() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} - {"hubconf", "setup"} == {"main", *SMALL}
    assert {path.stem for path in ROOT.glob("*.sh")} == {"train", "evaluate", "train_slurm"}
    assert {path.relative_to(ROOT).parts[0] for path in WRITTEN if path.parent != ROOT} == PACKAGES | {"docs"}
    assert len((ROOT / "main.py").read_text(encoding="utf-8").splitlines()) <= 150


def test_functions_fit_a_screen() -> None:
    for path in WRITTEN:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"
