"""Arguments that several tools take."""

from __future__ import annotations

from collections.abc import Sequence


def image_size(sides: Sequence[int], *, flag: str = "--size") -> tuple[int, int]:
    """Return height and width in pixels from the values of a flag: one side, or height and width.

    Raises:
        ValueError: there are more values, or one is not positive.
    """
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(f"{flag} {' '.join(map(str, sides))} must be one side, or height and width, in pixels")
    return sides[0], sides[-1]
