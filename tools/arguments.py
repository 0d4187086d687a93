"""Arguments that several tools take, and how they refuse wrong ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


def image_size(sides: Sequence[int], *, flag: str = "--size") -> tuple[int, int]:
    """Return height and width in pixels from the values of a flag: one side, or height and width.

    Raises:
        ValueError: there are more values, or one is not positive.
    """
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(f"{flag} {' '.join(map(str, sides))} must be one side, or height and width, in pixels")
    return sides[0], sides[-1]


def refuse(problem: Exception | str) -> NoReturn:
    """End a tool because of wrong input: one line on standard error, without the flags, and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
    sys.exit(2)
