"""One module for each format that a data set may be stored in, and the names of `DATA.DATASET`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from data.formats.digits import open_digits
from data.formats.folders import open_folders
from data.sources import Dataset, Request

FORMATS: Mapping[str, Callable[[Request], Dataset]] = {
    "imagenet": open_folders,
    "digits": open_digits,
}
