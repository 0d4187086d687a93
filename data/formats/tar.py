"""Tar archives with random access: one per split, or shards in the layout of WebDataset.

An index of the members is built once, validated whenever it is used, and shared by all processes. Archives therefore
have the same guarantees as folders: every image once per epoch, in an order that depends only on seed and epoch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from data.formats.folders import skipped_files
from data.formats.labels import ClassList
from data.formats.open_files import forget_files, read_at
from data.formats.series import check_shards, find_files, first_may_be_missing
from data.formats.tar_index import LAYOUT, Inside, index_name, open_index
from data.images import StoredImage, UnreadableImage
from data.listing import Listing
from data.sources import SPLITS, Dataset, ImageSource, Request, join_classes, relabel, to_matrix
from data.wording import shorten


def open_tar(request: Request) -> Dataset:
    """Open a data set of tar archives; the index of a split is stored next to it as `<split>.index`.

    Raises:
        ValueError: an archive is missing, compressed or truncated, the index is of other archives, or classes differ
            between the splits.
    """
    root = request.existing_root(LAYOUT)
    forget_files()  # archives may have been replaced
    shards = {split: find_shards(request, split, root) for split in request.needs}
    listings = {split: _index(request, split, root, paths) for split, paths in shards.items()}
    classes, lookups = _classes(request, root, shards, listings)
    sources = {
        split: TarSource(shards[split], listing, _labels_of(listing, lookups[split], len(classes)), exif=request.exif)
        for split, listing in listings.items()
    }
    skipped = [skipped_files(shards[split][0], one.about.get("skipped")) for split, one in listings.items()]
    warnings = list(filter(None, [*map(first_may_be_missing, shards.values()), *skipped]))
    return Dataset(classes=classes, train=sources.get("train"), held_out=sources.get("val"), format_warnings=warnings)


def _classes(
    request: Request, root: Path, shards: dict[str, list[Path]], listings: dict[str, Listing]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the classes and, for each split, the label of each class of its index."""
    listed = ClassList.of_shards(root.parent if root.is_file() else root)
    if listed.names and all(_follows_list(listing) for listing in listings.values()):
        return listed.names, {split: _listed_labels(one, listed, shards[split]) for split, one in listings.items()}
    names = {split: listing.about["classes"] for split, listing in listings.items()}
    if "train" not in names and (train := find_shards(request, "train", root, optional=True)):
        names["train"] = _index(request, "train", root, train).about["classes"]
    where = {split: f"{root} ({split})" if root.is_file() else _called(paths) for split, paths in shards.items()}
    return join_classes(names, {"train": root, **where}, LAYOUT)


def _follows_list(listing: Listing) -> bool:
    """Return whether `classes.txt` names the classes: of written labels, and of class folders that are numbers."""
    return bool(listing.about["labels"]) or all(name.isdecimal() for name in listing.about["classes"])


def _listed_labels(listing: Listing, listed: ClassList, shards: Sequence[Path]) -> np.ndarray:
    """Return the label of each class of an index, `[classes]`; 0 for numbers that no image has."""
    written = listing.numbers["label"]
    sets = listing.about.get("sets", [[label] for label in range(len(listing.about["classes"]))])
    lookup = np.zeros(len(listing.about["classes"]), dtype=np.int32)
    for number in np.flatnonzero(np.bincount(written)).tolist():
        for label in sets[number]:
            try:
                lookup[label] = listed.label(listing.about["classes"][label])
            except ValueError as error:
                row = int(np.argmax(written == number))
                shard, name = shards[listing.numbers["shard"][row]], os.fsdecode(listing.name(row))
                raise ValueError(f"{shard}, {name}: {error}") from None
    return lookup


def _called(shards: Sequence[Path]) -> str:
    return f"{shards[0]} to {shards[-1].name}" if len(shards) > 1 else str(shards[0])


def _labels_of(listing: Listing, lookup: np.ndarray, classes: int) -> np.ndarray:
    """Return the labels of an index as labels of the data set: `[n]`, or `[n, classes]` of 0 and 1."""
    if "sets" not in listing.about:
        return relabel(listing.numbers["label"], lookup)
    sets = to_matrix([lookup[labels].tolist() if labels else [] for labels in listing.about["sets"]], classes)
    return sets[listing.numbers["label"]]


class TarSource(ImageSource):
    """Images in indexed tar archives.

    Args:
        shards: the archives.
        listing: names and offsets of the members.
        labels: their classes.
        exif: whether to apply the EXIF orientation.
    """

    def __init__(self, shards: Sequence[Path], listing: Listing, labels: np.ndarray, *, exif: bool = False) -> None:
        self._shards = shards
        self._listing = listing
        self._exif = exif
        self.labels = labels

    def get(self, index: int) -> StoredImage:
        """Return the bytes of a member.

        Raises:
            UnreadableImage: the archive is truncated.
        """
        shard, offset, size = (int(self._listing.numbers[key][index]) for key in ("shard", "offset", "size"))
        path = self._shards[shard]
        name = f"{path}/{os.fsdecode(self._listing.name(index))}"
        data = read_at(path, offset, size)
        if len(data) < size:
            raise UnreadableImage(f"cannot read image {name!r}: the archive is truncated", name)
        return StoredImage(data, name, exif=self._exif)

    def file_name(self, index: int) -> str:
        return PurePosixPath(os.fsdecode(self._listing.name(index))).name


def find_shards(request: Request, split: str, root: Path, *, optional: bool = False) -> list[Path]:
    """Return the archives of a split.

    Raises:
        ValueError: there is none (unless `optional`), or one of a numbered series is missing.
    """
    if root.is_file():
        check_shards([root])
        return [root]
    given = getattr(request, split)
    names = request.split_names(split)
    patterns = names if given else [pattern for name in names for pattern in _patterns(name)]
    for pattern in patterns:
        if found := find_files(root, pattern):
            check_shards(found)
            return found
    if optional:
        return []
    compressed = [path.name for path in root.glob(f"{SPLITS[split][0]}*.tar.*") if path.suffix != ".index"]
    if compressed:
        raise ValueError(
            f"{shorten(compressed)} is compressed, so images cannot be read in any order; unpack it to .tar"
        )
    held = shorten(sorted(path.name for path in root.iterdir())) or "nothing"
    raise ValueError(f"no archive {patterns[0]!r} in data path {root}: it contains {held}; {LAYOUT}")


def _patterns(name: str) -> tuple[str, ...]:
    return f"{name}.tar", f"{name}-*.tar", f"{name}/*.tar"


def _index(request: Request, split: str, root: Path, shards: Sequence[Path]) -> Listing:
    """Return the index of a split, whose name depends on what was chosen for it."""
    given = tuple(filter(None, (request.train, request.val)))
    if root.is_file():
        inside = Inside(request.split_names(split), {*SPLITS["train"], *SPLITS["val"], *given})
        archive, chosen = f"{root.stem}.", given and (*inside.names, *given)
    else:
        inside = None
        archive, chosen = "", [path.name for path in shards] if getattr(request, split) else ()
    name = archive + index_name(split, several=request.multi_label, chosen=chosen)
    return open_index(shards[0].with_name(name), shards, inside, several=request.multi_label)
