"""Seeding and preserving global generators, for transforms that draw from them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# timm and torchvision draw from numpy's global generator.
# ruff: noqa: NPY002


def seed_generators(*entropy: int) -> None:
    """Seed the global generators of Python, numpy and torch (that of the CPU) from whole numbers."""
    words = np.random.SeedSequence(entropy).generate_state(4, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:3].view(np.uint32))
    torch.default_generator.manual_seed(int(words[3]))  # torch.manual_seed would seed those of GPUs too


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Restore the state of the global generators of Python, numpy and torch on exit."""
    state = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.default_generator.set_state(state[2])
