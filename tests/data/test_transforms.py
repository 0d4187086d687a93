"""Each transform, compared with an independent computation."""

from __future__ import annotations

import io
import pickle
import random

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from data.generators import seed_generators
from data.images import StoredImage, UnreadableImage
from data.operations import OPERATIONS
from data.transforms import Erase, EvalTransform, TrainTransform, eval_transform, normalize, resize
from tests.data.samples import photograph

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def normalised(image: Image.Image) -> np.ndarray:
    """Return the pixels as `[3, H, W]`, normalised."""
    return ((np.asarray(image) / 255 - MEAN) / STD).transpose(2, 0, 1)


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> StoredImage:
    """Return an image as a file of some kind."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return StoredImage(content.getvalue(), f"a.{kind.lower()}")


def plain_train_transform(img_size: int = 32, **options: object) -> TrainTransform:
    """Return the training transform with everything off that `options` do not switch on."""
    off = {
        "interpolation": "bicubic",
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.0,
        "color_jitter": 0.0,
        "auto_augment": "",
    }
    return TrainTransform((img_size, img_size), **{**off, **options})


def to_tensor(pixels: np.ndarray) -> Tensor:
    return normalize(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))


def draws(transform: TrainTransform, image: Image.Image, count: int = 40) -> list[Tensor]:
    seed_generators(0)
    return [to_tensor(transform(stored(image))) for _ in range(count)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("img_size", "resized"), [(224, 256), (384, 438), (64, 73), (32, 36)])
def test_evaluation_crops_the_centre(img_size: int, resized: int, interpolation: str) -> None:
    image = photograph(width=300, height=170)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    edge = round((resized - img_size) / 2)
    expected = image.resize((resized, resized), filters[interpolation]).crop(
        (edge, edge, edge + img_size, edge + img_size)
    )
    tensor = eval_transform((img_size, img_size), interpolation=interpolation, crop=True)(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, img_size, img_size)
    np.testing.assert_allclose(tensor.numpy(), normalised(expected), atol=1e-5)


def test_evaluation_without_cropping() -> None:
    image = photograph(width=300, height=170)
    tensor = eval_transform((96, 96), interpolation="bicubic", crop=False)(image)
    expected = image.resize((96, 96), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(tensor.numpy(), normalised(expected), atol=1e-5)


def test_training_with_everything_off_resizes() -> None:
    image = photograph(width=80, height=80)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    for _ in range(5):
        assert np.abs(plain_train_transform()(stored(image)) - expected).max() <= 1


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


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_of_a_few_pixels_are_cropped(size: tuple[int, int], kind: str) -> None:
    transform = plain_train_transform(8, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    image = stored(Image.new("RGB", size, (100, 150, 200)), kind)
    seed_generators(0)
    for _ in range(100):
        pixels = transform(image)
        assert pixels.shape == (8, 8, 3)
        assert (np.abs(pixels.astype(int) - [100, 150, 200]) <= 4).all()


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


@pytest.mark.parametrize(("bits", "mask"), [(0, 0b00000000), (1, 0b10000000), (4, 0b11110000), (8, 0b11111111)])
def test_posterize_keeps_the_highest_bits(bits: int, mask: int) -> None:
    image = photograph()
    assert np.array_equal(np.asarray(OPERATIONS["PosterizeIncreasing"](image, bits)), np.asarray(image) & mask)


SHIFTS = [
    ("ShearX", 0.2),
    ("ShearX", -0.3),
    ("ShearY", 0.17),
    ("TranslateXRel", 0.13),
    ("TranslateYRel", -0.41),
    ("TranslateX", 3.0),
    ("TranslateY", 250.0),
]


@pytest.mark.parametrize(("name", "level"), SHIFTS)
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_shifts_match_pillow(name: str, level: float, resample: Image.Resampling) -> None:
    image = photograph(width=97, height=64)
    options = {"fillcolor": (124, 116, 104), "resample": resample}
    expected = np.asarray(auto_augment.NAME_TO_OP[name](image, level, **options)).astype(int)
    difference = np.abs(np.asarray(OPERATIONS[name](image, level, **options)) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_shifts_keep_areas_of_one_colour() -> None:
    image = Image.new("RGB", (64, 64), (255, 101, 0))
    for name, level in (("ShearX", 0.23), ("ShearY", -0.11), ("TranslateXRel", 0.1)):
        options = {"fillcolor": (255, 101, 0), "resample": Image.Resampling.BICUBIC}
        assert np.asarray(OPERATIONS[name](image, level, **options)).tobytes() == image.tobytes()


def test_interpolation_is_drawn_like_in_timm() -> None:
    image, options = photograph(), {"fillcolor": (0, 0, 0), "resample": (2, 3)}
    for seed in range(8):
        random.seed(seed)
        expected = np.asarray(auto_augment.NAME_TO_OP["ShearX"](image, 0.2, **dict(options))).astype(int)
        random.seed(seed)
        assert np.abs(np.asarray(OPERATIONS["ShearX"](image, 0.2, **options)) - expected).max() <= 1


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "3a", "original", "v0", "augmix-m3-w3"])
def test_policies_of_timm(policy: str) -> None:
    tensors = draws(plain_train_transform(auto_augment=policy), photograph(width=64, height=64), 20)
    assert all(tensor.shape == (3, 32, 32) for tensor in tensors)
    assert len({tensor.sum().item() for tensor in tensors}) > 4


def erased(images: Tensor, probability: float, mode: str, count: int = 1) -> Tensor:
    seed_generators(0)
    return Erase(probability, mode=mode, count=count)(images.clone())


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_random_erasing(mode: str) -> None:
    images = to_tensor(np.asarray(photograph(width=32, height=32))).expand(150, 3, 32, 32)
    after = erased(images, 0.4, mode)
    areas = (after - images).abs().amax(1) > 1e-4
    assert 0.25 < areas.flatten(1).any(1).float().mean() < 0.55
    place = next(index for index, area in enumerate(areas) if area.sum() > 40)
    values = after[place][:, areas[place]]
    if mode == "const":
        assert not values.any()
    else:
        same_colour = (values == values[:, :1]).all().item()
        assert same_colour == (mode == "rand")
    assert areas.float().mean((1, 2)).max() < 0.4
    assert torch.equal(after, erased(images, 0.4, mode))


def test_several_areas_are_erased() -> None:
    after = erased(torch.zeros(30, 3, 64, 64), 1.0, "rand", 4)
    assert max(len(image.flatten(1).unique(dim=1)[0]) for image in after) > 3


def test_channels_last_stays() -> None:
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert normalize(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_matches_pillow(interpolation: str) -> None:
    image = photograph(width=301, height=210)
    for width, height in ((64, 64), (200, 96), (400, 400)):
        expected = np.asarray(image.resize((width, height), Image.Resampling[interpolation.upper()])).astype(int)
        difference = np.abs(resize(np.array(image), (height, width), interpolation) - expected)
        assert difference.mean() < 0.1
        assert difference.max() <= 2


def test_large_images_are_decoded_at_a_smaller_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(width=640, height=480)
    transform = plain_train_transform(64)
    square = stored(image, "JPEG", quality=95).decode().crop((80, 0, 560, 480))
    exact = resize(np.array(square), (64, 64), "bicubic").astype(int)
    decoded = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: decoded.append(decode(*a, **k)) or decoded[-1])
    assert np.abs(transform(stored(image, "JPEG", quality=95)) - exact).mean() < 2
    assert decoded[0].shape == (120, 160, 3)  # never below the size of the result
    assert plain_train_transform(256)(stored(image, "JPEG")).shape == (256, 256, 3)
    assert decoded[1].shape == (480, 640, 3)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_part_at_a_smaller_scale_shows_the_same(scale: int) -> None:
    image = stored(photograph(width=800, height=640), "JPEG", quality=95)
    part = (160, 240, 320, 400)
    whole = image.crop(*part, at_least=part[2:]).astype(int)
    small = image.crop(*part, at_least=(320 // scale, 400 // scale))
    assert small.shape == (320 // scale, 400 // scale, 3)
    assert np.abs(resize(small, (320, 400), "bicubic") - whole).mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}])
def test_decoding_matches_pillow(mode: str, options: dict) -> None:
    image = stored(photograph(width=201, height=133).convert(mode), "JPEG", **options)
    expected = np.asarray(image.decode())
    assert image.size() == (133, 201)
    assert np.array_equal(image.crop(0, 0, 133, 201, at_least=(133, 201)), expected)
    assert np.array_equal(image.crop(10, 20, 30, 40, at_least=(99, 99)), expected[10:40, 20:60])


def test_damaged_jpeg_is_as_unreadable_as_to_pillow() -> None:
    whole = stored(photograph(width=201, height=133), "JPEG").data
    for content in (whole[:-50], whole[:300], whole[:30], b"\xff\xd8"):
        with pytest.raises(UnreadableImage):
            StoredImage(content, "a.jpg").decode()
        with pytest.raises(UnreadableImage, match=r"cannot read image 'a\.jpg'"):
            plain_train_transform()(StoredImage(content, "a.jpg"))


def test_padded_crops() -> None:
    image = photograph(width=32, height=32)
    transform = plain_train_transform(crop="padded", padding=4)
    pixels = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    places = {(top, left) for top in range(9) for left in range(9)}
    seed_generators(0)
    found = set()
    for _ in range(60):
        part = transform(stored(image))
        found |= {(y, x) for y, x in places if np.array_equal(pixels[y : y + 32, x : x + 32], part)}
    assert len(found) > 25
    assert plain_train_transform(24, crop="padded")(stored(image)).shape == (24, 24, 3)


def test_shorter_side_keeps_the_aspect_ratio() -> None:
    image = photograph(width=300, height=200)
    expected = image.resize((384, 256), Image.Resampling.BICUBIC).crop((80, 16, 304, 240))
    options = {"interpolation": "bicubic", "crop": True, "resize": "shorter"}
    assert np.array_equal(EvalTransform((224, 224), **options)(stored(image)), np.asarray(expected))
    no_crop = EvalTransform((96, 96), interpolation="bicubic", crop=False, resize="shorter")
    expected = image.resize((144, 96), Image.Resampling.BICUBIC).crop((24, 0, 120, 96))
    assert np.array_equal(no_crop(stored(image)), np.asarray(expected))


def test_rectangles_and_crop_ratio() -> None:
    image = photograph(width=300, height=200)
    transform = EvalTransform((64, 96), interpolation="bilinear", crop=True, crop_ratio=0.5)
    expected = image.resize((192, 128), Image.Resampling.BILINEAR).crop((48, 32, 144, 96))
    assert np.array_equal(transform(stored(image)), np.asarray(expected))
    wide = TrainTransform(
        (32, 64),
        interpolation="bicubic",
        scale=(0.1, 1),
        ratio=(0.7, 1.4),
        hflip=0.5,
        color_jitter=0,
        auto_augment="3a",
    )
    assert wide(stored(image)).shape == (32, 64, 3)


def test_the_published_crop_ratio_is_the_default() -> None:
    for size in range(32, 1025):
        assert EvalTransform((size, size), interpolation="bicubic", crop=True)._resized[0] == int(256 / 224 * size)


def test_unknown_policy_is_named() -> None:
    for policy in ("random", "rand-x9"):
        with pytest.raises(ValueError, match=f"AUG.AUTO_AUGMENT '{policy}' is not a policy of timm; use one such as"):
            plain_train_transform(auto_augment=policy)


def test_transforms_reach_spawned_workers() -> None:
    image = photograph()
    for transform in (
        plain_train_transform(auto_augment="rand-m9-mstd0.5-inc1"),
        EvalTransform((32, 32), interpolation="bicubic", crop=True),
    ):
        (one,), (other,) = (draws(t, image, 1) for t in (transform, pickle.loads(pickle.dumps(transform))))
        assert torch.equal(one, other)
