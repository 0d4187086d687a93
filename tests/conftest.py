"""What several files of tests share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest

from tests.launched import Uninterrupted


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Return what runs leave that nothing happens to."""
    return Uninterrupted(tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Kill what a test that failed left running, for which Python would wait at the end."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
