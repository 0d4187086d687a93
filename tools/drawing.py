"""Pictures of sampling points and attention, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from tools.deformations import BlockAttention, Place

PANEL = 2.5  # inches
# Area of the largest circle of a panel in square points; the smallest remains visible.
LARGEST, SMALLEST = 190.0, 3.0
QUERY_COLOUR = "#ffe600"
GREY = 0.45  # share of grey in the image below the drawings


@dataclass(frozen=True)
class NetworkAttention:
    """Sampling points and attention of one network for one image.

    Attributes:
        title: such as "before training".
        blocks: the drawn blocks.
    """

    title: str
    blocks: list[BlockAttention]


def colour(group: int) -> str:
    """Return the colour of an offset group."""
    return mpl.colors.to_hex(mpl.colormaps["tab10"](group % 10))


def draw(
    image: NDArray[np.uint8], networks: Sequence[NetworkAttention], *, queries: Sequence[Place], heads: Sequence[int]
) -> Figure:
    """Draw sampling points, key importance and the attention of query points; networks are side by side.

    Args:
        image: input of the networks, ``[H, W, 3]``.
        networks: the attention of each network, with the same blocks.
        queries: places (y, x) as shares of height and width.
        heads: counted from 0; a block with fewer heads leaves columns empty. If empty, one head of each of the first
            groups of a block: four for one network, two for each of several.
    """
    rows = len(networks[0].blocks)
    shown = len(heads) or min(4 if len(networks) == 1 else 2, max(block.groups for block in networks[0].blocks))
    columns = 2 + shown * len(queries)
    height = PANEL * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(PANEL * columns * len(networks) + 0.4, (height + 0.35) * rows + 0.9), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(1, len(networks), wspace=0.03))
    for part, one in zip(parts, networks, strict=True):
        part.suptitle(one.title, fontsize=12, fontweight="bold")
        _draw_network(part, image, one.blocks, columns, queries=queries, heads=heads)
    most = max(block.groups for block in networks[0].blocks)
    figure.legend(handles=_legend(most), loc="outside lower center", ncols=min(most + 4, 8), fontsize=8, frameon=False)
    return figure


def _draw_network(
    part: SubFigure,
    image: NDArray[np.uint8],
    blocks: Sequence[BlockAttention],
    columns: int,
    *,
    queries: Sequence[Place],
    heads: Sequence[int],
) -> None:
    grid = part.subplots(len(blocks), columns, squeeze=False)
    for row, block in zip(grid, blocks, strict=True):
        chosen = list(heads) or first_heads(block, columns - 2)
        row[0].set_ylabel(f"{block.title}\n{' × '.join(map(str, block.key_size))} keys", fontsize=8)
        _draw_points(row[0], image, block)
        _draw_importance(row[1], image, block)
        panels = iter(row[2:])
        for query in queries:
            for number in range(len(heads) or (columns - 2) // len(queries)):
                axes = next(panels)
                if number < len(chosen) and chosen[number] < block.heads:
                    _draw_attention(axes, image, block, query, chosen[number])
                else:
                    axes.set_axis_off()


def first_heads(block: BlockAttention, number: int) -> list[int]:
    """Return `number` heads: the first of each group, then the second, and so on."""
    per_group = block.heads // block.groups
    order = [group * per_group + place for place in range(per_group) for group in range(block.groups)]
    return sorted(order[:number])


def _draw_points(axes: Axes, image: NDArray[np.uint8], block: BlockAttention) -> None:
    _show(axes, image, "sampling points")
    height, width = image.shape[:2]
    _scatter(axes, block.reference, image, s=7, facecolors="none", edgecolors="white", linewidths=0.6)
    for group, places in enumerate(block.places):
        begin, end = block.reference * (height, width) - 0.5, places * (height, width) - 0.5
        # One collection with a line from the reference of each key; separate lines would be slower.
        lines = np.stack((begin[:, ::-1], end[:, ::-1]), axis=1)
        axes.add_collection(mpl.collections.LineCollection(lines, colors=colour(group), linewidths=0.8, alpha=0.8))
        _scatter(axes, places, image, s=11, color=colour(group), linewidths=0)


def _draw_importance(axes: Axes, image: NDArray[np.uint8], block: BlockAttention) -> None:
    _show(axes, image, "importance of keys")
    importance = block.importance()
    for group, places in enumerate(block.places):
        _circles(axes, image, places, importance[group] / importance.max(), colour(group), shrink=block.groups)


def _draw_attention(axes: Axes, image: NDArray[np.uint8], block: BlockAttention, query: Place, head: int) -> None:
    group = block.group_of(head)
    name = f"head {head + 1}" + (f", group {group + 1}" if block.groups > 1 else "")
    _show(axes, image, name)
    weights = block.weights[head, block.query_at(query)]
    _circles(axes, image, block.places[group], weights / weights.max(), colour(group))
    _scatter(axes, np.array([query]), image, s=110, marker="*", color=QUERY_COLOUR, edgecolors="black", linewidths=0.7)


def _circles(
    axes: Axes, image: NDArray[np.uint8], places: NDArray, share: NDArray, fill: str, *, shrink: int = 1
) -> None:
    area = SMALLEST + LARGEST / shrink**0.5 * share
    _scatter(axes, places, image, s=area, color=fill, alpha=0.75, edgecolors="white", linewidths=0.4)


def _scatter(axes: Axes, places: NDArray, image: NDArray[np.uint8], **style: object) -> None:
    y, x = (places * image.shape[:2] - 0.5).T
    axes.scatter(x, y, clip_on=True, **style)


def _show(axes: Axes, image: NDArray[np.uint8], title: str) -> None:
    """Show the image, mixed with grey so that drawings on it are visible."""
    dimmed = image * (1 - GREY) + 255 * GREY * 0.5
    axes.imshow(dimmed.astype(np.uint8), interpolation="nearest" if max(image.shape) < 100 else "antialiased")
    axes.set(xticks=(), yticks=(), xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    axes.set_title(title, fontsize=8)


def _legend(groups: int) -> list[Line2D]:
    def mark(label: str, **style: object) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, **style)

    marks = [mark("reference grid", marker="o", markerfacecolor="none", markeredgecolor="grey", markersize=4)]
    for group in range(groups):
        label = f"keys of group {group + 1}" if groups > 1 else "keys"
        marks.append(mark(label, marker="o", color=colour(group), markersize=5))
    marks.append(mark("larger: more attention", marker="o", color="grey", markersize=9))
    query = {"marker": "*", "markersize": 10, "color": QUERY_COLOUR, "markeredgecolor": "black"}
    marks.append(mark("query point", **query))
    return marks
