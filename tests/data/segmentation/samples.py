"""Small folders of images and masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("sky", "sea", "sand")


def write_masks(
    root: Path,
    *,
    train: int = 8,
    val: int = 5,
    size: tuple[int, int] = (40, 48),
    values: Sequence[int] = (0, 1, 2, 255),
    parts: tuple[str, str] = ("train", "val"),
    masks: str = "masks",
) -> Path:
    """Write images of bands whose colour tells their class, with masks of those values, and return `root`."""
    rng = np.random.default_rng(0)
    for part, count in zip(parts, (train, val), strict=True):
        for folder in ("images", masks):
            (root / folder / part).mkdir(parents=True)
        for number in range(count):
            height, width = size[0] + number % 3, size[1]
            bands = np.sort(rng.integers(0, height, len(values) - 1))
            mask = np.array(values, dtype=np.uint8)[np.searchsorted(bands, np.arange(height), side="right")]
            mask = np.repeat(mask[:, None], width, axis=1)
            noise = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
            Image.fromarray((mask[..., None] % 7 * 30).astype(np.uint8) + noise).save(
                root / "images" / part / f"{number}.png"
            )
            Image.fromarray(mask).save(root / masks / part / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root
