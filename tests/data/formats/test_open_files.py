"""Files stay open, within the limit of the process."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.formats.open_files import forget_files, read_at

FILES = 300


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Write files and return a list of those that are opened later."""
    for number in range(FILES):
        (tmp_path / f"{number}").write_bytes(f"{number:03}".encode())
    found, path_open = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode, **how: found.append(path) or path_open(path, *mode, **how))
    return found


def read_all(folder: Path) -> None:
    for number in range(FILES):
        assert read_at(folder / f"{number}", 1, 9) == f"{number:03}"[1:].encode()


def count_open(folder: Path) -> int:
    """Return how many files of a folder this process has open."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).startswith(f"{folder}/") for link in links)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget_files()
    yield
    forget_files()


def test_each_file_is_opened_once(tmp_path: Path, opened: list[Path]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < FILES + 256:
        pytest.skip("this machine allows fewer open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, limits[1]))
    try:
        for _ in range(2):
            read_all(tmp_path)
        assert len(opened) == FILES
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
@pytest.mark.parametrize(("limit", "kept"), [(100, 50), (520, 264)])
def test_files_within_the_limit(
    tmp_path: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch, limit: int, kept: int
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, 2 * limit))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    read_all(tmp_path)
    assert count_open(tmp_path) == kept
    forget_files()
    assert count_open(tmp_path) == 0
