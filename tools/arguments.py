"""What several tools share: arguments, and the names of the files that they write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training.weight_sets import WEIGHTS


def add_network(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the flags that name a network: its checkpoint, its config, and which set of its weights.

    Args:
        parser: the tool's parser.
        required: whether a checkpoint must be given; otherwise the weights of a config alone are random.
    """
    published = "of this trainer, or a published one together with --cfg"
    random = "" if required else "; without a checkpoint: random weights"
    parser.add_argument("--checkpoint", required=required, metavar="FILE", help=published)
    parser.add_argument("--cfg", metavar="FILE", help=f"config, if the checkpoint has none{random}")
    parser.add_argument("--weights", choices=WEIGHTS, default="", help="default: those the checkpoint was selected by")


def image_size(sides: Sequence[int], *, flag: str = "--size") -> tuple[int, int]:
    """Return height and width in pixels from the values of a flag: one side, or height and width.

    Raises:
        ValueError: there are more values, or one is not positive.
    """
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(f"{flag} {' '.join(map(str, sides))} must be one side, or height and width, in pixels")
    return sides[0], sides[-1]


def free_name(stem: str, taken: set[str]) -> str:
    """Return `stem`, numbered if it is one of the names in `taken`, to which the result is added."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name
