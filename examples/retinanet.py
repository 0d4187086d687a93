"""RetinaNet of torchvision, with a feature pyramid, on a DAT: one training step, then boxes.

.venv/bin/python -m examples.retinanet
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

import models  # noqa: F401  registers the names with timm


class Pyramid(nn.Module):
    """Maps of strides 8 to 128 with the same channels, of images ``[B, 3, H, W]``.

    Args:
        name: a model of timm.
        channels: channels of the maps.
        **options: options of the model.
    """

    def __init__(self, name: str, *, channels: int = 256, **options: Any) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3), **options)
        widths = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelP6P7(channels, channels))
        self.out_channels = channels  # read by torchvision

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): x for i, x in enumerate(self.body(images))})


def main(name: str = "dat_tiny", *, size: int = 256, channels: int = 256, **options: Any) -> RetinaNet:
    """Train a detector of two classes for one step on two images, and return it."""
    detector = RetinaNet(Pyramid(name, channels=channels, **options), 2, min_size=size, max_size=2 * size)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4, weight_decay=0.05)
    images = [torch.rand(3, size, size), torch.rand(3, size, 3 * size // 2)]
    box = {"boxes": torch.tensor([[0.1, 0.2, 0.8, 0.7]]) * size, "labels": torch.tensor([1])}
    losses = detector(images, [box, box])
    sum(losses.values()).backward()
    optimizer.step()
    print(", ".join(f"{kind} {loss.item():.3f}" for kind, loss in losses.items()))

    with torch.no_grad():
        (found,) = detector.eval()(images[:1])
    print(f"{len(found['boxes'])} boxes of an untrained detector")
    return detector


if __name__ == "__main__":
    main()
