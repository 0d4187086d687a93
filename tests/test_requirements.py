"""The pinned versions: one of each package on every Python that `make setup` works on."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.runs import ROOT
from tools.setup_env import FILES, PYTHONS

VERSIONS = [f"3.{minor}" for minor in range(PYTHONS[0][1], PYTHONS[1][1] + 1)]


def read(name: str, python: str) -> list[Requirement]:
    """Return the requirements in a file that a Python takes."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return [each for each in found if each.marker is None or each.marker.evaluate({"python_version": python})]


@pytest.mark.parametrize("python", VERSIONS)
def test_each_pin_is_of_a_required_version_that_supports_the_python(python: str) -> None:
    *required, pins = (read(name, python) for name in FILES)
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(pinned) == len(pins)
    for requirement in (one for file in required for one in file):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or version in requirement.specifier, f"{requirement}, pinned to {version}"
    for name, version in pinned.items():
        try:
            installed = metadata.metadata(name)
        except metadata.PackageNotFoundError:  # NATTEN is optional
            continue
        supported = SpecifierSet(installed.get("Requires-Python") or "")
        assert installed["Version"] != version or python in supported, f"{name} {version} needs Python {supported}"


def test_the_documentation_gives_the_versions_that_the_package_needs() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    needs = {"the package": project["dependencies"]} | {
        f"`{extra}`": needed for extra, needed in project["optional-dependencies"].items()
    }
    for who, requirements in needs.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {who} |"))
        for requirement in requirements:
            assert requirement.replace(">=", " ≥ ") in row
