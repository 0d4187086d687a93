"""The table of names and integers, in memory and on disk."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest

from data.listing import Listing, cache_folder, process_lock

NAMES = [b"a/0.jpg", b"", "ä/\udcff.jpg".encode("utf-8", "surrogateescape"), b"b" * 300]


def table() -> Listing:
    rows = [(name, number, -number) for number, name in enumerate(NAMES)]
    return Listing.of(rows, {"label": np.int32, "offset": np.int64}, {"classes": ["ä", "\udcff"]})


def same(one: Listing, other: Listing) -> bool:
    numbers = all(np.array_equal(one.numbers[key], other.numbers[key]) for key in one.numbers | other.numbers)
    return [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))] and numbers


def test_names_and_numbers() -> None:
    listing = table()
    assert [listing.name(index) for index in range(len(listing))] == NAMES
    assert listing.numbers["offset"].tolist() == [0, -1, -2, -3]
    assert listing.numbers["label"].dtype == np.int32


def test_file(tmp_path: Path) -> None:
    table().save(tmp_path / "new" / "a.index")
    loaded = Listing.load(tmp_path / "new" / "a.index")
    assert same(loaded, table())
    assert loaded.about == table().about
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.index"]


def test_pickles(tmp_path: Path) -> None:
    assert same(pickle.loads(pickle.dumps(table())), table())
    table().save(tmp_path / "a.index")
    sent = pickle.dumps(Listing.load(tmp_path / "a.index"))
    assert len(sent) < 300  # the name of the file, not what it holds
    assert same(pickle.loads(sent), table())


def test_empty(tmp_path: Path) -> None:
    listing = Listing.of([], {"label": np.int32}, {})
    assert len(listing) == 0
    listing.save(tmp_path / "a.index")
    assert len(Listing.load(tmp_path / "a.index")) == 0


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    table().save(path)
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:30], b"text", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^index .*a\.index is damaged or not an index; delete it"):
            Listing.load(path)


def test_machines_that_write_one_file_do_not_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers with the same process id, on one network file system."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    fsync, path = os.fsync, tmp_path / "a.index"

    def write_another(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        table().save(path)

    monkeypatch.setattr(os, "fsync", write_another)
    table().save(path)
    assert same(Listing.load(path), table())
    assert [path.name for path in tmp_path.iterdir()] == ["a.index"]


def test_table_that_cannot_be_written_stays_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = table().shared(tmp_path / "file" / "a.index")
    assert kept.path is None
    assert same(kept, table())
    assert table().shared(tmp_path / "a.index").path == tmp_path / "a.index"


def test_users_of_a_machine_have_their_own_lock_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of one user cannot be opened by another."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for user in (1, 2):
        monkeypatch.setattr("data.listing._USER", user)
        with process_lock(Path("/data/imagenet")):
            pass
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_of_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", refuse)
    assert cache_folder().parent == tmp_path
