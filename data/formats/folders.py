"""Images sorted into folders, root/train/<class>/* and root/val/<class>/*, of any number of classes.

The held-out images may also be in one folder with a list of their classes, as published for ImageNet.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from data.formats.ground_truth import find_lists, read_ground_truth
from data.images import StoredImage, read_file
from data.listing import Listing, cache_folder, process_lock
from data.sources import Dataset, ImageSource, Request, join_classes, relabel
from data.wording import counted, shorten

LAYOUT = "the layout is DATA_PATH/train/<class>/*.jpg and DATA_PATH/val/<class>/*.jpg"

# Folders created by operating systems and network storage.
SYSTEM_FOLDERS = {
    *("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"),
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot"),
}
# Formats that Pillow recognises but cannot decode itself.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Number of images from which on their list is cached in a file.
SHARED_FROM = 20_000


def open_folders(request: Request) -> Dataset:
    """Open a data set of class folders; every folder is listed at most once.

    If there is a folder `train`, it always defines the classes, so that labels are the same in training and evaluation.

    Raises:
        ValueError: a folder is missing, empty or unreadable, a class has no images, or `val` has a class that `train`
            does not have.
    """
    root = request.root(LAYOUT)
    there = sorted(entry.name for entry in _entries(root) if entry.is_dir())
    folders = {split: _split_folder(request, split, root, there) for split in request.needs}
    listings = {split: list_images(folder) for split, folder in folders.items()}
    names = {split: listing.about["classes"] for split, listing in listings.items()}
    if "train" not in folders and (train := request.find_split("train", root, there)):
        folders["train"], names["train"] = train, class_folders(train)
    if "val" in names and "train" in names and listings["val"].about.get("numbered"):
        names["val"] = _by_number(names["val"], names["train"], folders["val"])
    classes, lookups = join_classes(
        {split: names[split] for split in ("train", "val") if names.get(split)}, folders, LAYOUT
    )
    sources = {
        split: FileSource(folders[split], listing, relabel(listing.numbers["label"], lookups[split]), exif=request.exif)
        for split, listing in listings.items()
    }
    skipped = [skipped_files(folders[split], listing.about["skipped"]) for split, listing in listings.items()]
    return Dataset(
        classes=classes,
        train=sources.get("train"),
        held_out=sources.get("val"),
        format_warnings=list(filter(None, skipped)),
    )


def _split_folder(request: Request, split: str, root: Path, names: Sequence[str]) -> Path:
    found = request.find_split(split, root, names)
    if found is None:
        held = shorten(names) if names else "no folders"
        raise ValueError(f"no folder {split!r} in data path {root}: it contains {held}; {LAYOUT}")
    return found


class FileSource(ImageSource):
    """Image files of a listing.

    Args:
        folder: the folder that the names are relative to.
        listing: names of files.
        labels: their classes.
        exif: whether to apply the EXIF orientation.
    """

    def __init__(self, folder: Path, listing: Listing, labels: np.ndarray, *, exif: bool = False) -> None:
        self._folder = os.fsencode(folder)
        self._listing = listing
        self._exif = exif
        self.labels = labels

    def get(self, index: int) -> StoredImage:
        """Return the bytes of a file; raises `UnreadableImage`."""
        path = os.fsdecode(os.path.join(self._folder, self._listing.name(index)))  # noqa: PTH118 - bytes, and faster
        return StoredImage(read_file(path), path, exif=self._exif)

    def file_name(self, index: int) -> str:
        return Path(os.fsdecode(self._listing.name(index))).name


@functools.cache
def image_extensions() -> frozenset[str]:
    """Return the file extensions that Pillow can open, in lower case."""
    Image.init()
    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN and name not in _STUBS
    )


def list_images(folder: Path) -> Listing:
    """Return the images of the class folders in `folder` with their labels; its `about` names the classes.

    Files are not opened. A long list is cached in a file until a folder or the list of its classes changes, so that the
    processes of a machine build it once and share it. If the cache cannot be written, every process builds its own.

    Raises:
        ValueError: the folder has no classes, a class has no images, or something cannot be read.
    """
    with process_lock(folder):
        path = cache_folder() / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.index"
        if path.exists() and _is_current(listing := Listing.load(path), folder):
            return listing
        listing = _scan(folder)
        return listing if len(listing) < SHARED_FROM else listing.shared(path)


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`, without hidden ones and those of operating systems."""
    entries = [entry for entry in _entries(folder) if not is_system_file(PurePath(entry.name))]
    dangling = [entry.path for entry in entries if entry.is_symlink() and not Path(entry.path).exists()]
    if dangling:
        raise ValueError(f"{shorten(dangling)} is a broken link; repair or remove it")
    return sorted(entry.name for entry in entries if entry.is_dir())


def _scan(folder: Path) -> Listing:
    """List the images of all class folders, or of a folder with a list of classes."""
    about: dict[str, Any] = {"scanned": time.time_ns(), "folders": [[".", folder.stat().st_mtime_ns]]}
    if not (classes := class_folders(folder)):
        about["lists"] = _lists(folder)
        if not (truth := read_ground_truth(folder)):
            raise ValueError(f"no class folders in {folder}; {LAYOUT}")
        about["classes"] = sorted(set(truth.values()))
        about["numbered"] = all(name.isdecimal() for name in about["classes"])
        labels = {name: label for label, name in enumerate(about["classes"])}
        rows = ((os.fsencode(name), labels[truth[name]]) for name in sorted(truth))
        return Listing.of(rows, {"label": np.int32}, about | {"skipped": {}})
    skipped: Counter[str] = Counter()
    empty: dict[str, Counter[str]] = {}
    listing = Listing.of(_rows(folder, classes, about["folders"], skipped, empty), {"label": np.int32}, about)
    if empty:
        others = sum(empty.values(), Counter())
        held = f"they contain {count_by_extension(others)}; " if others else ""
        raise ValueError(
            f"no images in {shorten(list(empty))}; add some or remove the folder ({held}images end in .jpg, .png or "
            f"another of the {len(image_extensions())} extensions that Pillow reads)"
        )
    about |= {"classes": classes, "skipped": dict(skipped)}
    return listing


def _rows(
    folder: Path,
    classes: Sequence[str],
    folders: list[list[Any]],
    skipped: Counter[str],
    empty: dict[str, Counter[str]],
) -> Iterator[tuple[bytes, int]]:
    """Yield names and labels of the images below `folder`; record folders, skipped extensions and empty classes."""
    readable = image_extensions()
    above = os.path.join(folder, "")  # noqa: PTH118 - Path would drop a "." or double the slash of "/"
    prefix = len(above)
    for label, name in enumerate(classes):
        count, others = 0, Counter()
        for parent, below, files in os.walk(above + name, followlinks=True, onerror=_refuse):
            below[:] = sorted(
                inner for inner in below if not is_system_file(PurePath(inner)) and not _leads_up(parent, inner)
            )
            folders.append([parent[prefix:], Path(parent).stat().st_mtime_ns])
            for file in sorted(files):
                if file.startswith("."):
                    continue
                if (ending := extension_of(Path(file))) in readable:
                    count += 1
                    yield os.fsencode(f"{parent[prefix:]}/{file}"), label
                else:
                    others[ending] += 1
        skipped.update(others)
        if not count:
            empty[f"{folder / name}"] = others


def _leads_up(parent: str, name: str) -> bool:
    """Return whether a folder is a link to one of its parents, which would be an endless recursion.

    These are the folders that were followed to it, some of which may be links, and those that contain it.
    """
    path = Path(parent, name)
    if not path.is_symlink():
        return False
    target, containing = path.resolve(), path.parent.resolve()
    return target in (containing, *containing.parents) or any(
        target == followed.resolve() for followed in path.absolute().parents
    )


def _by_number(numbers: Sequence[str], classes: Sequence[str], folder: Path) -> list[str]:
    """Return the class names for the indices in a list of classes."""
    beyond = [number for number in numbers if int(number) >= len(classes)]
    if beyond:
        raise ValueError(f"the list of classes for {folder} has class {shorten(beyond)}, of {len(classes)} from 0 on")
    return [classes[int(number)] for number in numbers]


def _is_current(listing: Listing, folder: Path) -> bool:
    """Return whether nothing that the listing was read from has changed since, by the time stamps of files."""
    before = listing.about["scanned"] - 2 * 10**9  # a change within the clock resolution would be missed
    try:
        # A list of classes is only used for images in one folder, whose listing says whether they are numbered.
        lists = _lists(folder) if "numbered" in listing.about else []
        folders = ((folder / name).stat().st_mtime_ns == changed < before for name, changed in listing.about["folders"])
        return all(folders) and listing.about.get("lists", []) == lists and all(stamp < before for _, stamp in lists)
    except OSError:
        return False


def _lists(folder: Path) -> list[list[Any]]:
    """Return the paths and time stamps of the files that name the classes of the images in one folder."""
    return [[str(path.resolve()), path.stat().st_mtime_ns] for path in find_lists(folder)]


def is_system_file(path: PurePath) -> bool:
    """Return whether a path within a data set is hidden, or in a folder of an operating system or network storage."""
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in path.parts)


def select_images(folder: Path, *, below: bool) -> tuple[list[Path], Counter[str]]:
    """Return the files that Pillow can open, in order, and the number of other files by extension.

    Args:
        folder: where the files are; those of the system are left out.
        below: whether folders inside are searched, too.
    """
    paths = sorted(folder.rglob("*") if below else folder.iterdir())
    files = [path for path in paths if not is_system_file(path.relative_to(folder)) and path.is_file()]
    skipped = Counter(ending for path in files if (ending := extension_of(path)) not in image_extensions())
    return [path for path in files if extension_of(path) in image_extensions()], skipped


def extension_of(path: PurePath) -> str:
    """Return the extension of a file in lower case, or "without extension"."""
    return path.suffix.lower() or "without extension"


def skipped_files(place: Path, skipped: Mapping[str, int] | None) -> str:
    """Return a warning that counts the skipped files of a split by extension.

    Args:
        place: folder or archive of the split.
        skipped: number of files by extension; None for a list written by an older version.

    Returns:
        The warning; empty if no file is skipped or the number is unknown.
    """
    if not skipped:
        return ""
    files = counted(sum(skipped.values()), "file")
    return f"{files} skipped in {place}, with extensions that Pillow does not read: {count_by_extension(skipped)}"


def count_by_extension(skipped: Mapping[str, int]) -> str:
    """Return the number of files with each extension as text, the most frequent ones first."""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return shorten([f"{count} {extension}" for extension, count in ordered])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(f"cannot read folder {error.filename}: {error.strerror}; {LAYOUT}") from None
