"""Deformable attention that samples the position bias inside the kernel: weights and bias are never written to memory.

The forward pass iterates over blocks of keys with an online softmax (FlashAttention, arXiv 2205.14135) and saves the
logsumexp of every query. The backward pass recomputes the weights three times: for the gradient of the queries, for
those of keys, values and positions, and for that of the table.

With weights ``P``, output ``O``, its gradient ``G`` and ``dS = P * (G V^T - sum(G * O))``, the gradient of a cell of
the table is the sum of all ``dS``, weighted bilinearly by the distance of the displacement from the cell. Per key this
is a product of three small matrices, ``Wy^T dS Wx`` with ``dS`` as a map of the queries, so every program sums the
cells of its own tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..forms import operator
from .blocks import as_index, dot, head_blocks, launch, move_closer

QUERIES = 64  # queries per block
QUERIES_WIDE = 32  # for float32 heads of more than 64 values, which would exceed the shared memory of many GPUs
KEYS = 16  # keys per block
SIDE = 16  # side of the square blocks of queries in `_backward_table`
TILE = 64  # largest side of a tile of the table
LAUNCH = {"num_warps": 8, "num_stages": 1}  # 8 warps keep the corners of the table in registers
PROGRAMS = 1024  # programs of `_backward_table` to aim for: queries are split into parts to reach this number
SIZES = ("map_height", "map_width", "keys", "images", "parts")  # see `launch`


@triton.jit
def _cells(grid, position, length):
    """Return positions on an axis of the table; those far outside are moved closer, where the bias is also zero.

    NaN is kept, as it is on a CPU.
    """
    return move_closer(((grid - position) / 2 + 1) * ((length - 1) / 2), length)


@triton.jit
def _corners(table, y, x, rows, columns):
    """Return the four values of the table around a position and its distance from the first of them."""
    top, left = tl.floor(y), tl.floor(x)
    row, column = as_index(top), as_index(left)
    place = table + row * columns + column
    row0, row1 = (row >= 0) & (row < rows), (row >= -1) & (row < rows - 1)
    column0, column1 = (column >= 0) & (column < columns), (column >= -1) & (column < columns - 1)
    a = tl.load(place, mask=row0 & column0, other=0.0).to(tl.float32)
    b = tl.load(place + 1, mask=row0 & column1, other=0.0).to(tl.float32)
    c = tl.load(place + columns, mask=row1 & column0, other=0.0).to(tl.float32)
    d = tl.load(place + columns + 1, mask=row1 & column1, other=0.0).to(tl.float32)
    return a, b, c, d, y - top, x - left


@triton.jit
def _bias(table, y, x, rows, columns):
    a, b, c, d, down, right = _corners(table, y, x, rows, columns)
    return (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)


@triton.jit
def _rows(x, start, length, heads, head, HEAD: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Return pointers to and mask of a block of rows of one head of ``[length, heads, d]``."""
    row, column = start + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    place = x + (row[:, None] * heads + head) * HEAD + column[None, :]
    return place, (row[:, None] < length) & (column[None, :] < HEAD)


@triton.jit
def _key_block(k, v, positions, first, keys, heads, head, HEAD: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a block of keys and values, and the positions of the keys."""
    place, inside = _rows(k, first, keys, heads, head, HEAD, KEYS, WIDTH)
    k_block = tl.load(place, mask=inside, other=0.0)
    v_block = tl.load(_rows(v, first, keys, heads, head, HEAD, KEYS, WIDTH)[0], mask=inside, other=0.0)
    key = first + tl.arange(0, KEYS)
    y = tl.load(positions + key * 2, mask=key < keys, other=0.0)
    x = tl.load(positions + key * 2 + 1, mask=key < keys, other=0.0)
    return k_block, v_block, y, x


@triton.jit
def _query_grid(start, map_width, step_y, start_y, step_x, start_x, BLOCK: tl.constexpr):
    query = start + tl.arange(0, BLOCK)
    row, column = query // map_width, query % map_width
    return row.to(tl.float32) * step_y + start_y, column.to(tl.float32) * step_x + start_x


@triton.jit(do_not_specialize=SIZES)
def _forward(
    q, k, v, positions, table, out, sums,
    map_height, map_width, keys, heads, groups, rows, columns,
    step_y, start_y, step_x, start_x, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    queries = map_height * map_width
    blocks = tl.cdiv(queries, QUERIES)
    block, image_head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    start = block * QUERIES
    q, out = q + image * queries * heads * HEAD, out + image * queries * heads * HEAD
    k, v = k + image * keys * heads * HEAD, v + image * keys * heads * HEAD
    positions += (image * groups + head // (heads // groups)) * keys * 2
    table += head * rows * columns

    place, inside = _rows(q, start, queries, heads, head, HEAD, QUERIES, WIDTH)
    q_block = tl.load(place, mask=inside, other=0.0)
    y, x = _query_grid(start, map_width, step_y, start_y, step_x, start_x, QUERIES)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, WIDTH], tl.float32)
    for first in range(0, keys, KEYS):
        key = first + tl.arange(0, KEYS)
        k_block, v_block, key_y, key_x = _key_block(k, v, positions, first, keys, heads, head, HEAD, KEYS, WIDTH)
        cell_y = _cells(y[:, None], key_y[None, :], rows)
        cell_x = _cells(x[:, None], key_x[None, :], columns)
        logits = dot(q_block, tl.trans(k_block), PRECISION) * scale
        logits += _bias(table, cell_y, cell_x, rows, columns)
        logits = tl.where(key[None, :] < keys, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp(logits - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + dot(weights.to(v_block.dtype), v_block, PRECISION)
        largest = new_largest
    place, inside = _rows(out, start, queries, heads, head, HEAD, QUERIES, WIDTH)
    tl.store(place, (result / total[:, None]).to(out.dtype.element_ty), mask=inside)
    query = start + tl.arange(0, QUERIES)
    tl.store(sums + image_head * queries + query, largest + tl.log(total), mask=query < queries)


@triton.jit(do_not_specialize=SIZES)
def _backward_queries(
    q, k, v, positions, table, out, sums, grad, dq, products,
    map_height, map_width, keys, heads, groups, rows, columns,
    step_y, start_y, step_x, start_x, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the queries, and ``sum(G * O)`` of every query for the other kernels."""
    queries = map_height * map_width
    blocks = tl.cdiv(queries, QUERIES)
    block, image_head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    start = block * QUERIES
    offset = image * queries * heads * HEAD
    k, v = k + image * keys * heads * HEAD, v + image * keys * heads * HEAD
    positions += (image * groups + head // (heads // groups)) * keys * 2
    table += head * rows * columns

    place, inside = _rows(q + offset, start, queries, heads, head, HEAD, QUERIES, WIDTH)
    q_block = tl.load(place, mask=inside, other=0.0)
    place = _rows(grad + offset, start, queries, heads, head, HEAD, QUERIES, WIDTH)[0]
    grad_block = tl.load(place, mask=inside, other=0.0)
    place = _rows(out + offset, start, queries, heads, head, HEAD, QUERIES, WIDTH)[0]
    product = tl.sum(grad_block.to(tl.float32) * tl.load(place, mask=inside, other=0.0).to(tl.float32), 1)
    query = start + tl.arange(0, QUERIES)
    tl.store(products + image_head * queries + query, product, mask=query < queries)
    total = tl.load(sums + image_head * queries + query, mask=query < queries, other=0.0)
    y, x = _query_grid(start, map_width, step_y, start_y, step_x, start_x, QUERIES)
    result = tl.zeros([QUERIES, WIDTH], tl.float32)
    for first in range(0, keys, KEYS):
        key = first + tl.arange(0, KEYS)
        k_block, v_block, key_y, key_x = _key_block(k, v, positions, first, keys, heads, head, HEAD, KEYS, WIDTH)
        cell_y = _cells(y[:, None], key_y[None, :], rows)
        cell_x = _cells(x[:, None], key_x[None, :], columns)
        logits = dot(q_block, tl.trans(k_block), PRECISION) * scale
        logits += _bias(table, cell_y, cell_x, rows, columns)
        weights = tl.where(key[None, :] < keys, tl.exp(logits - total[:, None]), 0.0)
        dlogits = weights * (dot(grad_block, tl.trans(v_block), PRECISION) - product[:, None])
        result += dot(dlogits.to(k_block.dtype), k_block, PRECISION)
    place, inside = _rows(dq + offset, start, queries, heads, head, HEAD, QUERIES, WIDTH)
    tl.store(place, (result * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _backward_keys(
    q, k, v, positions, table, sums, products, grad, dk, dv, dpositions,
    map_height, map_width, keys, heads, groups, rows, columns,
    step_y, start_y, step_x, start_x, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of keys and values, and that of the positions for every head, ``[B, heads, Ns, 2]``."""
    queries = map_height * map_width
    blocks = tl.cdiv(keys, KEYS)
    block, image_head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    first = block * KEYS
    q, grad = q + image * queries * heads * HEAD, grad + image * queries * heads * HEAD
    offset = image * keys * heads * HEAD
    positions += (image * groups + head // (heads // groups)) * keys * 2
    table += head * rows * columns

    key = first + tl.arange(0, KEYS)
    k_block, v_block, key_y, key_x = _key_block(
        k + offset, v + offset, positions, first, keys, heads, head, HEAD, KEYS, WIDTH
    )
    to_k, to_v = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    to_y, to_x = tl.zeros([KEYS], tl.float32), tl.zeros([KEYS], tl.float32)
    for start in range(0, queries, QUERIES):
        query = start + tl.arange(0, QUERIES)
        q_place, inside = _rows(q, start, queries, heads, head, HEAD, QUERIES, WIDTH)
        grad_place = _rows(grad, start, queries, heads, head, HEAD, QUERIES, WIDTH)[0]
        q_block = tl.load(q_place, mask=inside, other=0.0)
        grad_block = tl.load(grad_place, mask=inside, other=0.0)
        total = tl.load(sums + image_head * queries + query, mask=query < queries, other=0.0)
        product = tl.load(products + image_head * queries + query, mask=query < queries, other=0.0)
        y, x = _query_grid(start, map_width, step_y, start_y, step_x, start_x, QUERIES)
        cell_y = _cells(y[None, :], key_y[:, None], rows)
        cell_x = _cells(x[None, :], key_x[:, None], columns)
        a, b, c, d, down, right = _corners(table, cell_y, cell_x, rows, columns)
        logits = dot(k_block, tl.trans(q_block), PRECISION) * scale
        logits += (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)
        weights = tl.where(query[None, :] < queries, tl.exp(logits - total[None, :]), 0.0)
        to_v += dot(weights.to(grad_block.dtype), grad_block, PRECISION)
        dlogits = weights * (dot(v_block, tl.trans(grad_block), PRECISION) - product[None, :])
        to_k += dot(dlogits.to(q_block.dtype), q_block, PRECISION)
        to_y += tl.sum(dlogits * ((1 - right) * (c - a) + right * (d - b)), 1)
        to_x += tl.sum(dlogits * ((1 - down) * (b - a) + down * (d - c)), 1)
    place, key_inside = _rows(dk + offset, first, keys, heads, head, HEAD, KEYS, WIDTH)
    tl.store(place, (to_k * scale).to(dk.dtype.element_ty), mask=key_inside)
    place = _rows(dv + offset, first, keys, heads, head, HEAD, KEYS, WIDTH)[0]
    tl.store(place, to_v.to(dv.dtype.element_ty), mask=key_inside)
    place = dpositions + (image_head * keys + key) * 2
    tl.store(place, to_y * (-0.25 * (rows - 1)), mask=key < keys)
    tl.store(place + 1, to_x * (-0.25 * (columns - 1)), mask=key < keys)


@triton.jit(do_not_specialize=SIZES)
def _backward_table(
    q, k, v, positions, table, sums, products, grad, dtable, images, parts,
    map_height, map_width, keys, heads, groups, rows, columns,
    step_y, start_y, step_x, start_x, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile of a head's table for some blocks of queries, ``[parts, heads, rows, columns]``."""
    queries = map_height * map_width
    across = tl.cdiv(columns, TILE)
    tiles = tl.cdiv(rows, TILE) * across
    tile, part_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    part, head = part_head // heads, part_head % heads
    top, left = (tile // across) * TILE, (tile % across) * TILE
    row, column = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    table += head * rows * columns
    pixel = tl.arange(0, SIDE * SIDE)
    dim = tl.arange(0, WIDTH)
    result = tl.zeros([TILE, TILE], tl.float32)
    blocks_across = tl.cdiv(map_width, SIDE)
    blocks = tl.cdiv(map_height, SIDE) * blocks_across
    for block in range(part, images * blocks, parts):
        image = (block // blocks).to(tl.int64)
        first_row, first_column = block % blocks // blocks_across * SIDE, block % blocks_across * SIDE
        map_row, map_column = first_row + pixel // SIDE, first_column + pixel % SIDE
        there = (map_row < map_height) & (map_column < map_width)
        query = map_row * map_width + map_column
        offset = ((image * queries + query[:, None]) * heads + head) * HEAD + dim[None, :]
        inside = there[:, None] & (dim[None, :] < HEAD)
        q_block = tl.load(q + offset, mask=inside, other=0.0).to(tl.float32)
        grad_block = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(sums + (image * heads + head) * queries + query, mask=there, other=0.0)
        product = tl.load(products + (image * heads + head) * queries + query, mask=there, other=0.0)
        y = (first_row + tl.arange(0, SIDE)).to(tl.float32) * step_y + start_y
        x = (first_column + tl.arange(0, SIDE)).to(tl.float32) * step_x + start_x
        pixel_y = map_row.to(tl.float32) * step_y + start_y
        pixel_x = map_column.to(tl.float32) * step_x + start_x
        places = positions + (image * groups + head // (heads // groups)) * keys * 2
        for key in range(0, keys):
            key_y, key_x = tl.load(places + key * 2), tl.load(places + key * 2 + 1)
            cell_y, cell_x = _cells(y, key_y, rows), _cells(x, key_x, columns)
            meets = (tl.max(cell_y, 0) > top - 1) & (tl.min(cell_y, 0) < top + TILE)
            meets &= (tl.max(cell_x, 0) > left - 1) & (tl.min(cell_x, 0) < left + TILE)
            if meets:
                key_offset = ((image * keys + key) * heads + head) * HEAD + dim
                one_key = tl.load(k + key_offset, mask=dim < HEAD, other=0.0).to(tl.float32)
                value = tl.load(v + key_offset, mask=dim < HEAD, other=0.0).to(tl.float32)
                bias = _bias(table, _cells(pixel_y, key_y, rows), _cells(pixel_x, key_x, columns), rows, columns)
                logits = tl.sum(q_block * one_key[None, :], 1) * scale + bias
                weights = tl.where(there, tl.exp(logits - total), 0.0)
                dlogits = weights * (tl.sum(grad_block * value[None, :], 1) - product)
                to_row = tl.maximum(1 - tl.abs(row[:, None].to(tl.float32) - cell_y[None, :]), 0.0)
                to_column = tl.maximum(1 - tl.abs(column[None, :].to(tl.float32) - cell_x[:, None]), 0.0)
                by_column = dot(tl.reshape(dlogits, [SIDE, SIDE]), to_column, "tf32x3")  # [SIDE, TILE]
                result += dot(to_row, by_column, "tf32x3")
    place = dtable + (part_head.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(place, result, mask=(row[:, None] < rows) & (column[None, :] < columns))


def _sizes(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, map_size: Sequence[int]) -> list[int]:
    return [*map_size, k.shape[1], q.shape[2], positions.shape[1], *table.shape[1:]]


def _blocks(q: Tensor) -> dict[str, int | str]:
    heads = head_blocks(q)
    wide = q.dtype == torch.float32 and heads["WIDTH"] > 64
    return {"QUERIES": QUERIES_WIDE if wide else QUERIES, "KEYS": KEYS, **heads, **LAUNCH}


@torch.library.custom_op(operator("deformable_attention"), mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    map_size: Sequence[int],
    steps: Sequence[float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H*W, heads, d]`` and the logsumexp ``[B, heads, H*W]``.

    Args:
        q: queries ``[B, H*W, heads, d]``, contiguous as everything here.
        k: keys ``[B, Ns, heads, d]``.
        v: values ``[B, Ns, heads, d]``.
        positions: ``[B, g, Ns, 2]``, float32.
        table: ``[heads, rows, columns]``.
        map_size: ``(H, W)``.
        steps: step and start of the query grid, on the y axis, then on the x axis.
        scale: factor of the products.
    """
    out = torch.empty_like(q)
    sums = q.new_empty(len(q), q.shape[2], q.shape[1], dtype=torch.float32)
    if q.numel():
        sizes, blocks = _sizes(q, k, positions, table, map_size), _blocks(q)
        programs = triton.cdiv(q.shape[1], blocks["QUERIES"]) * len(q) * q.shape[2]
        launch(_forward, programs, q, k, v, positions, table, out, sums, *sizes, *steps, scale, **blocks)
    return out, sums


@attention.register_fake
def _(q, k, v, positions, table, map_size, steps, scale) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op(operator("deformable_attention_backward"), mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor,
    out: Tensor,
    sums: Tensor,
    map_size: Sequence[int],
    steps: Sequence[float],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys, values, positions and table.

    ``grad`` is that of the output ``[B, H*W, heads, d]``; the other shapes are those of `attention`.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    images, heads, keys = len(q), q.shape[2], k.shape[1]
    if not q.numel():
        return dq, dk, dv, torch.zeros_like(positions), torch.zeros_like(table)
    products = torch.empty_like(sums)
    per_head = positions.new_empty(images, heads, keys, 2)
    shared = (*_sizes(q, k, positions, table, map_size), *steps, scale)
    blocks = _blocks(q)
    launch(
        _backward_queries, triton.cdiv(q.shape[1], blocks["QUERIES"]) * images * heads,
        q, k, v, positions, table, out, sums, grad, dq, products, *shared, **blocks,
    )  # fmt: skip
    launch(
        _backward_keys, triton.cdiv(keys, KEYS) * images * heads,
        q, k, v, positions, table, sums, products, grad, dk, dv, per_head, *shared, **blocks,
    )  # fmt: skip
    tile = min(TILE, max(16, triton.next_power_of_2(max(table.shape[1:]))))
    tiles = triton.cdiv(table.shape[1], tile) * triton.cdiv(table.shape[2], tile)
    blocks_of_queries = triton.cdiv(map_size[0], SIDE) * triton.cdiv(map_size[1], SIDE) * images
    parts = min(blocks_of_queries, triton.cdiv(PROGRAMS, tiles * heads))
    by_part = table.new_empty(parts, *table.shape, dtype=torch.float32)
    launch(
        _backward_table, tiles * parts * heads,
        q, k, v, positions, table, sums, products, grad, by_part, images, parts, *shared,
        HEAD=blocks["HEAD"], WIDTH=blocks["WIDTH"], SIDE=SIDE, TILE=tile, **LAUNCH,
    )  # fmt: skip
    dpositions = per_head.unflatten(1, (positions.shape[1], -1)).sum(2)
    return dq, dk, dv, dpositions, by_part.sum(0).to(table.dtype)


@attention_backward.register_fake
def _(grad, q, k, v, positions, table, out, sums, map_size, steps, scale) -> tuple[Tensor, ...]:  # noqa: ARG001
    return tuple(torch.empty_like(tensor) for tensor in (q, k, v, positions, table))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.map_size, ctx.steps, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    gradients = attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.map_size, ctx.steps, ctx.scale)
    return (*gradients, None, None, None)


attention.register_autograd(_differentiate, setup_context=_setup_context)
