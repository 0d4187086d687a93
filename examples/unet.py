"""U-Net of segmentation-models-pytorch on a DAT: one training step, then a class for each pixel.

.venv/bin/python -m examples.unet
"""

from __future__ import annotations

from typing import Any

import segmentation_models_pytorch as smp
import torch

import models  # noqa: F401  registers the names with timm


def main(name: str = "dat_tiny", *, size: int = 256, **options: Any) -> smp.Unet:
    """Train a segmenter of two classes for one step on two images, and return it."""
    segmenter = smp.Unet(f"tu-{name}", encoder_weights=None, classes=2, **options)
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-4, weight_decay=0.05)
    images = torch.rand(2, 3, size, size)
    labels = (torch.arange(size) < size // 2).long().expand(2, size, size)
    loss = smp.losses.DiceLoss("multiclass")(segmenter(images), labels)
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")

    with torch.no_grad():
        labels = segmenter.eval()(images[:1]).argmax(1)
    print(f"shares of the classes by an untrained segmenter: {labels.flatten().bincount(minlength=2) / size**2}")
    return segmenter


if __name__ == "__main__":
    main()
