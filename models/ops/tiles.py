"""Tiles of queries of a map, and the overlapping windows of keys that they attend to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .caching import cached_tensors, under_modes

LARGEST_TILE = 8  # query rows of a tile, if one or two tiles cover the map
INNER_TILE = 6  # otherwise; with windows of 7, a tile then has 12 rows of keys, the fastest size measured on CPUs


class Tiles:
    """Tiles of a map for neighborhood attention.

    The K x K windows of a tile's queries together cover a few rows and columns of keys. The attention of a tile is
    dense attention to these keys with a mask, which is the same for all tiles away from the border.

    Args:
        size: height and width of the map.
        kernel_size: side K of the window of a query.
        device: device of the indices.
        maps: number of maps, whose pixels follow one another; everything below counts those of all maps.

    Attributes:
        queries_per_tile: queries of a tile; tiles of the last row and column may reach beyond the map.
        keys_per_tile: keys of a tile.
        count: number of tiles.
        queries: pixel of each query of each tile, ``[count * queries_per_tile]``; beyond the map, the last pixel of the
            row or column is repeated.
        places: index of every pixel in ``queries``, ``[H*W]``.
        beyond: indices in ``queries`` that are beyond the map.
        keys: pixel of each key of each tile, ``[count * keys_per_tile]``.
    """

    def __init__(self, size: tuple[int, int], kernel_size: int, device: torch.device, maps: int = 1) -> None:
        self.axes = y, x = [_Axis(length, kernel_size) for length in size]
        self.queries_per_tile = y.tile * x.tile
        self.keys_per_tile = y.span * x.span
        self.count = maps * y.count * x.count
        self._side = 2 * kernel_size - 1
        self.queries, self.places, self.beyond, self.keys, *indices = _indices(size, kernel_size, device, maps)
        self._kinds, self._cells = indices

    def cut(self, x: Tensor) -> Tensor:
        """Return the queries of every tile, ``[N, H*W, d] -> [N * tiles, queries_per_tile, d]``.

        Queries beyond the map repeat its last row and column. `join` drops them.
        """
        return x.index_select(1, self.queries).view(-1, self.queries_per_tile, x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """Undo `cut`."""
        return x.reshape(-1, len(self.queries), x.shape[-1]).index_select(1, self.places)

    def windows(self, x: Tensor) -> Tensor:
        """Return the keys of every tile, ``[N, H*W, d] -> [N * tiles, keys_per_tile, d]``."""
        return x.index_select(1, self.keys).view(-1, self.keys_per_tile, x.shape[-1])

    def bias(self, rpb: Tensor) -> Tensor:
        """Return the bias added to the logits of every kind of tile, minus infinity outside the window of a query.

        Args:
            rpb: relative position bias ``[heads, 2*K-1, 2*K-1]``.

        Returns:
            ``[heads, kinds, queries_per_tile, keys_per_tile]``.
        """
        cells = F.pad(rpb.flatten(1), (0, 1), value=float("-inf")).index_select(1, self._cells)
        return cells.view(len(rpb), -1, self.queries_per_tile, self.keys_per_tile)

    def expand_bias(self, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Repeat the bias of every kind for its tiles, ``[heads * tiles, queries_per_tile, keys_per_tile]``.

        Args:
            bias: result of `bias`.
            out: tensor for the result, or None for a new one.
        """
        if out is None:
            return bias.index_select(1, self._kinds).flatten(0, 1)
        torch.index_select(bias, 1, self._kinds, out=out.unflatten(0, (len(bias), -1)))
        return out

    def sum_by_cell(self, x: Tensor, heads: int) -> Tensor:
        """Sum the entries of all tiles by their cell of the table, ``[heads, 2*K-1, 2*K-1]``.

        This is the gradient of the table, given that of the result of `bias` and `expand_bias`.
        """
        x = x.view(heads, -1, *x.shape[1:])
        kinds = len(self.axes[0].examples) * len(self.axes[1].examples)
        x = x.new_zeros(heads, kinds, *x.shape[2:]).index_add_(1, self._kinds, x)
        table = x.new_zeros(heads, self._side**2 + 1).index_add_(1, self._cells, x.flatten(1))
        return table[:, :-1].unflatten(1, (self._side, self._side))


@cached_tensors
def tiles_of(size: tuple[int, int], kernel_size: int, device: torch.device, maps: int = 1) -> Tiles:
    """Return the tiles of one or several maps."""
    return Tiles(size, kernel_size, device, maps)


@torch.compiler.assume_constant_result  # otherwise the graph would copy these lists to the device in every step
def _indices(size: tuple[int, int], kernel_size: int, device: torch.device, maps: int) -> list[Tensor]:
    """Return flat indices between tiles, maps and table of position biases.

    Returns:
        ``queries``, ``places``, ``beyond`` and ``keys`` of `Tiles`; the kind of every tile, ``[count]``; and the cell
        of the table for every kind of tile, ``[kinds * queries_per_tile * keys_per_tile]``, one past the last cell for
        keys outside the window of a query.
    """
    # The number of pixels inside the map depends on values, which fake tensors and those of the meta device lack.
    with _disable_current_modes(), torch.device("cpu"):
        axes = y, x = [_Axis(length, kernel_size) for length in size]
        rows, columns = (torch.arange(axis.count)[:, None] * axis.tile + torch.arange(axis.tile) for axis in axes)
        inside = ((rows < y.length)[:, None, :, None] & (columns < x.length)[:, None, :]).flatten()
        rows, columns = rows.clamp(max=y.length - 1), columns.clamp(max=x.length - 1)
        queries = (rows[:, None, :, None] * x.length + columns[:, None, :]).flatten()  # [ny, nx, tile, tile]
        places = inside.nonzero()[queries[inside].argsort()]
        beyond = inside.logical_not().nonzero()
        rows, columns = (torch.tensor(axis.starts)[:, None] + torch.arange(axis.span) for axis in axes)
        keys = (rows[:, None, :, None] * x.length + columns[:, None, :]).flatten()  # [ny, nx, span, span]
        kinds = torch.tensor(y.kinds)[:, None] * len(x.examples) + torch.tensor(x.kinds)  # [ny, nx]
        side = 2 * kernel_size - 1
        dy, dx = y.offsets()[:, None, :, None, :, None], x.offsets()[:, None, :, None, :]
        cells = torch.where((dy == _OUTSIDE) | (dx == _OUTSIDE), side**2, dy * side + dx)
        number = torch.arange(maps)[:, None]  # of the map
        queries, keys = (number * (y.length * x.length) + pixels for pixels in (queries, keys))
        places, beyond = (number * len(inside) + rows.flatten() for rows in (places, beyond))
        kinds = kinds.repeat(maps, 1)
    return [under_modes(index, device).flatten() for index in (queries, places, beyond, keys, kinds, cells)]


_OUTSIDE = -1


class _Axis:
    """One axis of the tiles, described by its rows.

    Attributes:
        length: rows of the map.
        count: number of tiles.
        tile: query rows of a tile.
        starts: first key row of every tile.
        span: key rows of a tile.
        kinds: kind of every tile; tiles of one kind share a mask.
        examples: first query row and first key row of one tile of every kind.
    """

    def __init__(self, length: int, kernel_size: int) -> None:
        count = -(-length // LARGEST_TILE)
        if count > 2:
            count = -(-length // INNER_TILE)
        self.length, self._kernel_size = length, kernel_size
        self.tile = -(-length // count)
        self.count = -(-length // self.tile)

        def window(query: int) -> int:
            return min(max(query - kernel_size // 2, 0), length - kernel_size)

        firsts = list(range(0, length, self.tile))
        ends = [(window(first), window(first + self.tile - 1)) for first in firsts]
        self.span = max(last - first for first, last in ends) + kernel_size
        self.starts = [min(first, length - self.span) for first, _ in ends]

        # Tiles share a mask if their keys and windows have the same offsets from their queries.
        tiles = zip(firsts, self.starts, ends, strict=True)
        seen = [(start - first, low - first, high - first) for first, start, (low, high) in tiles]
        distinct = list(dict.fromkeys(seen))
        self.kinds = [distinct.index(entry) for entry in seen]
        self.examples = [(firsts[seen.index(entry)], self.starts[seen.index(entry)]) for entry in distinct]

    def offsets(self) -> Tensor:
        """Return key minus query row plus K - 1, ``[kinds, tile, span]``; ``_OUTSIDE`` beyond the window of the query.

        A query beyond the map repeats the last row, so that its softmax stays finite; `Tiles.join` drops it.
        """
        first, start = torch.tensor(self.examples).unsqueeze(-1).unbind(1)  # [kinds, 1]
        query = (first + torch.arange(self.tile)).clamp(max=self.length - 1)[:, :, None]
        key = (start + torch.arange(self.span))[:, None]
        low = (query - self._kernel_size // 2).clamp(0, self.length - self._kernel_size)
        inside = (key >= low) & (key < low + self._kernel_size)
        return torch.where(inside, key - query + self._kernel_size - 1, _OUTSIDE)
