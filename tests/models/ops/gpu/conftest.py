"""Tests of the Triton kernels: on a GPU if there is one, otherwise under Triton's interpreter, see `..test_gpu`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Plain operations in float32 are the reference; by default, cuDNN's convolutions use TF32."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with torch.device("cpu" if INTERPRETED else "cuda"):
        yield
