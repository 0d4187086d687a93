"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Iterator

import pytest

from tests.launched import Uninterrupted


def pytest_configure() -> None:
    """Restore signals that a background shell or nohup ignores; runs would inherit that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Return the outcomes of uninterrupted runs."""
    return Uninterrupted(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the errors which are logged."""
    errors: list[str] = []
    monkeypatch.setattr(logging.getLogger("dat"), "error", errors.append)
    return errors


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Undo the signal handling of a run in this process, which processes forked later would inherit."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Kill processes left by failed tests, for which Python would wait at exit.

    Not after each test: the workers of a loader that is not collected yet run on, and must not be found dead.
    """
    yield
    for process in multiprocessing.active_children():
        process.kill()
