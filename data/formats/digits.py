"""The handwritten digits of scikit-learn: a real data set that needs no download.

1,797 images of 8 x 8 pixels with 17 levels of grey (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits, UCI Machine Learning Repository, 1998).
"""

from __future__ import annotations

import numpy as np

from data.sources import ArraySource, Dataset, Request

CLASSES = [str(digit) for digit in range(10)]


def open_digits(request: Request) -> Dataset:
    """Open the digits.

    Raises:
        ValueError: a path or a split was given; the digits have neither.
    """
    if request.path:
        raise ValueError(
            "the digits are part of scikit-learn and take no --data-path; "
            "to use folders with this config, add --opts DATA.DATASET imagenet"
        )
    request.refuse_split_names("DATA.DATASET digits")
    return Dataset(
        classes=CLASSES,
        train=digits_of(train=True) if "train" in request.needs else None,
        held_out=digits_of(train=False) if "val" in request.needs else None,
    )


def digits_of(*, train: bool) -> ArraySource:
    """Return the training digits (1,437) or the held-out ones (360), which are every fifth of each class."""
    # Imported here because importing scikit-learn takes a second and starts threads.
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.zeros(len(digits.target), dtype=bool)
    held_out[np.argsort(digits.target, kind="stable")[::5]] = True
    chosen = held_out != train
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource(images, digits.target[chosen], "digit")
