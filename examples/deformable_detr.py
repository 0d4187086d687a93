"""Deformable DETR of Hugging Face's transformers on a DAT: one training step, then boxes.

.venv/bin/python -m examples.deformable_detr
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DeformableDetrImageProcessor

from models.hugging_face import DATConfig


def main(
    name: str = "dat_tiny", *, size: int = 256, options: dict[str, Any] | None = None, **detr: Any
) -> DeformableDetrForObjectDetection:
    """Train a detector of two classes for one step on two images, and return it.

    Args:
        name: architecture of the backbone.
        size: side of the images in pixels.
        options: options of the backbone.
        **detr: options of `DeformableDetrConfig`.
    """
    backbone = DATConfig(architecture=name, options=options, out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(backbone_config=backbone, num_labels=2, num_queries=50, **detr)
    detector = DeformableDetrForObjectDetection(config)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-4, weight_decay=1e-4)
    images = torch.rand(2, 3, size, size)
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]])}  # cx, cy, w, h
    output = detector(images, labels=[target, target])
    output.loss.backward()
    optimizer.step()
    print(", ".join(f"{kind} {loss.item():.3f}" for kind, loss in output.loss_dict.items()))

    with torch.no_grad():
        output = detector.eval()(images[:1])
    processor = DeformableDetrImageProcessor()
    (found,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(size, size)])
    print(f"{len(found['boxes'])} boxes of an untrained detector, the best with score {found['scores'].max():.3f}")
    return detector


if __name__ == "__main__":
    main()
