"""Words for messages: counts, lists of names, and names that look alike."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, one: str, several: str = "") -> str:
    """Return a number with the words for it, such as "1 image" or "3 images".

    Args:
        number: how many there are.
        one: the words after 1.
        several: the words after any other number; if empty, ``one`` with an "s".
    """
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Return the first `most` names and the number of further ones."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def with_similar(names: Sequence[str], known: Sequence[str], where: str) -> list[str]:
    """Return the names that differ from a known one only in case, spaces and punctuation, with that one; else all.

    Args:
        names: unknown names.
        known: known names.
        where: words before the known name, such as "train has".
    """
    plain = {_plain(name): name for name in known}
    return [f"{name} ({where} {plain[_plain(name)]})" for name in names if _plain(name) in plain] or list(names)


def _plain(name: str) -> str:
    return "".join(char for char in name.casefold() if char.isalnum()) or name
