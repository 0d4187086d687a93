"""Self-contained HTML pages: one file each, with style, script, data and pictures inside; nothing is downloaded."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_STYLE = Path(__file__).parent / "templates" / "style.css"
THUMBNAIL = 320  # pixels of the longer side of the picture of a figure
_PLACE = re.compile(r"\{\{(\w+)\}\}")
FEW_PIXELS = 100  # images with at most these on the longer side are stored without loss and shown pixel by pixel


def fill(template: Path, **values: str) -> str:
    """Return a template with each ``{{name}}`` replaced by its value, ``{{style}}`` by the style of all pages.

    Args:
        template: file.
        values: HTML, as `text` or `data` make it safe.
    """
    page = template.read_text(encoding="utf-8")
    if "{{style}}" in page:
        values["style"] = _STYLE.read_text(encoding="utf-8")
    assert set(_PLACE.findall(page)) == values.keys(), template.name
    return _PLACE.sub(lambda place: values[place[1]], page)  # in one pass: values may contain {{name}}, too


def text(value: object) -> str:
    """Return a value as escaped HTML text. Non-UTF-8 bytes of file names are shown as escapes."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))


def data(value: Any) -> str:
    """Return plain values as JSON that is safe inside a ``<script>`` element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def numbers(array: NDArray) -> str:
    """Return the bytes of an array, little-endian, in base64."""
    return base64.b64encode(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()).decode()


def picture(image: Image.Image, *, side: int = 0, lossless: bool = False) -> str:
    """Return an image as a data URL for an ``<img>``: lossless if it is small or requested, else JPEG.

    Args:
        image: RGB.
        side: maximum of the longer side in pixels; 0 for no limit.
        lossless: as PNG, independent of its size.
    """
    if side and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    kind = "png" if lossless or max(image.size) <= FEW_PIXELS else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 88} if kind == "jpeg" else {}))
    return address(kind, buffer.getvalue())


def address(kind: str, content: bytes) -> str:
    """Return the bytes of an image file as a data URL for an ``<img>``; ``kind`` is ``png`` or ``jpeg``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def bar(name: str, share: float) -> str:
    """Return a line with a name and a percentage over a bar of proportional length."""
    return (
        f'<div class="bar" style="background: linear-gradient(to right, #cfe0fb {100 * share:.1f}%, transparent 0)">'
        f"<span>{text(name)}</span><span>{100 * share:.1f} %</span></div>"
    )


def figure(image: Image.Image, name: str, bars: str) -> str:
    """Return a card with a picture, the name of its file, and bars below it.

    Args:
        image: RGB.
        name: the file's name.
        bars: HTML of `bar`.
    """
    few = ' class="pixels"' if max(image.size) <= FEW_PIXELS else ""
    source, name = picture(image, side=THUMBNAIL), text(name)
    return f'<figure class="card"><img{few} src="{source}" alt="{name}"><figcaption>{name}</figcaption>{bars}</figure>'
