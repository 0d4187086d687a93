"""Small checkpoints and images for the tests of tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from yacs.config import CfgNode

from config import load_config
from models.build import build_model
from tests.runs import write_config

CLASSES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay"]


def tiny_config(folder: Path) -> CfgNode:
    """Return the tiny config with two offset groups in the last stages."""
    path = write_config(folder)
    return load_config(path, ["MODEL.DAT.groups", "[1, 1, 2, 2]", "MODEL.DAT.heads", "[1, 2, 4, 4]"])


def write_checkpoint(folder: Path, *, ema: bool = False, num_classes: int = 10, **changes: Any) -> Path:
    """Write a checkpoint of the trainer's format with random weights, optionally with different `ema` weights."""
    config = tiny_config(folder)
    config.MODEL.DAT.num_classes = num_classes
    torch.manual_seed(1)
    states = [build_model(config).state_dict() for _ in range(2)]
    path = folder / "best.pth"
    checkpoint = {
        "format": 1,
        "model": states[0],
        "ema": states[1] if ema else None,
        "classes": CLASSES,
        "config": config.dump(),
    }
    torch.save(checkpoint | changes, path)
    return path


def write_photograph(path: Path, *, size: tuple[int, int] = (60, 40), seed: int = 0) -> Path:
    """Write an image of random patches, `size` is width and height."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(path)
    return path
