"""The index of tar archives: where each image is, and its label.

It is built by reading the archives once, stored next to them, and checked against them whenever it is opened.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from data.formats.folders import SYSTEM_FOLDERS, count_by_extension, extension_of, image_extensions, is_system_file
from data.formats.labels import label_of
from data.formats.open_files import read_at
from data.listing import Listing, cache_folder, process_lock
from data.sources import SEPARATOR, classes_of, split_labels
from data.wording import shorten

LAYOUT = (
    "the layout is DATA_PATH/train.tar and DATA_PATH/val.tar with members <class>/<image>, or shards "
    "DATA_PATH/train-000000.tar, ... with members <key>.jpg and <key>.cls (a label), not compressed"
)
_BLOCK = tarfile.BLOCKSIZE
# Members whose headers are compared with the index whenever it is opened.
_PROBES = 32
# Longer names may be stored in an extra header before that of the member.
_SHORT_NAME = 90
# Larger labels are assumed to be errors; the list of classes would not fit into memory.
_MOST_CLASSES = 1_000_000
# Maximum number of zero bytes after the end of an archive, which programs append to fill a record.
_PADDING = 2**20
# Indices of other versions are built again: older ones counted other pictures of a sample as images, and merged splits.
_VERSION = 3
_PLACE = {"shard": np.int32, "offset": np.int64, "size": np.int64}
_COLUMNS = {**_PLACE, "label": np.int32}


class Inside(NamedTuple):
    """Where a split is in an archive of several ones.

    Attributes:
        names: names of its folder, of which the first that exists is used.
        splits: names of the folders of all splits; the first on a path decides, as a class may have such a name.
    """

    names: Sequence[str]
    splits: Collection[str]


def index_name(split: str, *, several: bool, chosen: Sequence[str] = ()) -> str:
    """Return the name of the index of a split.

    Args:
        split: "train" or "val".
        several: whether an image may have several labels.
        chosen: names of the archives or folders that were chosen for the split; empty for the usual ones.
    """
    kind = ".labels" if several else ""
    digest = f".{hashlib.sha256(os.fsencode('/'.join(chosen))).hexdigest()[:8]}" if chosen else ""
    return f"{split}{digest}{kind}.index"


def open_index(path: Path, shards: Sequence[Path], inside: Inside | None = None, *, several: bool) -> Listing:
    """Return an index that matches its archives, built on first use and stored where that is possible.

    Args:
        path: where it is stored if its folder can be written, else in the cache.
        shards: see `build_index`, like the others.
        inside: see there.
        several: see there.

    Raises:
        ValueError: it does not match the archives, or one of them has a fault.
    """
    with process_lock(path):
        listing = _stored_index(path)
        if listing is None and not os.access(path.parent, os.W_OK):
            path = cache_folder() / "tar" / f"{str(path.absolute()).strip('/').replace('/', '%')}"
            listing = _stored_index(path)
        if listing is None:
            listing = build_index(shards, inside, several=several).shared(path)
    _check_index(listing, path, shards)
    return listing


def _stored_index(path: Path) -> Listing | None:
    """Return a stored index; None if there is none, or one of another version."""
    if not path.exists():
        return None
    listing = Listing.load(path)
    return listing if listing.about.get("version") == _VERSION else None


def _check_index(listing: Listing, path: Path, shards: Sequence[Path]) -> None:
    """Check that an index matches the archives: names, sizes, and the headers and labels of some members."""
    stale = f"index {path} does not match the archives: {{}}; if these are correct, delete the index to rebuild it"
    recorded, there = listing.about["shards"], [[shard.name, shard.stat().st_size] for shard in shards]
    if recorded != there:
        known, found = ({name for name, _ in archives} for archives in (recorded, there))
        if known != found:
            gone, new = sorted(known - found), sorted(found - known)
            what = f"{shorten(gone)} is missing" if gone else f"it does not list {shorten(new)}"
            raise ValueError(stale.format(what))
        name, size, now = next((a, b, d) for (a, b), (_, d) in zip(recorded, there, strict=True) if b != d)
        raise ValueError(stale.format(f"{name} had {size} bytes and has {now}"))
    images = (
        _Member(os.fsdecode(listing.name(row)), *(int(listing.numbers[key][row]) for key in _PLACE))
        for row in _probes(len(listing))
    )
    labels = [(_Member(*place), digest) for *place, digest in listing.about["labels"]]
    for member in (*images, *(member for member, _ in labels)):
        if not _is_there(member, shards):
            name = shards[member.shard].name
            raise ValueError(stale.format(f"{name} does not contain {member.name} at the indexed offset"))
    for member, digest in labels:
        if _digest(member, shards) != digest:
            raise ValueError(stale.format(f"{shards[member.shard].name} has another label in {member.name}"))


@dataclass(slots=True)
class _Member:
    name: str
    shard: int
    offset: int
    size: int


def _probes(images: int) -> list[int]:
    """Return the images that are compared with the index whenever it is opened."""
    return np.linspace(0, images - 1, min(_PROBES, images)).astype(int).tolist()


def _is_there(member: _Member, shards: Sequence[Path]) -> bool:
    """Return whether an archive has the header of a member where it is expected."""
    block = read_at(shards[member.shard], member.offset - _BLOCK, _BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    has_name = member.name.isascii() and len(member.name) <= _SHORT_NAME
    same_name = not has_name or header.name.removeprefix("./") == member.name
    return same_name and header.size == member.size and header.isreg()


def _digest(member: _Member, shards: Sequence[Path]) -> str:
    return hashlib.sha256(read_at(shards[member.shard], member.offset, member.size)).hexdigest()


def build_index(shards: Sequence[Path], inside: Inside | None = None, *, several: bool = False) -> Listing:
    """Read archives once and return the names, offsets and labels of their images.

    Args:
        shards: the archives.
        inside: where the split is in them; None if they contain no other one.
        several: an image may have several labels, separated by semicolons; `label` is then an index into
            `about["sets"]`, the distinct sets of labels.

    Raises:
        ValueError: an archive cannot be read to its end or has a member twice, or an image has no label.
    """
    folder, found = _collect(shards, inside)
    images, labels = found.samples()
    if not images:
        held = f", but {count_by_extension(found.skipped)}" if found.skipped else ""
        where = f" in a folder {folder}" if folder else " and the other shards" if len(shards) > 1 else ""
        raise ValueError(f"no images in {shards[0]}{where}{held}; {LAYOUT}")
    if several and not labels:
        raise ValueError(f"{shards[0]} holds no labels (<key>.cls), which multi-label data needs; {LAYOUT}")
    if not labels:  # in the order of class folders, independent of the order in the archive
        images.sort(key=lambda image: (*PurePosixPath(image.name).parts[:-1], "", PurePosixPath(image.name).name))
        written = _classes_by_folder(images, folder)
    else:
        written = [_label_of_image(labels, image, shards).text for image in images]
    sets = {text: split_labels(text) if several else (text,) for text in dict.fromkeys(written)}
    if labels and not several and (joined := next((text for text in sets if SEPARATOR in text), None)):
        raise ValueError(f"{shards[0]} has several labels for an image, {joined!r}; set DATA.MULTI_LABEL True")
    names = {name for one in sets.values() for name in one}

    def locate(label: str) -> str:
        image = next(image for image, text in zip(images, written, strict=True) if label in sets[text])
        return f"{shards[image.shard]}, {image.name}"

    classes = classes_of(names, _MOST_CLASSES, locate) if labels else sorted(names)
    place = {name: label for label, name in enumerate(classes)}
    number = {text: number if several else place[text] for number, text in enumerate(sets)}
    rows = (
        (os.fsencode(image.name), image.shard, image.offset, image.size, number[text])
        for image, text in zip(images, written, strict=True)
    )
    about: dict[str, Any] = {"shards": [[shard.name, shard.stat().st_size] for shard in shards], "classes": classes}
    about |= {"version": _VERSION, "skipped": dict(found.skipped), "labels": []}
    if labels:
        probed = [_label_of_image(labels, images[row], shards).member for row in _probes(len(images))]
        about["labels"] = [[*astuple(member), _digest(member, shards)] for member in probed]
    if several:
        about["sets"] = [[place[name] for name in one] for one in sets.values()]
    return Listing.of(rows, _COLUMNS, about)


class _Label(NamedTuple):
    text: str
    member: _Member


@dataclass
class _Contents:
    """What archives hold of a split: images, labels by the extension of their files and by key, and other files."""

    images: list[_Member] = field(default_factory=list)
    labels: dict[str, dict[str, _Label]] = field(default_factory=lambda: {".json": {}, ".cls": {}})
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, member: _Member, shard: Path) -> bool:
        """Add a file of an archive; return whether it is an image or a label."""
        path = PurePosixPath(member.name)
        if path.suffix.lower() in image_extensions():
            self.images.append(member)
            return True
        ending = _ending(member.name)
        if ending not in self.labels:
            self.skipped[extension_of(path)] += 1
            return False
        label = label_of(read_at(shard, member.offset, member.size), ending)
        if label is not None:
            self.labels[ending][f"{member.shard}/{_key(member.name)}"] = _Label(label, member)
        return True

    def samples(self) -> tuple[list[_Member], dict[str, _Label]]:
        """Return the images and the labels by key.

        If there are labels, a sample may have other pictures, such as `<key>.mask.png`, which are counted as skipped.
        """
        labels = self.labels[".json"] | self.labels[".cls"]
        if not labels:
            return self.images, labels
        endings = [_ending(image.name) for image in self.images]
        self.skipped.update(ending for ending in endings if ending not in image_extensions())
        return [one for one, ending in zip(self.images, endings, strict=True) if ending in image_extensions()], labels


def _collect(shards: Sequence[Path], inside: Inside | None) -> tuple[str, _Contents]:
    """Return the folder with the split, "" without `inside`, and what archives hold of the split."""
    found: dict[str, _Contents] = defaultdict(_Contents)
    folders = dict.fromkeys(() if inside else ("",))
    wanted = inside.names if inside else ("",)
    for number, shard in enumerate(shards):
        names = set()
        for member in _members(shard, number):
            folder = _split_folder(PurePosixPath(member.name), inside.splits) if inside else ""
            folders[folder] = None
            if folder in wanted and found[folder].add(member, shard):
                if member.name in names:
                    raise ValueError(f"archive {shard} contains {member.name} twice; pack it again")
                names.add(member.name)
    chosen = next((folder for folder in wanted if folder in folders), None)
    if chosen is None:
        held = f"it contains {shorten(list(folders))}" if folders else "it contains nothing"
        raise ValueError(f"archive {shards[0]} has no folder {' or '.join(wanted)}: {held}; {LAYOUT}")
    return chosen, found[chosen]


def _split_folder(path: PurePosixPath, splits: Collection[str]) -> str:
    """Return the first folder on a path that is a split; else the first folder, or the file if there is none."""
    return next((part for part in path.parts[:-1] if part in splits), path.parts[0])


def _members(path: Path, shard: int) -> Iterator[_Member]:
    """Yield the files of an archive in order, without those of operating systems."""
    cut_off = f"archive {path} is truncated or damaged{{}}; copy it again"
    end = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile would keep all of them in memory
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else member.offset_data
                name = PurePosixPath(member.name)
                if _is_system_member(name) or member.isdir():
                    continue
                is_image = name.suffix.lower() in image_extensions()
                if is_image and (member.islnk() or member.issym() or member.issparse()):
                    raise ValueError(
                        f"archive {path} contains {member.name} as a link or a sparse file, without its bytes; pack it "
                        f"again with tar --dereference --hard-dereference"
                    )
                if member.isreg():
                    yield _Member(member.name.removeprefix("./"), shard, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(cut_off.format(f" ({error})")) from None
    except OSError as error:
        raise ValueError(f"archive {path} cannot be read: {error.strerror}; {LAYOUT}") from None
    if read_at(path, end, _BLOCK) != bytes(_BLOCK):
        raise ValueError(cut_off.format(" (its end is missing)"))
    if path.stat().st_size - end > _PADDING:
        raise ValueError(cut_off.format(f" (it ends after {end} of {path.stat().st_size} bytes)"))
    if read_at(path, end, _PADDING).strip(b"\0"):
        raise ValueError(
            f"archive {path} has data after its end: several archives were joined, or it is damaged; use separate "
            f"shards (train-000000.tar, ...), or copy it again"
        )


def _is_system_member(name: PurePosixPath) -> bool:
    """Return whether a file is hidden or of the system; archives of whole paths may have hidden folders far above."""
    return is_system_file(PurePosixPath(*name.parts[-2:])) or not SYSTEM_FOLDERS.isdisjoint(name.parts)


def _key(name: str) -> str:
    """Return the common key of the files of one image: the path up to the first dot of the file name."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0])


def _ending(name: str) -> str:
    """Return the extension of a file of a sample in lower case: all that follows its key."""
    return "." + PurePosixPath(name).name.partition(".")[2].lower()


def _label_of_image(labels: dict[str, _Label], image: _Member, shards: Sequence[Path]) -> _Label:
    label = labels.get(f"{image.shard}/{_key(image.name)}")
    if label is None:
        raise ValueError(f"{shards[image.shard]} holds {image.name} without a label; {LAYOUT}")
    return label


def _classes_by_folder(images: Sequence[_Member], folder: str) -> list[str]:
    """Return the class of each image: the first folder of its path below that of the split and the common prefix."""
    folders = [PurePosixPath(image.name).parts[:-1] for image in images]
    if folder:
        folders = [parts[parts.index(folder) + 1 :] for parts in folders]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    bare = next((image.name for image, parts in zip(images, folders, strict=True) if len(parts) <= shared), None)
    if bare is not None:
        raise ValueError(f"archive member {bare} is in no class folder and has no label; {LAYOUT}")
    return [parts[shared] for parts in folders]
