"""Each transform, against an expectation computed another way."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torch import Tensor

from data.generators import seed_generators
from data.transforms import Transform, eval_transform, train_transform
from tests.data.samples import photograph

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def normalised(image: Image.Image) -> np.ndarray:
    """Return the pixels as `[3, H, W]`, normalised."""
    return ((np.asarray(image) / 255 - MEAN) / STD).transpose(2, 0, 1)


def plain_train_transform(img_size: int = 32, **options: object) -> Transform:
    """Return the training transform with everything off that `options` do not switch on."""
    off = {
        "interpolation": "bicubic",
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.0,
        "color_jitter": 0.0,
        "auto_augment": "",
        "reprob": 0.0,
        "remode": "pixel",
        "recount": 1,
    }
    return train_transform(img_size, **{**off, **options})


def draws(transform: Transform, image: Image.Image, count: int = 40) -> list[Tensor]:
    seed_generators(0)
    return [transform(image) for _ in range(count)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("img_size", "resized"), [(224, 256), (384, 438), (64, 73), (32, 36)])
def test_evaluation_crops_the_centre(img_size: int, resized: int, interpolation: str) -> None:
    image = photograph(width=300, height=170)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    edge = round((resized - img_size) / 2)
    expected = image.resize((resized, resized), filters[interpolation]).crop(
        (edge, edge, edge + img_size, edge + img_size)
    )
    tensor = eval_transform(img_size, interpolation=interpolation, crop=True)(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, img_size, img_size)
    np.testing.assert_allclose(tensor.numpy(), normalised(expected), atol=1e-5)


def test_evaluation_without_cropping() -> None:
    image = photograph(width=300, height=170)
    tensor = eval_transform(96, interpolation="bicubic", crop=False)(image)
    expected = image.resize((96, 96), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(tensor.numpy(), normalised(expected), atol=1e-5)


def test_training_with_everything_off_resizes() -> None:
    image = photograph(width=80, height=80)
    expected = normalised(image.resize((32, 32), Image.Resampling.BICUBIC))
    for tensor in draws(plain_train_transform(), image, 5):
        np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-5)


def test_flip() -> None:
    image = photograph(width=32, height=32)
    straight = torch.tensor(normalised(image), dtype=torch.float32)
    flips = [
        torch.allclose(t, straight.flip(2), atol=1e-5) for t in draws(plain_train_transform(hflip=0.3), image, 200)
    ]
    keeps = [torch.allclose(t, straight, atol=1e-5) for t in draws(plain_train_transform(hflip=0.3), image, 200)]
    assert all(flip != keep for flip, keep in zip(flips, keeps, strict=True))
    assert 0.2 < np.mean(flips) < 0.4


def test_crop_keeps_to_scale_and_ratio() -> None:
    # Red grows with x and green with y, so the range of each tells how much of it the crop shows.
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    tensors = draws(plain_train_transform(64, scale=(0.1, 0.3), ratio=(0.5, 2.0)), image, 100)
    spans = np.array([(t[:2].amax((1, 2)) - t[:2].amin((1, 2))).numpy() * STD[:2] for t in tensors])
    areas, ratios = spans.prod(axis=1), spans[:, 0] / spans[:, 1]
    assert 0.08 < areas.min() < 0.14
    assert 0.25 < areas.max() < 0.31
    assert 0.45 < ratios.min() < 0.65
    assert 1.6 < ratios.max() < 2.2
    starts = np.array([t[:2].amin((1, 2)).numpy() * STD[:2] + MEAN[:2] for t in tensors])
    assert starts.min() < 0.05
    assert (starts.max(axis=0) > 0.4).all()


def test_small_images_are_cropped_like_others() -> None:
    image = photograph(width=32, height=32)
    sharp, *others = draws(plain_train_transform(32, scale=(0.1, 0.2)), image, 5)
    assert not any(torch.equal(sharp, other) for other in others)
    assert (sharp.diff(dim=2).abs().mean() < torch.tensor(normalised(image)).diff(dim=2).abs().mean() * 0.7).item()


def test_colour_jitter() -> None:
    image = Image.new("RGB", (32, 32), (100, 150, 200))
    values = {tuple(t[:, 0, 0].tolist()) for t in draws(plain_train_transform(color_jitter=0.4), image, 20)}
    assert len(values) > 10


def test_rand_augment_keeps_colour_jitter_out() -> None:
    image = photograph(width=32, height=32)
    policy = {"auto_augment": "rand-m9-mstd0.5-inc1"}
    augmented = draws(plain_train_transform(**policy), image)
    both = draws(plain_train_transform(**policy, color_jitter=0.4), image)
    assert all(torch.equal(one, other) for one, other in zip(augmented, both, strict=True))
    assert len({t.sum().item() for t in augmented}) > 20


def test_rand_augment_at_its_strongest() -> None:
    # Fifteen operations an image, so that posterising to no bits, which the recipe draws now and then, is among them.
    image = photograph(width=16, height=16)
    tensors = draws(plain_train_transform(16, auto_augment="rand-m10-n15-inc1"), image, 60)
    assert all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize(("magnitude", "mask"), [(10, 0b00000000), (8, 0b10000000), (0, 0b11110000)])
def test_posterising_keeps_the_highest_bits(magnitude: int, mask: int) -> None:
    image = photograph()
    posterised = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=magnitude)(image)
    assert np.array_equal(np.asarray(posterised), np.asarray(image) & mask)


@pytest.mark.parametrize("remode", ["pixel", "rand", "const"])
def test_random_erasing(remode: str) -> None:
    image = photograph(width=32, height=32)
    straight = torch.tensor(normalised(image), dtype=torch.float32)
    tensors = draws(plain_train_transform(reprob=0.4, remode=remode), image, 150)
    erased = [(t - straight).abs().amax(0) > 1e-4 for t in tensors]
    share = np.mean([area.any().item() for area in erased])
    assert 0.25 < share < 0.55
    tensor, area = next((t, a) for t, a in zip(tensors, erased, strict=True) if a.sum() > 40)
    values = tensor[:, area]
    if remode == "const":
        assert not values.any()
    else:
        same_colour = (values == values[:, :1]).all().item()
        assert same_colour == (remode == "rand")
    assert area.float().mean() < 0.4


def test_several_areas_are_erased() -> None:
    image = Image.new("RGB", (64, 64), "white")
    tensors = draws(plain_train_transform(64, reprob=1.0, remode="rand", recount=4), image, 30)
    assert max(len(t.flatten(1).unique(dim=1)[0]) for t in tensors) > 2


def test_unknown_policy_is_named() -> None:
    for policy in ("random", "rand-x9"):
        with pytest.raises(ValueError, match=f"AUG.AUTO_AUGMENT '{policy}' is no policy of timm; write one such as"):
            plain_train_transform(auto_augment=policy)


def test_transforms_reach_workers_that_are_not_forked() -> None:
    image = photograph()
    for transform in (
        plain_train_transform(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5),
        eval_transform(32, interpolation="bicubic", crop=True),
    ):
        (one,), (other,) = (draws(t, image, 1) for t in (transform, pickle.loads(pickle.dumps(transform))))
        assert torch.equal(one, other)
