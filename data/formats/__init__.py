"""One module per data format, and the values of `DATA.DATASET`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from data.formats.arrow import open_parquet, open_saved
from data.formats.digits import open_digits
from data.formats.folders import open_folders
from data.formats.published import open_cifar10, open_cifar100, open_fashion_mnist, open_mnist_digits
from data.formats.stream import open_stream
from data.formats.table import open_table
from data.formats.tar import open_tar
from data.sources import Dataset, Request

FORMATS: Mapping[str, Callable[[Request], Dataset]] = {
    "imagenet": open_folders,
    "csv": open_table,
    "tar": open_tar,
    "webdataset": open_stream,
    "parquet": open_parquet,
    "huggingface": open_saved,
    "cifar10": open_cifar10,
    "cifar100": open_cifar100,
    "mnist": open_mnist_digits,
    "fashion_mnist": open_fashion_mnist,
    "digits": open_digits,
}
