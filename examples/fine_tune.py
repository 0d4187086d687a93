"""A model of timm by name: its features, a new head on a frozen network, saved for Hugging Face and loaded again.

.venv/bin/python -m examples.fine_tune dat_tiny output/fine_tune

Runs in this folder; elsewhere, install the package and replace `import models` by `import dat`.
"""

from __future__ import annotations

import sys

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import nn
from torchvision.transforms.functional import to_pil_image

import models  # noqa: F401  registers the names with timm


def main(
    name: str = "dat_tiny", folder: str = "output/fine_tune", *, size: int | None = None, classes: int = 3
) -> nn.Module:
    """Train a head on two images for one step, and return the network loaded from `folder`.

    Args:
        name: any model of timm.
        folder: folder for config and weights.
        size: side of the images in pixels; None for that of the model.
        classes: size of the logits.
    """
    backbone = timm.create_model(name, num_classes=0).eval()
    data = resolve_model_data_config(backbone, args={"img_size": size})
    transform = create_transform(**data, is_training=False)
    images = torch.stack([transform(to_pil_image(torch.rand(3, 300, 400))) for _ in range(2)])
    with torch.no_grad():
        print(f"{name}: {tuple(images.shape)} -> features {tuple(backbone(images).shape)}")

    model = timm.create_model(name, num_classes=classes).requires_grad_(False)
    head = model.get_classifier().requires_grad_(True)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    loss = F.cross_entropy(model(images), torch.arange(2))
    loss.backward()
    optimizer.step()

    save_for_hf(model, folder, safe_serialization=True)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        difference = (again(images) - model.eval()(images)).abs().max()
    print(f"loss {loss.item():.3f}; saved in {folder} and loaded again, largest difference {difference:.1g}")
    return again


if __name__ == "__main__":
    main(*sys.argv[1:3])
