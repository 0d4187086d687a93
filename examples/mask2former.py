"""Mask2Former of Hugging Face's transformers on a DAT: one training step, then a class for each pixel.

.venv/bin/python -m examples.mask2former
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from models.hugging_face import DATConfig


def main(
    name: str = "dat_tiny", *, size: int = 256, options: dict[str, Any] | None = None, **mask2former: Any
) -> Mask2FormerForUniversalSegmentation:
    """Train a segmenter of two classes for one step on two images, and return it.

    Args:
        name: architecture of the backbone.
        size: side of the images in pixels.
        options: options of the backbone.
        **mask2former: options of `Mask2FormerConfig`.
    """
    backbone = DATConfig(architecture=name, options=options, out_indices=[0, 1, 2, 3])
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=2, num_queries=50, **mask2former)
    segmenter = Mask2FormerForUniversalSegmentation(config)
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-4, weight_decay=0.05)
    images = torch.rand(2, 3, size, size)
    left = (torch.arange(size) < size // 2).float().expand(size, size)
    masks, classes = torch.stack((left, 1 - left)), torch.tensor([0, 1])
    output = segmenter(images, mask_labels=[masks, masks], class_labels=[classes, classes])
    output.loss.backward()
    optimizer.step()
    print(f"loss {output.loss.item():.3f}")

    with torch.no_grad():
        output = segmenter.eval()(images[:1])
    (labels,) = Mask2FormerImageProcessor().post_process_semantic_segmentation(output, target_sizes=[(size, size)])
    print(f"shares of the classes by an untrained segmenter: {labels.flatten().bincount(minlength=2) / size**2}")
    return segmenter


if __name__ == "__main__":
    main()
