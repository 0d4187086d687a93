"""Anchors and pooling of regions: values of their definitions, and their precision under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from models.detection.mask_rcnn import MaskRCNN
from models.detection.pyramid import AlignedPool, Anchors
from models.detection.retinanet import RetinaNet
from tests.models.detection.small import small_backbone

STRIDES = [4, 8, 16, 32]


def anchors_of(anchors: Anchors, sizes: list[tuple[int, int]]) -> Tensor:
    """Return the anchors of an image for maps of these heights and widths."""
    (found,) = anchors(ImageList(torch.zeros(1, 3, 1, 1), [(1, 1)]), [torch.zeros(1, 1, *size) for size in sizes])
    return found


def columns(height: int, width: int, stride: int) -> Tensor:
    """Return a map of the horizontal coordinates of its pixels in the image, ``[1, 1, height, width]``."""
    return ((torch.arange(width) + 0.5) * stride).expand(1, 1, height, width)


def test_anchors_of_retinanet() -> None:
    sizes = [(3, 4), (2, 2), (1, 2), (1, 1), (1, 1)]
    detector = RetinaNet(small_backbone(1, 2, 3), num_classes=3, channels=16)
    found = anchors_of(detector.anchors, sizes)
    assert found.shape == (9 * (12 + 4 + 2 + 1 + 1), 4)
    # Half the width and half the height: ratios 1:2, 1:1 and 2:1 of areas 32, 40.3175 and 50.7968 squared.
    halves = torch.tensor(
        [
            [22.62742, 11.31371],
            [28.50876, 14.25438],
            [35.91879, 17.95939],
            [16.0, 16.0],
            [20.15874, 20.15874],
            [25.39842, 25.39842],
            [11.31371, 22.62742],
            [14.25438, 28.50876],
            [17.95939, 35.91879],
        ]
    )
    around_origin = torch.cat([-halves, halves], dim=1)
    torch.testing.assert_close(found[:9], around_origin, rtol=0, atol=1e-4)
    row_1_column_2 = around_origin + torch.tensor([16.0, 8.0, 16.0, 8.0])
    torch.testing.assert_close(found[9 * 6 : 9 * 7], row_1_column_2, rtol=0, atol=1e-4)
    for first, factor in ((12, 2), (16, 4), (18, 8), (19, 16)):  # first pixels of the other maps
        torch.testing.assert_close(found[9 * first : 9 * first + 9], around_origin * factor, rtol=0, atol=1e-3)


def test_anchors_of_region_proposals() -> None:
    detector = MaskRCNN(small_backbone(0, 1, 2, 3), num_classes=3, channels=16, hidden=16)
    found = anchors_of(detector.rpn.anchor_generator, [(1, 1)] * 5)
    halves = torch.tensor([[22.62742, 11.31371], [16.0, 16.0], [11.31371, 22.62742]])
    expected = torch.cat([torch.cat([-halves, halves], dim=1) * factor for factor in (1, 2, 4, 8, 16)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_anchors_depend_on_the_stride_and_not_on_the_size_of_the_padded_image() -> None:
    # A map of stride 64 has 13 pixels for 800, so that the quotient would be 61.
    found = anchors_of(Anchors([64], scales=[8]), [(13, 13)])
    assert ((found[3 * 12, :2] + found[3 * 12, 2:]) / 2).tolist() == [12 * 64, 0]


@pytest.mark.parametrize(
    ("side", "level"),
    [(8, 0), (111, 0), (112, 1), (223, 1), (224, 2), (447, 2), (448, 3), (1000, 3)],
)
def test_regions_are_pooled_from_the_level_of_their_size(side: int, level: int) -> None:
    maps = {str(i): torch.full((1, 1, 1024 // stride, 1024 // stride), float(i)) for i, stride in enumerate(STRIDES)}
    maps["4"] = torch.full((1, 1, 16, 16), 4.0)  # only for proposals
    boxes = torch.tensor([[2.0, 3.0, 2 + side, 3 + side], [2.0, 3.0, 2 + side / 2, 3 + 2 * side]])
    boxes = boxes if 2 * side < 1000 else boxes[:1]  # the second one must lie in the image
    assert AlignedPool(2, STRIDES)(maps, [boxes]).unique().tolist() == [level]


def test_each_part_of_a_region_has_the_coordinate_of_its_centre() -> None:
    maps = {str(i): columns(512 // stride, 512 // stride, stride) for i, stride in enumerate(STRIDES)}
    boxes = torch.tensor([[100.5, 60.25, 170.5, 90.25], [200.0, 100.0, 426.0, 340.0]])
    pooled = AlignedPool(7, STRIDES)(maps, [boxes])
    for of_region, (left, _, right, _) in zip(pooled[:, 0], boxes.tolist(), strict=True):
        centres = left + (torch.arange(7) + 0.5) * (right - left) / 7
        torch.testing.assert_close(of_region, centres.expand(7, 7), rtol=0, atol=1e-3)


def test_regions_of_each_image_are_pooled_from_it() -> None:
    maps = {str(i): torch.arange(3.0)[:, None, None, None].expand(3, 1, 8, 8) for i in range(4)}
    boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
    pooled = AlignedPool(2, STRIDES)(maps, [boxes.repeat(2, 1), boxes[:0], boxes])
    assert pooled[:, 0, 0, 0].tolist() == [0, 0, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_round_the_coordinates_of_regions(dtype: torch.dtype) -> None:
    # The coordinates would be 1064 and 1112 in bfloat16, and 1068 and 1110 in float16. The map has no rounding error.
    ramp = (columns(4, 160, 8) / 8 - 134.5).to(dtype)
    boxes = torch.tensor([[1067.5, 4.0, 1109.5, 28.0]])
    pooled = AlignedPool(7, [8])({"0": ramp}, [boxes])
    assert pooled.dtype == dtype
    pixels = (pooled[0, 0, 0].float() + 134.5) * 8
    torch.testing.assert_close(pixels, 1067.5 + 6 * (torch.arange(7) + 0.5), rtol=0, atol=0.1)
