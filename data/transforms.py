"""From an RGB image to the tensor a network is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import NAME_TO_OP
from torch import Tensor
from torchvision import transforms

Transform = Callable[[Image.Image], Tensor]


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Keep the highest bits of every value; none gives a black image."""
    if bits_to_keep:
        return ImageOps.posterize(image, min(bits_to_keep, 8))
    return Image.new(image.mode, image.size)


# The strongest level of the recipe keeps no bits. timm hands that on to Pillow, which refuses it from version 13 on.
NAME_TO_OP.update({name: _posterize for name in NAME_TO_OP if name.startswith("Posterize")})


def train_transform(
    img_size: int,
    *,
    interpolation: str,
    scale: Sequence[float],
    ratio: Sequence[float],
    hflip: float,
    color_jitter: float,
    auto_augment: str,
    reprob: float,
    remode: str,
    recount: int,
) -> Transform:
    """Return random crop, flip, RandAugment or colour jitter, normalisation and random erasing.

    Args:
        img_size: height and width of the result in pixels.
        interpolation: "bicubic" or "bilinear".
        scale: smallest and largest area of the crop, as shares of the image.
        ratio: smallest and largest aspect ratio of the crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength; used only where `auto_augment` does not change colours itself.
        auto_augment: a timm policy such as "rand-m9-mstd0.5-inc1"; empty for none.
        reprob: probability of random erasing.
        remode: "pixel", "rand" or "const".
        recount: largest number of erased areas.

    Raises:
        ValueError: for a policy that timm does not know.
    """
    try:
        return create_transform(
            img_size,
            is_training=True,
            interpolation=interpolation,
            scale=tuple(scale),
            ratio=tuple(ratio),
            hflip=hflip,
            color_jitter=color_jitter or None,
            auto_augment=auto_augment or None,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
        )
    except (AssertionError, KeyError, ValueError):
        raise ValueError(
            f"AUG.AUTO_AUGMENT {auto_augment!r} is no policy of timm; write one such as rand-m9-mstd0.5-inc1, or '' "
            f"for none"
        ) from None


def eval_transform(img_size: int | tuple[int, int], *, interpolation: str, crop: bool) -> Transform:
    """Return resizing, without keeping the aspect ratio, and normalisation.

    Args:
        img_size: height and width of the result in pixels.
        interpolation: "bicubic" or "bilinear".
        crop: resize to 256/224 of `img_size` and cut out the centre; otherwise resize straight to `img_size`.
    """
    pair = (img_size, img_size) if isinstance(img_size, int) else img_size
    size = [int(256 / 224 * side) if crop else side for side in pair]
    return transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(pair),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
