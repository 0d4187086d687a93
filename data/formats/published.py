"""CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST in their published files."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torchvision import datasets

from data.formats.folders import open_folders
from data.sources import ArraySource, Dataset, Request


def open_cifar(dataset: type[datasets.CIFAR10], folder: str) -> Callable[[Request], Dataset]:
    """Return the function that opens CIFAR-10 or CIFAR-100 from its Python version, or from class folders."""
    layout = f"DATA_PATH holds {folder} as {dataset.url} unpacks, or folders of images train/<class> and val/<class>"

    def open_part(request: Request, root: Path, *, train: bool) -> tuple[datasets.CIFAR10, ArraySource]:
        try:
            part = dataset(str(root), train=train, download=request.download)
        except (RuntimeError, OSError) as error:
            hint = "" if request.download else ", or download it with --opts DATA.DOWNLOAD True"
            raise ValueError(
                f"no {dataset.__name__} in {root}: {str(error).split(' You can')[0]}; {layout}{hint}"
            ) from None
        labels = np.array(part.targets, dtype=np.int32)
        return part, ArraySource(part.data, labels, f"{dataset.__name__} {'train' if train else 'test'} image")

    def opened(request: Request) -> Dataset:
        root = request.root(layout)
        if (root / "train").is_dir() or (root / "val").is_dir():
            return open_folders(request)  # a copy of it as image files
        root = root.parent if root.name == folder else root
        parts = {part: open_part(request, root, train=part == "train") for part in request.needs}
        classes = next(iter(parts.values()))[0].classes
        sources = {part: source for part, (_, source) in parts.items()}
        return Dataset(classes=list(classes), train=sources.get("train"), held_out=sources.get("val"))

    return opened


def open_mnist(dataset: type[datasets.MNIST]) -> Callable[[Request], Dataset]:
    """Return the function that opens MNIST or Fashion-MNIST from its IDX files, compressed or not."""
    name = dataset.__name__
    layout = "DATA_PATH holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the two of t10k, with .gz or without"

    def opened(request: Request) -> Dataset:
        root = request.root(layout)
        if request.download:
            dataset(str(root), download=True)
        sources = {}
        for part, prefix in (("train", "train"), ("val", "t10k")):
            if part in request.needs:
                places = (root, root / name / "raw", root / "raw")
                images = read_idx(_find(places, f"{prefix}-images-idx3-ubyte", layout), 3)
                labels = read_idx(_find(places, f"{prefix}-labels-idx1-ubyte", layout), 1)
                if len(images) != len(labels):
                    raise ValueError(
                        f"{name} in {root}: {prefix} has {len(images)} images, but {len(labels)} labels; download again"
                    )
                sources[part] = ArraySource(images, labels.astype(np.int32), f"{name} {prefix} image")
        return Dataset(classes=list(dataset.classes), train=sources.get("train"), held_out=sources.get("val"))

    return opened


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the array of bytes in an IDX file.

    Raises:
        ValueError: the file is not an IDX file with this number of dimensions, or is truncated.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{dimensions + 1}I", content)
    except (OSError, EOFError, struct.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; download it again") from None
    values = np.frombuffer(content, np.uint8, offset=4 * (dimensions + 1))
    if magic != 0x800 + dimensions or len(values) != np.prod(shape):
        raise ValueError(f"{path} is truncated, or not an IDX file of {dimensions} dimensions; download it again")
    return values.reshape(shape)


def _find(places: tuple[Path, ...], name: str, layout: str) -> Path:
    paths = [place / f"{name}{ending}" for place in places for ending in ("", ".gz")]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise ValueError(f"no file {name} in {places[0]}; {layout}, or download it with --opts DATA.DOWNLOAD True")
    return found


open_cifar10 = open_cifar(datasets.CIFAR10, "cifar-10-batches-py")
open_cifar100 = open_cifar(datasets.CIFAR100, "cifar-100-python")
open_mnist_digits = open_mnist(datasets.MNIST)
open_fashion_mnist = open_mnist(datasets.FashionMNIST)
