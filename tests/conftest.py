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


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Kill what tests that failed left running, for which Python would wait at the end.

    Not after each test: the workers of a loader that is not collected yet run on, and must not be found dead.
    """
    yield
    for process in multiprocessing.active_children():
        process.kill()
