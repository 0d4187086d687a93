"""Knowledge distillation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.distillation import Distillation, Teacher

IMAGES = torch.rand(5, 3, 8, 8)


class Means(nn.Module):
    """Returns the means of the channels as logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_targets(temperature: float) -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    how = Distillation(teacher=Means(), kind="soft", share=0.25, temperature=temperature)
    parts = how.losses(torch.tensor(2.0), logits, IMAGES)
    p, q = ((x / temperature).softmax(1) for x in (IMAGES.mean((2, 3)), logits))
    assert parts["label_loss"].item() == 1.5
    expected = 0.25 * temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(parts["teacher_loss"], expected)
    same = how.losses(torch.tensor(0.0), IMAGES.mean((2, 3)), IMAGES)
    assert same["teacher_loss"].abs() < 1e-6


def test_hard_targets() -> None:
    logits = torch.randn(5, 3)
    how = Distillation(teacher=Means(), kind="hard", share=0.5, temperature=1.0)
    expected = 0.5 * F.cross_entropy(logits, IMAGES.mean((2, 3)).argmax(1))
    torch.testing.assert_close(how.losses(torch.tensor(0.0), logits, IMAGES)["teacher_loss"], expected)


def test_a_teacher_sees_images_of_its_size_in_its_normalisation() -> None:
    pixels = torch.rand(2, 3, 1, 1).expand(2, 3, 8, 8)
    ours = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    seen = []
    network = Means()
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher = Teacher(network, (16, 12), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5))
    torch.testing.assert_close(teacher(ours)[:, 0], (pixels[:, 0, 0, 0] - 0.5) / 0.25)
    assert seen[0].shape == (2, 3, 16, 12)
