"""The same data set in every format: each writer converts class folders."""

from __future__ import annotations

import csv
import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

SPLITS = ("train", "val")


def images(photos: Path, split: str) -> Iterator[tuple[Path, str, int]]:
    """Yield path, class and label of every image of a part in the order of the folders."""
    classes = sorted(folder.name for folder in (photos / "train").iterdir())
    for folder in sorted((photos / split).iterdir()):
        for path in sorted(folder.iterdir()):
            yield path, folder.name, classes.index(folder.name)


def write_csv(photos: Path, root: Path) -> Path:
    """Write two tables without titles."""
    root.mkdir()
    for split in SPLITS:
        with (root / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows((path, name) for path, name, _ in images(photos, split))
    return root


def write_one_csv(photos: Path, root: Path) -> Path:
    """Write one table with titles, columns in another order and a column of parts."""
    root.mkdir()
    with (root / "all.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Label", "width", "Path", "split"])
        for split, part in (("train", "train"), ("val", "test")):
            writer.writerows((name, 48, path, part) for path, name, _ in images(photos, split))
    return root / "all.csv"


def write_tsv(photos: Path, root: Path) -> Path:
    """Write tables of tabs, relative paths and numbers, and the list of classes."""
    root.mkdir()
    (root / "photos").symlink_to(photos)
    for split in SPLITS:
        lines = [f"photos/{path.relative_to(photos)}\t{label}\n" for path, _, label in images(photos, split)]
        (root / f"{split}.tsv").write_text("".join(lines))
    (root / "classes.txt").write_text("".join(f"{folder.name}\n" for folder in sorted((photos / "train").iterdir())))
    return root


def write_tar(photos: Path, root: Path) -> Path:
    """Write one archive for each part, in an order that is not sorted."""
    root.mkdir()
    for split in SPLITS:
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            for path, name, _ in reversed(list(images(photos, split))):
                archive.add(path, f"./{name}/{path.name}")
    return root


def write_one_tar(photos: Path, root: Path) -> Path:
    """Write both parts into one archive, below a folder."""
    root.mkdir()
    with tarfile.open(root / "photos.tar", "w") as archive:
        archive.add(photos, "some/photos")
    return root / "photos.tar"


def write_shards(photos: Path, root: Path, size: int = 3) -> Path:
    """Write shards of a few images in WebDataset's layout."""
    root.mkdir()
    for split in SPLITS:
        rows = list(images(photos, split))
        for number, first in enumerate(range(0, len(rows), size)):
            with tarfile.open(root / f"{split}-{number:06}.tar", "w") as archive:
                for index, (path, _, label) in enumerate(rows[first : first + size], first):
                    add_bytes(archive, f"{index:08}.jpg", path.read_bytes())
                    add_bytes(archive, f"{index:08}.cls", str(label).encode())
    (root / "classes.txt").write_text("".join(f"{folder.name}\n" for folder in sorted((photos / "train").iterdir())))
    return root


def add_bytes(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def idx(values: np.ndarray) -> bytes:
    """Return an array of bytes as an IDX file."""
    return struct.pack(f">{values.ndim + 1}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


def write_parquet(photos: Path, root: Path) -> Path:
    """Write Parquet files as the Hub keeps them."""
    (root / "data").mkdir(parents=True)
    for split, table in _tables(photos).items():
        table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def write_saved(photos: Path, root: Path) -> Path:
    """Write a data set of Hugging Face."""
    from datasets import DatasetDict

    tables = _tables(photos)
    DatasetDict({"train": tables["train"], "validation": tables["val"]}).save_to_disk(root)
    return root


def _tables(photos: Path) -> dict:
    from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars

    disable_progress_bars()
    tables = {}
    for split in SPLITS:
        rows = list(images(photos, split))
        names = sorted(folder.name for folder in (photos / "train").iterdir())
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        values = {
            "image": [{"bytes": path.read_bytes(), "path": None} for path, *_ in rows],
            "label": [label for *_, label in rows],
        }
        tables[split] = Dataset.from_dict(values, features=features)
    return tables


# DATA.DATASET and the writer, by the name of the test.
WRITERS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "csv": ("csv", write_csv),
    "one csv": ("csv", write_one_csv),
    "tsv": ("csv", write_tsv),
    "tar": ("tar", write_tar),
    "one tar": ("tar", write_one_tar),
    "shards": ("tar", write_shards),
    "parquet": ("parquet", write_parquet),
    "huggingface": ("huggingface", write_saved),
}


def dump(path: Path, content: dict) -> str:
    """Write an object and return the checksum of the file."""
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write 20 training and 4 test images as CIFAR-10 is published, let torchvision accept them, return the folder."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng, sums = np.random.default_rng(0), {}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        sums[name] = dump(folder / name, {"data": pixels, "labels": rng.integers(0, 10, 4).tolist()})
    sums["batches.meta"] = dump(folder / "batches.meta", {"label_names": [f"class {number}" for number in range(10)]})
    lists = [[n, s] for n, s in sums.items() if n.startswith("data")], [["test_batch", sums["test_batch"]]]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", lists[0])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", lists[1])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]})
    return folder
