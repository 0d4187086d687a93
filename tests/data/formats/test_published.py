"""CIFAR and MNIST in their published layout, with small files."""

from __future__ import annotations

import gzip
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from data.formats.published import open_cifar10, open_cifar100, open_fashion_mnist, open_mnist_digits
from data.sources import Dataset, Request
from tests.data.formats.writers import idx, write_cifar10


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_cifar10(tmp_path, monkeypatch)


def test_cifar10(cifar10: Path) -> None:
    for path in (cifar10, cifar10.parent):
        dataset = open_cifar10(Request(path=str(path)))
        assert [len(dataset.train), len(dataset.held_out), len(dataset.classes)] == [20, 4, 10]
    batch = pickle.loads((cifar10 / "data_batch_1").read_bytes())
    expected = batch["data"][1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(dataset.train.read(1)), expected)
    assert dataset.train.label(1) == batch["labels"][1]


def test_cifar10_that_is_missing_or_damaged(cifar10: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no CIFAR10 in .*nowhere: Dataset not found .*DATA\.DOWNLOAD True"):
        open_cifar10(Request(path=str(tmp_path / "nowhere")))
    (cifar10 / "data_batch_3").write_bytes(b"no batch")
    with pytest.raises(ValueError, match=r"no CIFAR10 in .* corrupted"):
        open_cifar10(Request(path=str(cifar10)))
    with pytest.raises(ValueError, match=r"no CIFAR100 in .*; DATA_PATH holds cifar-100-python as https.* unpacks"):
        open_cifar100(Request(path=str(tmp_path)))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 6), ("t10k", 3)):
        images, labels = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8), np.arange(count, dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_mnist(mnist: Path) -> None:
    dataset = open_mnist_digits(Request(path=str(mnist)))
    assert [len(dataset.train), len(dataset.held_out)] == [6, 3]
    assert dataset.train.read(2).size == (28, 28)
    assert [dataset.held_out.label(index) for index in range(3)] == [0, 1, 2]
    assert open_fashion_mnist(Request(path=str(mnist))).classes[0] == "T-shirt/top"


def test_mnist_that_is_missing_or_damaged(mnist: Path, tmp_path: Path) -> None:
    content = (mnist / "train-labels-idx1-ubyte").read_bytes()
    for wrong, says in (
        (content[:-1], "truncated, or not an IDX file of 1 dimensions"),
        (content[:2], "cannot be read"),
        (idx(np.zeros(5, np.uint8)), "train has 6 images, but 5 labels"),
        (idx(np.zeros((6, 1), np.uint8)), "not an IDX file of 1 dimensions"),
    ):
        (mnist / "train-labels-idx1-ubyte").write_bytes(wrong)
        with pytest.raises(ValueError, match=says):
            open_mnist_digits(Request(path=str(mnist)))
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"no file t10k-labels-idx1-ubyte in .*DATA.DOWNLOAD True"):
        open_mnist_digits(Request(path=str(mnist), needs=("val",)))


@pytest.mark.parametrize("open_it", [open_cifar10, open_mnist_digits])
def test_download_that_fails_is_reported_in_one_line(
    open_it: Callable[[Request], Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading\nTried https://mirror, got: no route to host")

    for kind in (datasets.CIFAR10, datasets.MNIST):
        monkeypatch.setattr(kind, "download", fail)
    with pytest.raises(ValueError, match=r"cannot be downloaded to .*: Error downloading Tried .* host; copy it there"):
        open_it(Request(path=str(tmp_path), download=True))


def test_processes_download_one_after_the_other(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = most = 0

    def download(*_: object) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.1)
        now -= 1

    monkeypatch.setattr(datasets.MNIST, "download", download)
    monkeypatch.setattr(datasets.MNIST, "_check_exists", lambda _: True)
    monkeypatch.setattr(datasets.MNIST, "_load_data", lambda _: (None, None))
    with ThreadPoolExecutor(3) as processes:
        list(processes.map(open_mnist_digits, 3 * [Request(path=str(mnist), download=True)]))
    assert most == 1


def test_mnist_with_a_damaged_compressed_file(mnist: Path) -> None:
    path = mnist / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[:10] + b"\xff" * 10 + content[20:])  # the header is whole
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read: .*; download it again"):
        open_mnist_digits(Request(path=str(mnist)))
