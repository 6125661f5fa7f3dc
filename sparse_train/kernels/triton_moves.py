"""Moving weights on a GPU, in Triton: expand and compact as launches on torch's current stream, which wait for nothing.

A row's bits are cut into tiles, and consecutive tiles (row-major) make a part, the work of one program. `_count_parts`
counts the kept positions of each part. A program of `_move_parts` adds up the counts before its own, so it knows where
its values start; within a tile, each byte of bits is eight positions of one thread.

Nothing is kept between calls. Under ZeRO-3 a bitmask is gathered into other memory each time, so neither its address
nor its tensor tells whether its bits are those of the last call. Counting reads R * C / 8 bytes and writes 4 per part;
the move then finds the bits in the L2 cache. docs/benchmarks.md says what that costs.

Values are moved as integers of their size, so every bit of them survives. Offsets have 64 bits where they need them.
"""

import torch
import triton
import triton.language as tl

from sparse_train.kernels.arguments import check_target, consecutive
from sparse_train.kernels.devices import DeviceKernels
from sparse_train.kernels.native import FLOATS

_MOST_BYTES = 256
"""Of a tile: 2048 positions, 16 of them for each of 128 threads."""
_MOST_PARTS = 2048
"""Enough for several rounds of programs on a large GPU. Each program reads the counts of those before it."""
_COUNTS = 1024
"""That it reads at a time."""
OPTIONS = {"sanitize_overflow": False, "enable_fp_fusion": False}
"""Of both kernels. Sums of digits may overflow; there is nothing to fuse, but leaving that open is a warning."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@triton.jit
def load_bytes(bits, row, place, row_bytes):
    """-> the bytes at these places of the row, and the same with bit j as hexadecimal digit j."""
    byte = tl.load(bits + row * row_bytes + place, mask=place < row_bytes, other=0).to(tl.uint32)
    digits = (byte | byte << 12) & 0x000F000F
    digits = (digits | digits << 6) & 0x03030303
    digits = (digits | digits << 3) & 0x11111111
    return byte, digits


@triton.jit
def _next_tile(row, tile, tiles_per_row):
    tile += 1
    return row + (tile == tiles_per_row), tl.where(tile == tiles_per_row, 0, tile)


@triton.jit(do_not_specialize=["tiles_per_row", "num_tiles", "tiles_per_part"])
def _count_parts(bits, counts, row_bytes, tiles_per_row, num_tiles, tiles_per_part, TILE_BYTES: tl.constexpr):
    part = tl.program_id(0)
    first = part * tiles_per_part
    row, tile = (first // tiles_per_row).to(tl.int64), first % tiles_per_row
    total = tl.zeros([TILE_BYTES], tl.uint32)
    for _ in range(tl.minimum(tiles_per_part, num_tiles - first)):
        _, digits = load_bytes(bits, row, tile * TILE_BYTES + tl.arange(0, TILE_BYTES), row_bytes)
        total += digits * 0x11111111 >> 28  # the sum of the eight digits
        row, tile = _next_tile(row, tile, tiles_per_row)
    tl.store(counts + part, tl.sum(total).to(tl.int32))


@triton.jit(do_not_specialize=["tiles_per_row", "num_tiles", "tiles_per_part", "num_values"], debug=True)
def _move_parts(dense, bits, values, counts, num_columns, row_bytes, tiles_per_row, num_tiles, tiles_per_part,
                num_values, EXPANDS: tl.constexpr, TILE_BYTES: tl.constexpr, COUNTS: tl.constexpr):
    part = tl.program_id(0)
    start = tl.cast(0, tl.int64)
    for first in range(0, part, COUNTS):
        index = first + tl.arange(0, COUNTS)
        start += tl.sum(tl.load(counts + index, mask=index < part, other=0).to(tl.int64))
    first = part * tiles_per_part
    row, tile = (first // tiles_per_row).to(tl.int64), first % tiles_per_row
    bit = tl.arange(0, 8)[None, :]
    for _ in range(tl.minimum(tiles_per_part, num_tiles - first)):
        place = tile * TILE_BYTES + tl.arange(0, TILE_BYTES)
        byte, digits = load_bytes(bits, row, place, row_bytes)
        column = place[:, None] * 8 + bit
        exists = column < num_columns
        if not EXPANDS:
            found = tl.load(dense + row * num_columns + column, mask=exists, other=0)
        sums = digits * 0x11111111  # digit j: how many of the bits 0..j are set
        count = (sums >> 28).to(tl.int32)
        rank = (tl.cumsum(count) - count)[:, None] + ((sums - digits)[:, None] >> 4 * bit & 15).to(tl.int32)
        num_left = tl.minimum(tl.maximum(num_values - start, 0), 8 * TILE_BYTES).to(tl.int32)
        keeps = (byte[:, None] & 1 << bit != 0) & (rank < num_left)
        if EXPANDS:
            found = tl.load(values + start + rank, mask=keeps, other=0)
            tl.store(dense + row * num_columns + column, found, mask=exists)
        else:
            tl.store(values + start + rank, found, mask=keeps)
        start += tl.sum(count)
        row, tile = _next_tile(row, tile, tiles_per_row)
    tl.device_assert((part != tl.num_programs(0) - 1) | (start == num_values),
                     "the bits keep another number of positions than there are values; both must come from one weight")


def _move(dense: torch.Tensor, bitmask: torch.Tensor, values: torch.Tensor, expands: bool) -> None:
    (num_rows, num_columns), row_bytes = dense.shape, bitmask.shape[1]
    if not dense.numel():
        return
    dense, values = (tensor.view(_INTEGERS[tensor.itemsize]) for tensor in (dense, values))
    tile_bytes = min(_MOST_BYTES, triton.next_power_of_2(row_bytes))
    tiles_per_row = triton.cdiv(row_bytes, tile_bytes)
    num_tiles = num_rows * tiles_per_row
    tiles_per_part = triton.cdiv(num_tiles, _MOST_PARTS)
    counts = torch.empty(triton.cdiv(num_tiles, tiles_per_part), dtype=torch.int32, device=dense.device)
    with torch.cuda.device_of(dense):
        _count_parts[counts.shape](bitmask, counts, row_bytes, tiles_per_row, num_tiles, tiles_per_part, tile_bytes,
                                   num_warps=1, **OPTIONS)
        _move_parts[counts.shape](dense, bitmask, values, counts, num_columns, row_bytes, tiles_per_row, num_tiles,
                                  tiles_per_part, values.numel(), expands, tile_bytes, _COUNTS, num_warps=4, **OPTIONS)


def expand(values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
           out: torch.Tensor | None = None) -> torch.Tensor:
    """As reference.expand. Where bits and values do not belong together, an assertion stops the device."""
    dense = check_target(out, (len(bitmask), num_columns), values)
    _move(dense, consecutive(bitmask), consecutive(values), expands=True)
    return dense


def compact(dense: torch.Tensor, bitmask: torch.Tensor, num_values: int,
            out: torch.Tensor | None = None) -> torch.Tensor:
    """As reference.compact. Where the bits keep another number than `num_values`, an assertion stops the device."""
    values = check_target(out, (num_values,), dense)
    _move(consecutive(dense), consecutive(bitmask), values, expands=False)
    return values


KERNELS = DeviceKernels((*FLOATS, torch.int8), expand, compact)
