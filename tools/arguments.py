"""What several tools share: arguments, and the names of the files that they write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from config import OPTIONS
from training.weight_sets import WEIGHTS
from utils import DeviceLost, pick_device


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


def check_network(args: argparse.Namespace) -> None:
    """Check the flags of `add_network`.

    Raises:
        ValueError: they name no network, or choose among the weights of a config, which has none.
    """
    if not args.checkpoint and not args.cfg:
        raise ValueError("give --checkpoint FILE, or --cfg FILE for a network with random weights")
    if args.weights and not args.checkpoint:
        raise ValueError("--weights chooses a set of weights of a --checkpoint, and there is none; leave it out")


def add_opts(parser: argparse.ArgumentParser, *, of: str) -> None:
    """Add --opts, which may be repeated, for options of what `of` names."""
    meaning = f"override options of {of}"
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help=meaning)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the device, for `device_of`."""
    names = [name for name in OPTIONS["DEVICE"].check.choices if name]
    parser.add_argument("--device", choices=names, default="", help="default: the best available")


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device that `add_device` chose.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        return pick_device(args.device, 0, 1)
    except DeviceLost as error:
        raise ValueError(error) from None


def check_least(args: argparse.Namespace, least: int, *flags: str) -> None:
    """Check that the numbers of flags, where given, are at least `least`.

    Raises:
        ValueError: one is less.
    """
    for flag in flags:
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if value is not None and value < least:
            raise ValueError(f"{flag} must be at least {least}, not {value}")


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
