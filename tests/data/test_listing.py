"""The table of names and integers, in memory and on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from data.listing import Listing

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
