"""Generated images and image folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from config import default_config
from data import build


def photograph(seed: int = 0, width: int = 48, height: int = 36) -> Image.Image:
    """Return an image that is smooth, colourful and different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(root: Path, layout: dict[str, int]) -> Path:
    """Write as many images as `layout` says into each folder, named as in "train/cat", and return `root`."""
    seed = 0
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            photograph(seed).save(root / folder / f"{number}.jpg")
            seed += 1
    return root


def small_config(root: Path | None = None, **data: object):  # noqa: ANN201
    """Return a config for images of 32 pixels in batches of 4; of the digits, or of the folder `root`."""
    config = default_config()
    config.DATA.DATASET = "imagenet" if root else "digits"
    config.DATA.DATA_PATH = str(root or "")
    config.DATA.IMG_SIZE = 32
    config.DATA.BATCH_SIZE = 4
    config.DATA.NUM_WORKERS = 0
    for name, value in data.items():
        config.DATA[name] = value
    return config


def build_train_loader(config: CfgNode, *, rank: int, world_size: int) -> DataLoader:
    """Open the training images of a config and return their loader."""
    return build.build_train_loader(config, build.open_dataset(config, ("train",)), rank=rank, world_size=world_size)


def build_eval_loader(config: CfgNode, *, rank: int, world_size: int) -> DataLoader:
    """Open the held-out images of a config and return their loader."""
    return build.build_eval_loader(config, build.open_dataset(config, ("val",)), rank=rank, world_size=world_size)
