"""Outputs of the published implementation, and the deterministic weights and inputs that they were made with.

Weights and inputs are not stored: they follow from the names and shapes of the state dict, so that any implementation
with the published names gets the same values. ``cases/NAME.json`` holds constructor arguments, input shape, state dict
and gradient norms, ``cases/NAME.npz`` logits, loss and samples of the stages' outputs in float64; ``modules`` holds the
learned-query attention alone, ``recipe.json`` learning rates, parameter groups and evaluation tensors.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent
CASES = sorted(path.stem for path in (FOLDER / "cases").glob("*.json"))
MODULES = sorted(path.stem for path in (FOLDER / "modules").glob("*.json"))

TABLES = ("rpb", "rpe_table", "relative_position_bias_table")


def load(kind: str, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Return what is known about a case: its description and its arrays."""
    with np.load(FOLDER / kind / f"{name}.npz") as arrays:
        return json.loads((FOLDER / kind / f"{name}.json").read_text()), dict(arrays)


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal noise that depends on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def value_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float64 value of the parameter ``name``; its scale follows the parameter's role."""
    noise = normal(name, shape)
    is_gain = name.endswith("norm.weight") or (name.endswith(".weight") and len(shape) == 1)
    if is_gain:
        return 1.0 + 0.1 * noise
    if any(table in name for table in TABLES):
        return 0.5 * noise
    if len(shape) == 1:
        return 0.02 * noise
    gain = 0.3 if "conv_offset.3" in name else 1.0
    return gain * noise / math.sqrt(math.prod(shape[1:]))


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """Give every trainable parameter of ``module``, and the offset networks', its value; the rest stays as it is."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or "conv_offset" in name:
            parameter.copy_(torch.from_numpy(value_of(name, tuple(parameter.shape))))
    return module


def image_batch(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the float64 images ``[B, 3, H, W]`` of the case ``name``."""
    return torch.from_numpy(normal(f"input:{name}", tuple(shape)))


def labels(batch: int, num_classes: int) -> Tensor:
    """Return the targets whose cross-entropy gives the golden gradients."""
    return torch.arange(batch) * 7 % num_classes
