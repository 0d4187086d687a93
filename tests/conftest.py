"""What several files of tests share."""

from __future__ import annotations

import pytest

from tests.launched import Uninterrupted


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Return what runs leave that nothing happens to."""
    return Uninterrupted(tmp_path_factory.mktemp("runs"))
