"""The environment that `make setup` creates: when it is reused, and when there is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.runs import call
from tools import setup_env


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the environments that are installed, in a clone that consists of its requirements."""

    def install(environment: Path) -> None:
        environments.append(environment)
        environment.mkdir(exist_ok=True)
        (environment / "complete").touch()

    environments: list[Path] = []
    for name in setup_env.FILES:
        (tmp_path / name).write_text("torch\n")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "LINK", tmp_path / ".venv")
    monkeypatch.setattr(setup_env, "install", install)
    monkeypatch.setenv("DAT_ENV_CACHE", str(tmp_path / "cache"))
    return environments


def test_an_environment_is_installed_once_for_the_same_requirements(installed: list[Path], tmp_path: Path) -> None:
    for _ in range(2):
        status, out, err = call(setup_env.main)
        assert (status, err) == (0, "")
        assert out.endswith("setup: .venv is ready; its interpreter is .venv/bin/python\n")
    assert installed == [(tmp_path / ".venv").readlink()]


@pytest.mark.parametrize("name", setup_env.FILES)
def test_other_requirements_get_another_environment(name: str, installed: list[Path], tmp_path: Path) -> None:
    call(setup_env.main)
    (tmp_path / name).write_text("torch>=2\n")
    assert call(setup_env.main)[0] == 0
    assert len(set(installed)) == 2
    assert (tmp_path / ".venv").readlink() == installed[1]
    (tmp_path / name).write_text("torch\n")
    call(setup_env.main)
    assert len(installed) == 2
    assert (tmp_path / ".venv").readlink() == installed[0]


def test_an_environment_of_the_user_is_left_alone(installed: list[Path], tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    status, out, err = call(setup_env.main)
    assert (status, out, installed) == (2, "", [])
    assert err.startswith("setup: .venv is a folder of your own; move it away")


def test_a_failed_installation_is_repeated(
    installed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(environment: Path) -> None:
        environment.mkdir()
        raise subprocess.CalledProcessError(23, "pip")

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "install", fail)
        status, out, err = call(setup_env.main)
    assert (status, out) == (1, "")
    assert err == "setup: the installation failed (pip ended with 23); see above\n"
    assert not (tmp_path / ".venv").is_symlink()
    assert call(setup_env.main)[0] == 0
    assert len(installed) == 1


def test_another_python_is_refused(installed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "PYTHONS", ((3, 1), (3, 2)))
    status, out, err = call(setup_env.main)
    assert (status, out, installed) == (2, "", [])
    assert err.startswith("setup: Python 3.1 to 3.2 is needed, this is 3.")
    assert err.endswith("try make PYTHON=python3.2\n")
