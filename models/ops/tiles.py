"""Cutting a map into tiles of queries and the overlapping windows of keys that they need."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_TILE = 8  # query rows of a tile where one or two tiles do
INNER_TILE = 6  # elsewhere: with windows of 7 the tile has 12 rows of keys, measured best on CPUs


class Tiles:
    """Tiles of a map for neighborhood attention.

    The queries of a tile see different K x K windows, but together no more than ``span`` rows and columns of keys: the
    attention of a tile is a dense product with a mask, the same for all tiles but those at the border.

    Args:
        size: height and width of the map.
        kernel_size: side K of the window of a query.
        device: where the indices are put.

    Attributes:
        queries_per_tile: queries of a tile; tiles of the last row and column may reach beyond the map.
        keys_per_tile: keys of a tile.
    """

    def __init__(self, size: tuple[int, int], kernel_size: int, device: torch.device) -> None:
        self.axes = y, x = [_Axis(length, kernel_size) for length in size]
        self.queries_per_tile = y.tile * x.tile
        self.keys_per_tile = y.span * x.span
        self._side = 2 * kernel_size - 1

        rows, columns = (torch.tensor(axis.starts)[:, None] + torch.arange(axis.span) for axis in self.axes)
        keys = rows[:, None, :, None] * x.length + columns[:, None, :]  # [ny, nx, span, span]
        kinds = torch.tensor(y.kinds)[:, None] * len(x.offsets) + torch.tensor(x.kinds)  # [ny, nx]
        dy, dx = y.offsets[:, None, :, None, :, None], x.offsets[:, None, :, None, :]
        outside = (dy == _OUTSIDE) | (dx == _OUTSIDE)
        cells = torch.where(outside, self._side**2, dy * self._side + dx)
        self._keys, self._kinds, self._cells = (index.flatten().to(device) for index in (keys, kinds, cells))

    def cut(self, x: Tensor) -> Tensor:
        """Return the queries of every tile, ``[B, H, W, heads, d] -> [B, heads * tiles, queries_per_tile, d]``."""
        y_axis, x_axis = self.axes
        batch, _, _, heads, dim = x.shape
        x = F.pad(x, (0, 0, 0, 0, 0, x_axis.excess, 0, y_axis.excess)) if x_axis.excess or y_axis.excess else x
        x = x.reshape(batch, y_axis.count, y_axis.tile, x_axis.count, x_axis.tile, heads, dim)
        return x.permute(0, 5, 1, 3, 2, 4, 6).reshape(batch, -1, self.queries_per_tile, dim)

    def join(self, x: Tensor, heads: int) -> Tensor:
        """Undo `cut`."""
        y, x_axis = self.axes
        x = x.view(len(x), heads, y.count, x_axis.count, y.tile, x_axis.tile, -1).permute(0, 2, 4, 3, 5, 1, 6)
        x = x.reshape(len(x), y.count * y.tile, x_axis.count * x_axis.tile, heads, -1)
        return x[:, : y.length, : x_axis.length]

    def windows(self, x: Tensor) -> Tensor:
        """Return the keys of every tile, ``[B, H, W, heads, d] -> [B, heads * tiles, keys_per_tile, d]``."""
        batch, _, _, heads, dim = x.shape
        x = x.flatten(3).flatten(1, 2).index_select(1, self._keys)
        x = x.view(batch, -1, self.keys_per_tile, heads, dim)
        return x.permute(0, 3, 1, 2, 4).reshape(batch, -1, self.keys_per_tile, dim)

    def add_windows(self, x: Tensor, heads: int) -> Tensor:
        """Return the sum of all windows at their places on the map, the transpose of `windows`."""
        y_axis, x_axis = self.axes
        batch, dim = len(x), x.shape[-1]
        x = x.view(batch, heads, y_axis.count, x_axis.count, y_axis.span, x_axis.span, dim)
        rows = x.new_zeros(batch, heads, y_axis.count, y_axis.span, x_axis.length, dim)
        for i, start in enumerate(x_axis.starts):
            rows.narrow(4, start, x_axis.span).add_(x[:, :, :, i])
        out = x.new_zeros(batch, y_axis.length, x_axis.length, heads, dim)
        columns = out.permute(0, 3, 1, 2, 4)
        for i, start in enumerate(y_axis.starts):
            columns.narrow(2, start, y_axis.span).add_(rows[:, :, i])
        return out

    def bias(self, rpb: Tensor) -> Tensor:
        """Return what is added to the logits of every kind of tile, minus infinity outside the window of a query.

        Args:
            rpb: relative position bias ``[heads, 2*K-1, 2*K-1]``.

        Returns:
            ``[heads, kinds, queries_per_tile, keys_per_tile]``.
        """
        cells = F.pad(rpb.flatten(1), (0, 1), value=float("-inf")).index_select(1, self._cells)
        return cells.view(len(rpb), -1, self.queries_per_tile, self.keys_per_tile)

    def of_every_tile(self, bias: Tensor) -> Tensor:
        """Return a new ``[heads * tiles, queries_per_tile, keys_per_tile]`` of the bias of every kind."""
        return bias.index_select(1, self._kinds).flatten(0, 1)

    def add_bias(self, x: Tensor, heads: int) -> Tensor:
        """Return the sum over all tiles of what belongs to each cell of the table, ``[heads, 2*K-1, 2*K-1]``.

        It is the transpose of `of_every_tile` after `bias`.
        """
        x = x.view(heads, -1, *x.shape[1:])
        kinds = len(self.axes[0].offsets) * len(self.axes[1].offsets)
        x = x.new_zeros(heads, kinds, *x.shape[2:]).index_add_(1, self._kinds, x)
        table = x.new_zeros(heads, self._side**2 + 1).index_add_(1, self._cells, x.flatten(1))
        return table[:, :-1].unflatten(1, (self._side, self._side))


def tiles_of(size: tuple[int, int], kernel_size: int, device: torch.device) -> Tiles:
    """Return the tiles of a map; made once, but in a compiled graph made of constants."""
    return (Tiles if torch.compiler.is_compiling() else _cached_tiles)(size, kernel_size, device)


@functools.lru_cache(maxsize=64)
def _cached_tiles(size: tuple[int, int], kernel_size: int, device: torch.device) -> Tiles:
    with torch.inference_mode(False):  # what is made in inference mode could not serve training later
        return Tiles(size, kernel_size, device)


_OUTSIDE = -1


class _Axis:
    """One axis of the tiles.

    Attributes:
        length: rows of the map.
        count: number of tiles.
        tile: query rows of a tile.
        excess: query rows of the last tile beyond the map.
        starts: first key row of every tile.
        span: key rows of a tile.
        kinds: which of ``offsets`` belongs to every tile.
        offsets: key minus query row plus K - 1, ``[kinds, tile, span]``; ``_OUTSIDE`` beyond the window of the query.
    """

    def __init__(self, length: int, kernel_size: int) -> None:
        count = -(-length // LARGEST_TILE)
        if count > 2:
            count = -(-length // INNER_TILE)
        self.length = length
        self.tile = -(-length // count)
        self.count = -(-length // self.tile)
        self.excess = self.count * self.tile - length

        def window(query: int) -> int:
            return min(max(query - kernel_size // 2, 0), length - kernel_size)

        firsts = list(range(0, length, self.tile))
        ends = [(window(first), window(first + self.tile - 1)) for first in firsts]
        self.span = max(last - first for first, last in ends) + kernel_size
        self.starts = [min(first, length - self.span) for first, _ in ends]

        # Tiles with the same distances from their queries to their keys and windows share one mask.
        tiles = list(zip(firsts, self.starts, ends, strict=True))
        seen = [(start - first, low - first, high - first) for first, start, (low, high) in tiles]
        distinct = list(dict.fromkeys(seen))
        self.kinds = [distinct.index(entry) for entry in seen]
        examples = [tiles[seen.index(entry)] for entry in distinct]

        # A query beyond the map repeats the last row, so that its softmax stays finite; `join` drops it.
        query = torch.tensor([first for first, _, _ in examples])[:, None] + torch.arange(self.tile)
        query = query.clamp(max=length - 1)[:, :, None]
        key = torch.tensor([start for _, start, _ in examples])[:, None, None] + torch.arange(self.span)
        low = (query - kernel_size // 2).clamp(0, length - kernel_size)
        inside = (key >= low) & (key < low + kernel_size)
        self.offsets = torch.where(inside, key - query + kernel_size - 1, _OUTSIDE)
