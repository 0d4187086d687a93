"""Tar archives with random access: one per split, or shards in the layout of WebDataset.

An index of the members is built once, validated whenever it is used, and shared by all processes. Archives therefore
have the same guarantees as folders: every image once per epoch, in an order that depends only on seed and epoch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from data.formats.folders import (
    SYSTEM_FOLDERS,
    count_by_extension,
    extension_of,
    image_extensions,
    is_system_file,
    skipped_files,
)
from data.formats.series import check_series, find_files, first_may_be_missing
from data.images import StoredImage, UnreadableImage
from data.listing import Listing, cache_folder, process_lock
from data.sources import (
    SEPARATOR,
    SPLITS,
    Dataset,
    ImageSource,
    Request,
    classes_of,
    compose,
    join_classes,
    read_class_list,
    relabel,
    split_labels,
    to_matrix,
)
from data.wording import counted, shorten

LAYOUT = (
    "the layout is DATA_PATH/train.tar and DATA_PATH/val.tar with members <class>/<image>, or shards "
    "DATA_PATH/train-000000.tar, ... with members <key>.jpg and <key>.cls (a label), not compressed"
)
# Written by tools/make_shards.py: the shards of a split, with their sizes and checksums.
MANIFEST = "shards.json"
_BLOCK = tarfile.BLOCKSIZE
# Members whose headers are compared with the index whenever it is opened.
_PROBES = 32
# Longer names may be stored in an extra header before that of the member.
_SHORT_NAME = 90
# Larger labels are assumed to be errors; the list of classes would not fit into memory.
_MOST_CLASSES = 1_000_000
# Maximum number of zero bytes after the end of an archive, which programs append to fill a record.
_PADDING = 2**20
# Indices of other versions are built again: older ones counted other pictures of a sample as images.
_VERSION = 2
_EVERY_SPLIT = frozenset(name for names in SPLITS.values() for name in names)
_PLACE = {"shard": np.int32, "offset": np.int64, "size": np.int64}
_COLUMNS = {**_PLACE, "label": np.int32}


def open_tar(request: Request) -> Dataset:
    """Open a data set of tar archives; the index of a split is stored next to it as `<split>.index`.

    Raises:
        ValueError: an archive is missing, compressed or truncated, the index is of other archives, or classes differ
            between the splits.
    """
    root = request.existing_root(LAYOUT)
    _open.cache_clear()  # archives may have been replaced
    shards = {split: find_shards(request, split, root) for split in request.needs}
    several = request.multi_label
    listings = {split: _index(root, split, paths, several=several) for split, paths in shards.items()}
    folder = root.parent if root.is_file() else root
    names = {split: listing.about["classes"] for split, listing in listings.items()}
    listed = read_class_list(folder)
    if listed and all(name.isdecimal() for known in names.values() for name in known):
        names = {split: _by_number(known, listed, shards[split]) for split, known in names.items()}
        names["train"] = listed
    elif "train" not in names and (train := find_shards(request, "train", root, optional=True)):
        names["train"] = _index(root, "train", train, several=several).about["classes"]
    where = {split: f"{root} ({split})" if root.is_file() else _called(paths) for split, paths in shards.items()}
    classes, lookups = join_classes(names, {"train": root, **where}, LAYOUT)
    sources = {
        split: TarSource(shards[split], listing, _labels_of(listing, lookups[split], len(classes)), exif=request.exif)
        for split, listing in listings.items()
    }
    skipped = [skipped_files(shards[split][0], one.about.get("skipped")) for split, one in listings.items()]
    warnings = list(filter(None, [*map(first_may_be_missing, shards.values()), *skipped]))
    return Dataset(classes=classes, train=sources.get("train"), held_out=sources.get("val"), format_warnings=warnings)


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


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Return bytes of a file, which is kept open; several threads and processes may read it at the same time."""
    if hasattr(os, "pread"):
        file = _open(path)  # another thread may remove it from the cache; this reference keeps it open
        return os.pread(file.fileno(), size, offset)
    file = _open(path, threading.get_ident())  # Windows: each thread needs its own file position
    file.seek(offset)
    return file.read(size)


@functools.lru_cache(maxsize=256)
def _open(path: Path, thread: int | None = None) -> Any:  # noqa: ARG001 - it is a part of the cache's key
    return path.open("rb", buffering=0)


def find_shards(request: Request, split: str, root: Path, *, optional: bool = False) -> list[Path]:
    """Return the archives of a split.

    Raises:
        ValueError: there is none (unless `optional`), or one of a numbered series is missing.
    """
    given = getattr(request, split)
    if root.is_file():
        patterns = [root.name]
        folder = root.parent
    else:
        patterns = [given] if given else [p for name in SPLITS[split] for p in _patterns(name)]
        folder = root
    for pattern in patterns:
        if found := find_files(folder, pattern):
            _check_shards(found)
            return found
    if optional:
        return []
    compressed = [path.name for path in folder.glob(f"{SPLITS[split][0]}*.tar.*") if path.suffix != ".index"]
    if compressed:
        raise ValueError(
            f"{shorten(compressed)} is compressed, so images cannot be read in any order; unpack it to .tar"
        )
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    held = f"it contains {shorten(there)}" if there else "it contains nothing"
    raise ValueError(f"no archive {patterns[0]!r} in data path {root}: {held}; {LAYOUT}")


def _patterns(name: str) -> tuple[str, ...]:
    return f"{name}.tar", f"{name}-*.tar", f"{name}/*.tar"


def _check_shards(paths: Sequence[Path]) -> None:
    """Check that no shard of a numbered series, or of its manifest, is missing."""
    manifest = paths[0].with_name(MANIFEST)
    if not manifest.is_file():
        check_series(paths)
        return
    try:
        listed = sorted(json.loads(manifest.read_text(encoding="utf-8"))["shards"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest} is damaged or of another program; copy it again, or remove it") from None
    names = {path.name for path in paths}
    missing = [name for name in listed if _series(name) == _series(paths[0].name) and name not in names]
    if missing:
        raise ValueError(
            f"{paths[0].parent} lacks {shorten(missing)}, which {manifest} lists; copy again what is missing"
        )


def _series(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _by_number(numbers: Sequence[str], classes: Sequence[str], shards: Sequence[Path]) -> list[str]:
    beyond = [number for number in numbers if int(number) >= len(classes)]
    if beyond:
        raise ValueError(
            f"{shards[0]} has the label {shorten(beyond)}, but classes.txt has "
            f"{counted(len(classes), 'class', 'classes')}, labels 0 to {len(classes) - 1}"
        )
    return [classes[int(number)] for number in numbers]


def index_name(split: str, *, several: bool) -> str:
    """Return the name of the index of a split; multi-label data has a different one."""
    return f"{split}.labels.index" if several else f"{split}.index"


def _index(root: Path, split: str, shards: Sequence[Path], *, several: bool) -> Listing:
    """Return the index of a split, built on first use and stored where that is possible."""
    inside = SPLITS[split] if root.is_file() else ()
    path = shards[0].parent / f"{root.stem + '.' if root.is_file() else ''}{index_name(split, several=several)}"
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


def build_index(shards: Sequence[Path], inside: Sequence[str] = (), *, several: bool = False) -> Listing:
    """Read archives once and return the names, offsets and labels of their images.

    Args:
        shards: the archives.
        inside: possible names of the folder inside with the split; empty if the archives contain one split only.
        several: an image may have several labels, separated by semicolons; `label` is then an index into
            `about["sets"]`, the distinct sets of labels.

    Raises:
        ValueError: an archive cannot be read to its end, or an image has no label.
    """
    images, labels, skipped = _collect(shards, inside)
    if not images:
        held = f", but {count_by_extension(skipped)}" if skipped else ""
        where = f" in a folder {' or '.join(inside)}" if inside else " and the other shards" if len(shards) > 1 else ""
        raise ValueError(f"no images in {shards[0]}{where}{held}; {LAYOUT}")
    if several and not labels:
        raise ValueError(f"{shards[0]} holds no labels (<key>.cls), which multi-label data needs; {LAYOUT}")
    if not labels:  # in the order of class folders, independent of the order in the archive
        images.sort(key=lambda image: (*PurePosixPath(image.name).parts[:-1], "", PurePosixPath(image.name).name))
        written = _classes_by_folder(images, inside)
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
    about |= {"version": _VERSION, "skipped": dict(skipped), "labels": []}
    if labels:
        probed = [_label_of_image(labels, images[row], shards).member for row in _probes(len(images))]
        about["labels"] = [[*astuple(member), _digest(member, shards)] for member in probed]
    if several:
        about["sets"] = [[place[name] for name in one] for one in sets.values()]
    return Listing.of(rows, _COLUMNS, about)


class _Label(NamedTuple):
    text: str
    member: _Member


def _collect(shards: Sequence[Path], inside: Sequence[str]) -> tuple[list[_Member], dict[str, _Label], Counter[str]]:
    """Return the images in archives, the labels by key of `<key>.cls` or `<key>.json`, and skipped extensions.

    If there are such labels, a sample may have other pictures, such as `<key>.mask.png`, which are skipped.
    """
    images, skipped = [], Counter()
    labels: dict[str, dict[str, _Label]] = {".json": {}, ".cls": {}}
    for number, shard in enumerate(shards):
        for member in _members(shard, number):
            path = PurePosixPath(member.name)
            # Only the first name decides: a class may have the name of a split.
            if inside and next((part for part in path.parts[:-1] if part in _EVERY_SPLIT), None) not in inside:
                continue
            if path.suffix.lower() in image_extensions():
                images.append(member)
            elif (ending := _ending(member.name)) in labels:
                label = label_of(read_at(shard, member.offset, member.size), ending)
                if label is not None:
                    labels[ending][f"{number}/{_key(member.name)}"] = _Label(label, member)
            else:
                skipped[extension_of(path)] += 1
    by_key = labels[".json"] | labels[".cls"]
    if by_key:
        skipped.update(ending for image in images if (ending := _ending(image.name)) not in image_extensions())
        images = [image for image in images if _ending(image.name) in image_extensions()]
    return images, by_key, skipped


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


def label_of(content: bytes, ending: str) -> str | None:
    """Return the label in a `.cls` or `.json` file of an image; None if there is none."""
    text = content.decode("utf-8", "replace").strip()
    if ending == ".cls":
        return compose(text)
    try:
        found = json.loads(text).get("label")
    except (ValueError, AttributeError):
        return None
    if found is None:
        return None
    return compose(SEPARATOR.join(map(str, found)) if isinstance(found, list) else str(found))


def _label_of_image(labels: dict[str, _Label], image: _Member, shards: Sequence[Path]) -> _Label:
    label = labels.get(f"{image.shard}/{_key(image.name)}")
    if label is None:
        raise ValueError(f"{shards[image.shard]} holds {image.name} without a label; {LAYOUT}")
    return label


def _classes_by_folder(images: Sequence[_Member], inside: Sequence[str]) -> list[str]:
    """Return the class of each image: the first folder of its path below the common prefix."""
    folders = [PurePosixPath(image.name).parts[:-1] for image in images]
    if inside:
        folders = [parts[next(i for i, part in enumerate(parts) if part in inside) + 1 :] for parts in folders]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    bare = next((image.name for image, parts in zip(images, folders, strict=True) if len(parts) <= shared), None)
    if bare is not None:
        raise ValueError(f"archive member {bare} is in no class folder and has no label; {LAYOUT}")
    return [parts[shared] for parts in folders]
