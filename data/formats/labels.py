"""Labels as written in tables and shards: names of the classes in `classes.txt`, or positions in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from data.formats.series import MANIFEST
from data.sources import SEPARATOR, compose, read_class_list
from data.wording import counted


class ClassList:
    """The classes in `classes.txt`, and what is written for each in a table or in shards.

    Args:
        names: the classes, in the order of their labels.
        by_position: whether labels are written as positions only, so that a number is never the name of a class.
    """

    def __init__(self, names: Sequence[str], *, by_position: bool = False) -> None:
        self.names = names
        self._places = {} if by_position else {name: label for label, name in enumerate(names)}
        self._written = "" if by_position else "their names or "

    @classmethod
    def of_shards(cls, folder: Path) -> ClassList:
        """Read the list next to shards; it has no names if there is none."""
        return cls(read_class_list(folder), by_position=(folder / MANIFEST).is_file())

    def label(self, text: str) -> int:
        """Return the label for the name of a class, or for its position, counted from 0.

        Raises:
            ValueError: it is neither, or the name of one class and the position of another.
        """
        position = int(text) if text.isdecimal() else len(self.names)
        label = self._places.get(text, position)
        if label >= len(self.names):
            raise ValueError(
                f"label {text!r} is out of range; classes.txt has {counted(len(self.names), 'class', 'classes')}, "
                f"labels are {self._written}0 to {len(self.names) - 1}"
            )
        if label != position < len(self.names) and text == str(position):  # with leading zeros it is a name
            raise ValueError(
                f"label {text!r} is the name of a class and the position of another one in classes.txt, "
                f"{self.names[position]!r}; rename the classes, or list each at the position that is its name"
            )
        return label


def label_of(content: bytes, ending: str) -> str | None:
    """Return the label in a `.cls` or `.json` file of an image; None if there is none."""
    text = content.decode("utf-8", "replace").strip()
    if ending == ".cls":
        return compose(text)
    try:
        found = json.loads(text).get("label")
    except (ValueError, AttributeError):
        return None
    if found is None:
        return None
    return compose(SEPARATOR.join(map(str, found)) if isinstance(found, list) else str(found))
