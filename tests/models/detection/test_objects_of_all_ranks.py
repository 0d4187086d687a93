"""Losses are divided by the objects of all ranks, not by those of a rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models import ranks
from models.backbone import DATBackbone
from models.detection.transformers_kinds import KINDS
from models.segmentation import SEGMENTERS
from tests.models.detection.small import two_images
from tests.models.detection.test_transformers_detectors import small_detector
from tests.models.small import SMALL

# Means over queries and mask areas, which are not divided by the number of objects.
MEANS = {"detr": {"ce"}, "d_fine": {"ddf"}, "mask2former": {"class"}}


def losses_with(
    model: nn.Module, batch: tuple, mean: float, patch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], int]:
    """Return losses as if ranks had ``mean`` objects on average, and the number of averages over ranks."""
    averaged = []
    patch.setattr(ranks, "mean_over_ranks", lambda count: averaged.append(count) or torch.tensor(mean))
    torch.manual_seed(1)
    return model(*batch), len(averaged)


def check(name: str, model: nn.Module, batch: tuple, own: int, patch: pytest.MonkeyPatch) -> None:
    alone, count = losses_with(model, batch, own, patch)
    assert count == 1
    for mean, scale in ((2.5 * own, 0.4), (0.5, own)):  # at least one object
        for term, loss in losses_with(model, batch, mean, patch)[0].items():
            factor = 1 if term in MEANS.get(name, ()) else scale
            torch.testing.assert_close(loss, alone[term] * factor, msg=lambda text, term=term: f"{term}: {text}")


@pytest.mark.parametrize("name", KINDS)
def test_detectors_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, small_detector(name), two_images(), 2, monkeypatch)


@torch.no_grad()
def test_losses_averaged_over_ranks_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, targets) = small_detector("conditional_detr", dropout=0.0), two_images()
    assert [len(target["boxes"]) for target in targets] == [2, 0]
    whole = losses_with(model, (images, targets), 2, monkeypatch)[0]
    ranks = [losses_with(model, ([x], [y]), 1, monkeypatch)[0] for x, y in zip(images, targets, strict=True)]
    for term, loss in whole.items():
        torch.testing.assert_close((ranks[0][term] + ranks[1][term]) / 2, loss)


def test_mask2former(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 32}
    layers = {"encoder_feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 6}
    backbone = DATBackbone(**SMALL, stage_spec=list("NNDD"))
    model = SEGMENTERS["mask2former"](backbone, num_classes=3, **sizes, **layers, train_num_points=32)
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[0, :32], labels[1, :, :16] = 1, 2
    check("mask2former", model, (torch.rand(2, 3, 64, 64), labels), 4, monkeypatch)
