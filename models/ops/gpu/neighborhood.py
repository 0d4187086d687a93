"""Neighborhood attention with a table of position biases, tile by tile: the weights are never written to memory.

A program processes a tile of queries and iterates over the rectangle of their keys with an online softmax
(FlashAttention, arXiv 2205.14135); keys outside the window of a query are masked. The backward pass recomputes the
weights three times: for the gradient of the queries; for those of the keys and values of a tile, over the queries that
attend to them; and for that of the table, where a program sums over all pairs of query and key at one offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..forms import operator
from .blocks import dot, head_blocks, launch

SIDE = 8  # side of a tile
PIXELS = 128  # queries per block in `_backward_table`
LAUNCH = {"BLOCK": 32, "num_warps": 4, "num_stages": 1}  # BLOCK: keys, or in `_backward_keys` queries, per block
# For float32 heads of more than 32 values, which would exceed the registers and the shared memory of many GPUs.
LAUNCH_WIDE = {"BLOCK": 16, "num_warps": 8, "num_stages": 1}
PROGRAMS = 4096  # programs of `_backward_table` to aim for: images are split into parts to reach this number
SIZES = ("height", "width", "images", "parts")  # see `launch`


@triton.jit
def _window(query, length, KERNEL: tl.constexpr):
    """Return the first key of a query's window on one axis."""
    return tl.minimum(tl.maximum(query - KERNEL // 2, 0), length - KERNEL)


@triton.jit
def _span(first, length, KERNEL: tl.constexpr, SIDE: tl.constexpr):
    """Return the first key of the windows of a tile on one axis, and the number of keys."""
    begin = _window(first, length, KERNEL)
    return begin, _window(tl.minimum(first + SIDE, length) - 1, length, KERNEL) + KERNEL - begin


@triton.jit
def _logits(q_block, k_block, table, query_y, query_x, key_y, key_x, height, width, scale,
            KERNEL: tl.constexpr, TABLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Return the logits of queries along the first axis and keys along the second, minus infinity outside a window."""
    first_y, first_x = _window(query_y, height, KERNEL), _window(query_x, width, KERNEL)
    sees = (key_y >= first_y) & (key_y < first_y + KERNEL) & (key_x >= first_x) & (key_x < first_x + KERNEL)
    sees &= (query_y < height) & (query_x < width)
    logits = dot(q_block, tl.trans(k_block), PRECISION) * scale
    if TABLE:
        cell = (key_y - query_y + KERNEL - 1) * (2 * KERNEL - 1) + key_x - query_x + KERNEL - 1
        logits += tl.load(table + cell, mask=sees, other=0.0).to(tl.float32)
    return tl.where(sees, logits, float("-inf"))


@triton.jit
def _pixels(x, y, x_axis, height, width, row, step, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Return pointers to and mask of the vectors of pixels in a map of one head."""
    dim = tl.arange(0, WIDTH)
    inside = (y < height) & (x_axis < width)
    return x + y[:, None] * row + x_axis[:, None] * step + dim[None, :], inside[:, None] & (dim[None, :] < HEAD)


@triton.jit
def _key_block(k, v, y, x, height, width, row, step, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Return the keys and values of pixels."""
    place, inside = _pixels(k, y, x, height, width, row, step, HEAD, WIDTH)
    v_place = _pixels(v, y, x, height, width, row, step, HEAD, WIDTH)[0]
    return tl.load(place, mask=inside, other=0.0), tl.load(v_place, mask=inside, other=0.0)


@triton.jit
def _tile(height, width, heads, SIDE: tl.constexpr):
    """Return image and head of a program, top and left of its tile, and the rows and columns of the tile's pixels."""
    across = tl.cdiv(width, SIDE)
    tiles = tl.cdiv(height, SIDE) * across
    tile, image_head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.arange(0, SIDE * SIDE)
    top, left = (tile // across) * SIDE, (tile % across) * SIDE
    return image_head // heads, image_head % heads, top, left, top + pixel // SIDE, left + pixel % SIDE


@triton.jit(do_not_specialize=SIZES)
def _forward(
    q, k, v, table, out, sums,
    height, width, heads, image_step, row_step, pixel_step, head_step, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr, TABLE: tl.constexpr, SIDE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head, top, left, y, x = _tile(height, width, heads, SIDE)
    offset = image * image_step + head * head_step
    q, k, v = q + offset, k + offset, v + offset
    table += head * (2 * KERNEL - 1) * (2 * KERNEL - 1)
    place, inside = _pixels(q, y, x, height, width, row_step, pixel_step, HEAD, WIDTH)
    q_block = tl.load(place, mask=inside, other=0.0)

    first_y, rows = _span(top, height, KERNEL, SIDE)
    first_x, columns = _span(left, width, KERNEL, SIDE)
    largest = tl.full([SIDE * SIDE], float("-inf"), tl.float32)
    total = tl.zeros([SIDE * SIDE], tl.float32)
    result = tl.zeros([SIDE * SIDE, WIDTH], tl.float32)
    for first in range(0, rows * columns, BLOCK):
        key = first + tl.arange(0, BLOCK)
        key_y, key_x = first_y + key // columns, first_x + key % columns
        k_block, v_block = _key_block(k, v, key_y, key_x, height, width, row_step, pixel_step, HEAD, WIDTH)
        logits = _logits(
            q_block, k_block, table, y[:, None], x[:, None], key_y[None, :], key_x[None, :], height, width, scale,
            KERNEL, TABLE, PRECISION,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        reference = tl.where(new_largest > float("-inf"), new_largest, 0.0)  # a query without keys so far
        weights = tl.exp(logits - reference[:, None])
        shrink = tl.exp(largest - reference)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + dot(weights.to(v_block.dtype), v_block, PRECISION)
        largest = new_largest
    total = tl.where(total > 0, total, 1.0)  # of queries beyond the map
    pixels = (image * height + y) * width + x
    place, inside = _pixels(out, y, x, height, width, width * heads * HEAD, heads * HEAD, HEAD, WIDTH)
    place += (image * height * width * heads + head) * HEAD
    tl.store(place, (result / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(sums + pixels * heads + head, largest + tl.log(total), mask=(y < height) & (x < width))


@triton.jit(do_not_specialize=SIZES)
def _backward_queries(
    q, k, v, table, out, sums, grad, dq, products,
    height, width, heads, image_step, row_step, pixel_step, head_step, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr, TABLE: tl.constexpr, SIDE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the queries, and ``sum(G * O)`` of every query for the other kernels."""
    image, head, top, left, y, x = _tile(height, width, heads, SIDE)
    offset = image * image_step + head * head_step
    q, k, v = q + offset, k + offset, v + offset
    plain = (image * height * width * heads + head) * HEAD
    table += head * (2 * KERNEL - 1) * (2 * KERNEL - 1)
    place, inside = _pixels(q, y, x, height, width, row_step, pixel_step, HEAD, WIDTH)
    q_block = tl.load(place, mask=inside, other=0.0)
    place = _pixels(grad + plain, y, x, height, width, width * heads * HEAD, heads * HEAD, HEAD, WIDTH)[0]
    grad_block = tl.load(place, mask=inside, other=0.0)
    place = _pixels(out + plain, y, x, height, width, width * heads * HEAD, heads * HEAD, HEAD, WIDTH)[0]
    product = tl.sum(grad_block.to(tl.float32) * tl.load(place, mask=inside, other=0.0).to(tl.float32), 1)
    pixels, there = ((image * height + y) * width + x) * heads + head, (y < height) & (x < width)
    tl.store(products + pixels, product, mask=there)
    total = tl.load(sums + pixels, mask=there, other=0.0)

    first_y, rows = _span(top, height, KERNEL, SIDE)
    first_x, columns = _span(left, width, KERNEL, SIDE)
    result = tl.zeros([SIDE * SIDE, WIDTH], tl.float32)
    for first in range(0, rows * columns, BLOCK):
        key = first + tl.arange(0, BLOCK)
        key_y, key_x = first_y + key // columns, first_x + key % columns
        k_block, v_block = _key_block(k, v, key_y, key_x, height, width, row_step, pixel_step, HEAD, WIDTH)
        logits = _logits(
            q_block, k_block, table, y[:, None], x[:, None], key_y[None, :], key_x[None, :], height, width, scale,
            KERNEL, TABLE, PRECISION,
        )  # fmt: skip
        weights = tl.exp(logits - total[:, None])
        dlogits = weights * (dot(grad_block, tl.trans(v_block), PRECISION) - product[:, None])
        result += dot(dlogits.to(k_block.dtype), k_block, PRECISION)
    place = _pixels(dq + plain, y, x, height, width, width * heads * HEAD, heads * HEAD, HEAD, WIDTH)[0]
    tl.store(place, (result * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _viewers(first, last, length, KERNEL: tl.constexpr):
    """Return the first and the last query on one axis that attend to any of the keys from ``first`` to ``last``."""
    # Windows at the border are moved inwards, so the keys next to it are visible to all queries up to the border.
    begin = tl.where(first < KERNEL, 0, first - KERNEL // 2)
    return begin, tl.where(last >= length - KERNEL, length - 1, last + KERNEL // 2)


@triton.jit(do_not_specialize=SIZES)
def _backward_keys(
    q, k, v, table, sums, products, grad, dk, dv,
    height, width, heads, image_step, row_step, pixel_step, head_step, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr, TABLE: tl.constexpr, SIDE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of keys and values."""
    image, head, top, left, y, x = _tile(height, width, heads, SIDE)
    offset = image * image_step + head * head_step
    q, k, v = q + offset, k + offset, v + offset
    plain = (image * height * width * heads + head) * HEAD
    grad += plain
    table += head * (2 * KERNEL - 1) * (2 * KERNEL - 1)
    k_block, v_block = _key_block(k, v, y, x, height, width, row_step, pixel_step, HEAD, WIDTH)

    first_y, last_y = _viewers(top, tl.minimum(top + SIDE, height) - 1, height, KERNEL)
    first_x, last_x = _viewers(left, tl.minimum(left + SIDE, width) - 1, width, KERNEL)
    columns = last_x - first_x + 1
    to_k = tl.zeros([SIDE * SIDE, WIDTH], tl.float32)
    to_v = tl.zeros([SIDE * SIDE, WIDTH], tl.float32)
    for first in range(0, (last_y - first_y + 1) * columns, BLOCK):
        query = first + tl.arange(0, BLOCK)
        query_y, query_x = first_y + query // columns, first_x + query % columns
        there = (query_y <= last_y) & (query_x < width)
        q_place, q_inside = _pixels(q, query_y, query_x, height, width, row_step, pixel_step, HEAD, WIDTH)
        q_block = tl.load(q_place, mask=q_inside, other=0.0)
        grad_place = _pixels(grad, query_y, query_x, height, width, width * heads * HEAD, heads * HEAD, HEAD, WIDTH)[0]
        grad_block = tl.load(grad_place, mask=q_inside, other=0.0)
        pixels = ((image * height + query_y) * width + query_x) * heads + head
        total = tl.load(sums + pixels, mask=there, other=0.0)
        product = tl.load(products + pixels, mask=there, other=0.0)
        logits = _logits(
            q_block, k_block, table, query_y[:, None], query_x[:, None], y[None, :], x[None, :], height, width, scale,
            KERNEL, TABLE, PRECISION,
        )  # fmt: skip
        weights = tl.where(there[:, None], tl.exp(logits - total[:, None]), 0.0)
        to_v += dot(tl.trans(weights.to(grad_block.dtype)), grad_block, PRECISION)
        dlogits = weights * (dot(grad_block, tl.trans(v_block), PRECISION) - product[:, None])
        to_k += dot(tl.trans(dlogits.to(q_block.dtype)), q_block, PRECISION)
    place, inside = _pixels(dk + plain, y, x, height, width, width * heads * HEAD, heads * HEAD, HEAD, WIDTH)
    tl.store(place, (to_k * scale).to(dk.dtype.element_ty), mask=inside)
    place = _pixels(dv + plain, y, x, height, width, width * heads * HEAD, heads * HEAD, HEAD, WIDTH)[0]
    tl.store(place, to_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _backward_table(
    q, k, v, table, sums, products, grad, dtable, images, parts,
    height, width, heads, image_step, row_step, pixel_step, head_step, scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one cell of the table for some of the images, ``[parts, heads, 2*K-1, 2*K-1]``."""
    cells: tl.constexpr = (2 * KERNEL - 1) * (2 * KERNEL - 1)
    cell, part_head = tl.program_id(0) % cells, tl.program_id(0) // cells
    part, head = part_head // heads, part_head % heads
    offset_y, offset_x = cell // (2 * KERNEL - 1) - KERNEL + 1, cell % (2 * KERNEL - 1) - KERNEL + 1
    bias = tl.load(table + head * cells + cell).to(tl.float32)
    # Offsets beyond half a window occur only at the border, where windows are moved inwards.
    begin = tl.where(offset_y < -(KERNEL // 2), height - KERNEL // 2, 0) * width
    end = tl.where(offset_y > KERNEL // 2, KERNEL // 2, height) * width
    result = tl.zeros([PIXELS], tl.float32)
    for step in range(0, tl.cdiv(images - part, parts)):
        image = part.to(tl.int64) + step * parts
        offset = image * image_step + head * head_step
        for first in range(begin, end, PIXELS):
            pixel = first + tl.arange(0, PIXELS)
            y, x = pixel // width, pixel % width
            key_y, key_x = y + offset_y, x + offset_x
            first_y, first_x = _window(y, height, KERNEL), _window(x, width, KERNEL)
            sees = (key_y >= first_y) & (key_y < first_y + KERNEL) & (key_x >= first_x) & (key_x < first_x + KERNEL)
            sees &= pixel < end
            place, inside = _pixels(offset, y, x, height, width, row_step, pixel_step, HEAD, WIDTH)
            inside &= sees[:, None]
            key_place = place + offset_y * row_step + offset_x * pixel_step
            plain = _pixels(
                (image * height * width * heads + head) * HEAD, y, x, height, width, width * heads * HEAD, heads * HEAD,
                HEAD, WIDTH,
            )[0]  # fmt: skip
            queries = tl.load(q + place, mask=inside, other=0.0).to(tl.float32)
            keys = tl.load(k + key_place, mask=inside, other=0.0).to(tl.float32)
            values = tl.load(v + key_place, mask=inside, other=0.0).to(tl.float32)
            grads = tl.load(grad + plain, mask=inside, other=0.0).to(tl.float32)
            pixels = (image * height * width + pixel) * heads + head
            total = tl.load(sums + pixels, mask=sees, other=0.0)
            product = tl.load(products + pixels, mask=sees, other=0.0)
            weights = tl.exp(tl.sum(queries * keys, 1) * scale + bias - total)
            result += tl.where(sees, weights * (tl.sum(grads * values, 1) - product), 0.0)
    tl.store(dtable + part_head * cells + cell, tl.sum(result, 0))


def _strides(*maps: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return maps ``[B, H, W, heads, d]`` with equal strides, and these strides without the last, which is 1."""
    if any(x.stride() != maps[0].stride() or x.stride(-1) != 1 for x in maps):
        maps = [x.contiguous() for x in maps]
    return list(maps), maps[0].stride()[:-1]


def _blocks(q: Tensor, kernel_size: int) -> dict[str, int | str | bool]:
    heads = head_blocks(q)
    wide = q.dtype == torch.float32 and heads["WIDTH"] > 32
    return {**heads, "KERNEL": kernel_size, "SIDE": SIDE, **(LAUNCH_WIDE if wide else LAUNCH)}


def _programs(q: Tensor) -> int:
    """Return the number of tiles of all images and heads."""
    return triton.cdiv(q.shape[1], SIDE) * triton.cdiv(q.shape[2], SIDE) * q.shape[0] * q.shape[3]


@torch.library.custom_op(operator("neighborhood_attention"), mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, W, heads, d]`` and the logsumexp ``[B, H, W, heads]``.

    Args:
        q: queries ``[B, H, W, heads, d]``.
        k: keys ``[B, H, W, heads, d]``.
        v: values ``[B, H, W, heads, d]``.
        rpb: relative position bias ``[heads, 2*kernel_size-1, 2*kernel_size-1]``, contiguous, or None.
        kernel_size: odd side of the window, at most H and W.
        scale: factor of the products.
    """
    out, sums = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    (q, k, v), strides = _strides(q, k, v)
    if q.numel():
        table = sums if rpb is None else rpb
        launch(
            _forward, _programs(q),
            q, k, v, table, out, sums, *q.shape[1:4], *strides, scale, TABLE=rpb is not None, **_blocks(q, kernel_size),
        )  # fmt: skip
    return out, sums


@attention.register_fake
def _(q, k, v, rpb, kernel_size, scale) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(operator("neighborhood_attention_backward"), mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    sums: Tensor,
    kernel_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys, values and table; the last is empty if there is no table.

    ``grad`` is that of the output ``[B, H, W, heads, d]``; the other shapes are those of `attention`.
    """
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    if not q.numel():
        return dq, dk, dv, q.new_empty(0) if rpb is None else torch.zeros_like(rpb)
    (q, k, v), strides = _strides(q, k, v)
    products = torch.empty_like(sums)
    shared = (*q.shape[1:4], *strides, scale)
    blocks = {"TABLE": rpb is not None, **_blocks(q, kernel_size)}
    table = sums if rpb is None else rpb
    launch(_backward_queries, _programs(q), q, k, v, table, out, sums, grad, dq, products, *shared, **blocks)
    launch(_backward_keys, _programs(q), q, k, v, table, sums, products, grad, dk, dv, *shared, **blocks)
    if rpb is None:
        return dq, dk, dv, q.new_empty(0)
    parts = min(len(q), triton.cdiv(PROGRAMS, rpb.numel()))
    by_part = rpb.new_empty(parts, *rpb.shape, dtype=torch.float32)
    launch(
        _backward_table, by_part.numel(),
        q, k, v, rpb, sums, products, grad, by_part, len(q), parts, *shared,
        PIXELS=PIXELS, **{name: blocks[name] for name in ("HEAD", "WIDTH", "KERNEL", "num_warps", "num_stages")},
    )  # fmt: skip
    return dq, dk, dv, by_part.sum(0).to(rpb.dtype)


@attention_backward.register_fake
def _(grad, q, k, v, rpb, out, sums, kernel_size, scale) -> tuple[Tensor, ...]:  # noqa: ARG001
    maps = (q.new_empty(q.shape) for _ in range(3))
    return *maps, q.new_empty(0) if rpb is None else torch.empty_like(rpb)


def _setup_context(ctx, inputs: Sequence, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernel_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    *gradients, to_table = attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.kernel_size, ctx.scale)
    return (*gradients, to_table if ctx.saved_tensors[3] is not None else None, None, None)


attention.register_autograd(_differentiate, setup_context=_setup_context)
