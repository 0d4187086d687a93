"""Augmentation of detection: boxes and masks stay where their objects are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from data.detection.transforms import EvalTransform, Pair, RandomShortSide, TrainTransform, to_target

SIZE = (120, 160)
PLACES = [(10, 12, 70, 60), (100, 5, 150, 50), (30, 70, 60, 110), (90, 60, 158, 118)]  # x1, y1, x2, y2
COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)


def painted() -> Pair:
    """Return a black image with four rectangles, each in the colour of its label."""
    image, masks = torch.zeros(3, *SIZE, dtype=torch.uint8), torch.zeros(4, *SIZE, dtype=torch.uint8)
    for (x1, y1, x2, y2), colour, mask in zip(PLACES, COLOURS, masks, strict=True):
        image[:, y1:y2, x1:x2] = colour[:, None, None]
        mask[y1:y2, x1:x2] = 1
    target = to_target(torch.tensor(PLACES, dtype=torch.float32), torch.arange(4), masks, SIZE)
    return tv_tensors.Image(image), target


def pixels_of(image: Tensor, label: int) -> Tensor:
    """Return the pixels whose colour is nearest to that of a label, `[h, w]`."""
    palette = torch.cat([COLOURS, torch.zeros(1, 3, dtype=torch.uint8)]).float()
    return (image.float().flatten(1).T - palette[:, None]).square().sum(2).argmin(0).view(image.shape[1:]) == label


@pytest.mark.parametrize("crop_sides", [[], [100, 130]])
@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_objects_keep_their_pixels(crop_sides: list[int], hflip: float) -> None:
    transform = TrainTransform(short_sides=[96, 144], long_side=200, crop_sides=crop_sides, crop=(60, 110), hflip=hflip)
    seen = removed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = transform(*painted())
        assert target["masks"].shape[1:] == image.shape[1:]
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            there = pixels_of(image, int(label))
            perimeter = 2 * (there.any(0).sum() + there.any(1).sum())
            assert (there ^ (mask > 0)).sum() <= 2 * perimeter, (seed, int(label))  # masks are not interpolated
            torch.testing.assert_close(box, masks_to_boxes(there[None])[0] + torch.tensor([0, 0, 1, 1]), atol=2, rtol=0)
        gone = set(range(4)) - set(target["labels"].tolist())
        slivers = (pixels_of(image, label) for label in gone)  # the rest of a box below a pixel, before it was enlarged
        assert all(min(rest.any(0).sum(), rest.any(1).sum()) <= 4 for rest in slivers)
        seen, removed = seen + len(target["boxes"]), removed + len(gone)
    assert seen >= 40
    assert bool(removed) == bool(crop_sides)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_thin_images_keep_a_pixel_and_do_not_grow_without_limit(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, resize = [], RandomShortSide.transform
    monkeypatch.setattr(RandomShortSide, "transform", lambda *args: sizes.append(args[2]["size"]) or resize(*args))
    image, box = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8)), torch.tensor([[0.0, 0, size[1], size[0]]])
    assert min(EvalTransform(short_side=800, long_side=1333)(image).shape) == 1
    transform = TrainTransform(short_sides=[800], long_side=1333, crop_sides=[600], crop=(384, 600), hflip=0.0)
    for seed in range(8):
        torch.manual_seed(seed)
        pixels, target = transform(image, to_target(box, torch.zeros(1, dtype=torch.int64), None, size))
        assert min(pixels.shape) >= 1
        assert max(pixels.shape) <= 1333
        assert len(target["boxes"]) <= 1
    assert max(max(size) for size in sizes) < 10_000


def test_usual_images_are_resized_as_by_torchvision_which_rounds_down() -> None:
    for height, width in ((480, 640), (333, 500), (1080, 1920), (500, 100)):
        blank = tv_tensors.Image(torch.zeros(1, height, width, dtype=torch.uint8))
        for sides, longest in (([480, 512, 800], 1333), ([400, 500, 600], 5332)):
            torch.manual_seed(height)
            expected = v2.RandomShortestSize(sides, max_size=longest).make_params([blank])["size"]
            torch.manual_seed(height)
            size = RandomShortSide(sides, longest).make_params([blank])["size"]
            assert all(0 <= one - other <= 1 for one, other in zip(size, expected, strict=True))


def test_the_short_side_or_the_long_one_is_exact() -> None:
    resize = RandomShortSide([800], 1333)
    for height in range(200, 641):
        sizes = []
        for width in (height * 3 // 2, 2 * height):
            blank = tv_tensors.Image(torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, height, width))
            sizes.append(resize.make_params([blank])["size"])
        (short, long), (limited, longest) = sizes
        assert (short, longest) == (800, 1333)
        assert abs(long - 800 * (height * 3 // 2) / height) <= 0.5
        assert limited in (666, 667)


def test_a_flip_moves_boxes_to_the_other_side() -> None:
    transform = TrainTransform(short_sides=[SIZE[0]], long_side=1000, crop_sides=[], crop=(1, 1), hflip=1.0)
    _, target = transform(*painted())
    expected = [[SIZE[1] - x2, y1, SIZE[1] - x1, y2] for x1, y1, x2, y2 in PLACES]
    torch.testing.assert_close(target["boxes"].as_subclass(Tensor), torch.tensor(expected, dtype=torch.float32))


def test_masks_are_not_shifted() -> None:
    masks = tv_tensors.Mask(torch.randint(2, (3, 60, 96), dtype=torch.uint8))
    resized = RandomShortSide([20], 100)(masks)
    assert torch.equal(resized, masks[:, 1::3, 1::3])  # the middle of each three pixels
