"""CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST in their published files."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torchvision import datasets

from data.formats.folders import open_folders
from data.listing import process_lock
from data.sources import ArraySource, Dataset, Request


def open_cifar(dataset: type[datasets.CIFAR10], folder: str, request: Request) -> Dataset:
    """Open CIFAR-10 or CIFAR-100 from its Python version, or from class folders.

    Args:
        dataset: the class of torchvision that reads it.
        folder: its folder within the published archive.
        request: the data options of the run.

    Raises:
        ValueError: it is missing or damaged, cannot be downloaded, or a split is named.
    """
    layout = f"DATA_PATH holds {folder} as {dataset.url} unpacks, or folders of images train/<class> and val/<class>"
    root = request.root(layout)
    if (root / "train").is_dir() or (root / "val").is_dir():
        return open_folders(request)  # a copy of it as image files
    request.refuse_split_names(f"{dataset.__name__} in its published form")
    root = root.parent if root.name == folder else root
    if request.download:
        _download(dataset, root)
    classes, sources = [], {}
    for split in request.needs:
        try:
            images = dataset(str(root), train=split == "train")
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"no {dataset.__name__} in {root}: {str(error).split(' You can')[0]}; {layout}, or download it with "
                "--opts DATA.DOWNLOAD True"
            ) from None
        name = f"{dataset.__name__} {'train' if split == 'train' else 'test'} image"
        classes = list(images.classes)
        sources[split] = ArraySource(images.data, np.array(images.targets, dtype=np.int32), name)
    return Dataset(classes=classes, train=sources.get("train"), held_out=sources.get("val"))


def open_mnist(dataset: type[datasets.MNIST], request: Request) -> Dataset:
    """Open MNIST or Fashion-MNIST from its IDX files, compressed or not.

    Args:
        dataset: the class of torchvision that downloads it.
        request: the data options of the run.

    Raises:
        ValueError: it is missing or damaged, cannot be downloaded, or a split is named.
    """
    name = dataset.__name__
    layout = "DATA_PATH holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the two of t10k, with .gz or without"
    root = request.root(layout)
    request.refuse_split_names(name)
    if request.download:
        _download(dataset, root)
    folders, sources = (root, root / name / "raw", root / "raw"), {}
    for split in request.needs:
        prefix = {"train": "train", "val": "t10k"}[split]
        images = read_idx(_find(folders, f"{prefix}-images-idx3-ubyte", layout), 3)
        labels = read_idx(_find(folders, f"{prefix}-labels-idx1-ubyte", layout), 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{name} in {root}: {prefix} has {len(images)} images, but {len(labels)} labels; download again"
            )
        sources[split] = ArraySource(images, labels.astype(np.int32), f"{name} {prefix} image")
    return Dataset(classes=list(dataset.classes), train=sources.get("train"), held_out=sources.get("val"))


def _download(dataset: type[datasets.VisionDataset], root: Path) -> None:
    """Download a data set unless it is there. The processes of a machine do so one after the other.

    Raises:
        ValueError: the folder cannot be written, or there is no network connection.
    """
    try:
        with process_lock(root):
            dataset(str(root), download=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{dataset.__name__} cannot be downloaded to {root}: {' '.join(str(error).split())}; copy it there from "
            "another machine"
        ) from None


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the array of bytes in an IDX file.

    Raises:
        ValueError: the file is not an IDX file with this number of dimensions, or is truncated.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{dimensions + 1}I", content)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; download it again") from None
    values = np.frombuffer(content, np.uint8, offset=4 * (dimensions + 1))
    if magic != 0x800 + dimensions or len(values) != np.prod(shape):
        raise ValueError(f"{path} is truncated, or not an IDX file of {dimensions} dimensions; download it again")
    return values.reshape(shape)


def _find(folders: Sequence[Path], name: str, layout: str) -> Path:
    paths = [folder / f"{name}{ending}" for folder in folders for ending in ("", ".gz")]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise ValueError(f"no file {name} in {folders[0]}; {layout}, or download it with --opts DATA.DOWNLOAD True")
    return found


open_cifar10 = partial(open_cifar, datasets.CIFAR10, "cifar-10-batches-py")
open_cifar100 = partial(open_cifar, datasets.CIFAR100, "cifar-100-python")
open_mnist_digits = partial(open_mnist, datasets.MNIST)
open_fashion_mnist = partial(open_mnist, datasets.FashionMNIST)
