"""A weight on a GPU for products with up to 64 vectors, in Triton, by tensor cores: each program builds tiles of the
dense weight from values and bits, and multiplies them before they reach memory.

A tile is 64 rows and 64 columns: 512 bytes of bits, and its values from a multiple of eight on. Both lie in the order
in which threads hold the weights of a matrix product (the left operand of PTX's mma.m16n8k16 and of wgmma), 32 of them
each, so that what a thread has rebuilt is what it multiplies. Ranks within a tile come from its bits alone, as in
triton_moves.py, so its place is all that is stored beside them. A position costs the same whether it is kept or not,
and all vectors share that cost. Programs divide the columns of a block of rows among them, and a second launch adds up
their sums, always in one order.
"""

import torch
import triton
import triton.language as tl

from sparse_train.kernels.reference import GROUP, pack, unpack
from sparse_train.kernels.triton_moves import load_bytes
from sparse_train.kernels.triton_runs import add_sums, pack_codes

_SIZE = 64
_PROGRAMS = 512
"""At least, where the weight has that many tiles: four on each multiprocessor of a large GPU."""


class Tiles:
    """`values` (nnz,) bfloat16, int8, or codes of four bits as int8; `scale` as DeviceMatrix takes it."""

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, num_columns: int, scale: torch.Tensor | None,
                 value_bits: int):
        self.shape = num_rows, num_columns = len(bitmask), num_columns
        self._scale, self._value_bits = scale, value_bits
        self._grid = num_blocks, num_words = -(-num_rows // _SIZE), bitmask.shape[1] // 8
        rows, columns = unpack(bitmask, num_columns).nonzero(as_tuple=True)
        num_tiles = num_blocks * num_words
        place = (rows // _SIZE * num_words + columns // _SIZE) * _SIZE ** 2 + _place(rows % _SIZE, columns % _SIZE)
        keep = torch.zeros(num_tiles, _SIZE ** 2, dtype=torch.bool, device=rows.device)
        keep.view(-1)[place] = True
        self._bits = pack(keep)
        place, order = place.sort()
        tile = place // _SIZE ** 2
        counts = tile.bincount(minlength=num_tiles)
        eights = -(-counts // 8)
        self._firsts = torch.nn.functional.pad(eights.cumsum(0), (1, 0)).int()
        place = torch.arange(len(tile), device=tile.device) + (8 * self._firsts[:-1] - counts.cumsum(0) + counts)[tile]
        self.values = values.new_zeros(8 * int(self._firsts[-1])).index_copy(0, place, values[order])
        if self._value_bits == 4:
            self.values = pack_codes(self.values + 8, 4)
        self.tensors = (self.values, self._bits, self._firsts, scale)
        """What a product reads of the weight."""
        # More than there are, so that ranks behind the last value lie within, and enough for a vector load.
        self._most = triton.next_power_of_2(min(max(counts.tolist(), default=0) + 15, _SIZE * _SIZE))

        self._words_per_split = -(-num_words // min(num_words, -(-_PROGRAMS // max(1, num_blocks))))
        self._num_splits = -(-num_words // self._words_per_split)

    def _launch(self, kernel, grid, *arguments, **constants) -> None:
        kernel[grid](self.values, self._bits, self._firsts, self._scale, *arguments, *self.shape, self._grid[1],
                     VALUE_BITS=self._value_bits, MOST=self._most, SIZE=_SIZE, GROUP=GROUP, num_warps=4,
                     sanitize_overflow=False, enable_fp_fusion=True, **constants)

    def multiply(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """y (B, R) = x (B, C) W^T, both contiguous BF16."""
        sums = x.new_empty(self._num_splits, *y.shape, dtype=torch.float32)
        self._launch(_multiply, (self._grid[0], self._num_splits), x, sums, len(x),
                     VECTORS=max(16, triton.next_power_of_2(len(x))), WORDS=self._words_per_split, STAGES=3)
        add_sums(sums, y)

    def expand(self) -> torch.Tensor:
        """-> the weight (R, C) BF16, to which scaled integers are rounded."""
        dense = self.values.new_empty(*self.shape, dtype=torch.bfloat16)
        self._launch(_expand, self._grid, dense)
        return dense


def _place(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Of a position in its tile: the number of its thread, then its own among the 32 of that thread."""
    thread = (row // 16 * 8 + row % 8) * 4 + column // 2 % 4
    return thread * 32 + column // 8 * 4 + row // 8 % 2 * 2 + column % 2


@triton.jit
def _nibbles(word):
    """(N,) uint32 -> (N, 8): digit j and what is above it, all eight in the thread that has the word."""
    pairs = tl.join(word, word >> 16)
    pairs = tl.join(pairs, pairs >> 8)
    return tl.reshape(tl.join(pairs, pairs >> 4), [word.numel, 8])


@triton.jit
def _load_tile(values, bits, firsts, tile, VALUE_BITS: tl.constexpr, MOST: tl.constexpr, SIZE: tl.constexpr):
    """-> (SIZE, SIZE) BF16, integers without their scale."""
    _, digits = load_bytes(bits, tile, tl.arange(0, SIZE * SIZE // 8), SIZE * SIZE // 8)
    first = tl.load(firsts + tile)
    eights = tl.load(firsts + tile + 1) - first
    if VALUE_BITS == 4:
        place = tl.arange(0, MOST // 2)
        pair = tl.load(values + first * 4 + place, mask=place < eights * 4, other=0)
        value = tl.reshape(tl.join(pair & 15, pair >> 4), [MOST]).to(tl.int32) - 8
    else:
        place = tl.arange(0, MOST)
        value = tl.load(values + first * 8 + place, mask=place < eights * 8, other=0)
    if VALUE_BITS < 16:
        value = value.to(tl.float32).to(tl.bfloat16)
    sums = digits * 0x11111111  # digit j: how many of the bits 0..j are set
    count = (sums >> 28).to(tl.int32)
    rank = (tl.cumsum(count) - count)[:, None] + (_nibbles(sums - digits) & 15).to(tl.int32)
    found = tl.reshape(tl.gather(value, tl.reshape(rank, [SIZE * SIZE]), 0), rank.shape)
    weight = tl.reshape(tl.where(_nibbles(digits) & 1 != 0, found, 0.0), [SIZE // 16, 8, 4, SIZE // 8, 2, 2])
    return tl.reshape(tl.permute(weight, [0, 4, 1, 3, 2, 5]), [SIZE, SIZE])  # as `_place` says


@triton.jit
def _group_scale(scale, row, word, num_rows, num_columns, SIZE: tl.constexpr, GROUP: tl.constexpr):
    place = row * tl.cdiv(num_columns, GROUP) + word * SIZE // GROUP
    return tl.load(scale + place, mask=row < num_rows, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "num_vectors"])
def _multiply(values, bits, firsts, scale, x, sums, num_vectors, num_rows, num_columns, num_words,
              VALUE_BITS: tl.constexpr, MOST: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr,
              VECTORS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr):
    block, split = tl.program_id(0), tl.program_id(1)
    row, vector = block * SIZE + tl.arange(0, SIZE), tl.arange(0, VECTORS)
    total = tl.zeros([SIZE, VECTORS], tl.float32)
    for word in tl.range(split * WORDS, tl.minimum(split * WORDS + WORDS, num_words), num_stages=STAGES):
        column = word * SIZE + tl.arange(0, SIZE)
        activations = tl.load(x + vector[None, :] * num_columns + column[:, None],
                              mask=(vector[None, :] < num_vectors) & (column[:, None] < num_columns), other=0)
        weight = _load_tile(values, bits, firsts, block * num_words + word, VALUE_BITS, MOST, SIZE)
        if VALUE_BITS == 4:
            group = _group_scale(scale, row, word, num_rows, num_columns, SIZE, GROUP)
            total += tl.dot(weight, activations) * group[:, None]
        else:
            total = tl.dot(weight, activations, total)
    if VALUE_BITS == 8:
        total *= tl.load(scale + row, mask=row < num_rows, other=0)[:, None]
    tl.store(sums + (split * num_vectors + vector[None, :]).to(tl.int64) * num_rows + row[:, None], total,
             mask=(vector[None, :] < num_vectors) & (row[:, None] < num_rows))


@triton.jit(do_not_specialize=["num_rows"])
def _expand(values, bits, firsts, scale, dense, num_rows, num_columns, num_words, VALUE_BITS: tl.constexpr,
            MOST: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr):
    block, word = tl.program_id(0), tl.program_id(1)
    row, column = (block * SIZE + tl.arange(0, SIZE)).to(tl.int64), word * SIZE + tl.arange(0, SIZE)
    weight = _load_tile(values, bits, firsts, block * num_words + word, VALUE_BITS, MOST, SIZE)
    if VALUE_BITS == 8:
        weight = weight.to(tl.float32) * tl.load(scale + row, mask=row < num_rows, other=0)[:, None]
    if VALUE_BITS == 4:
        weight = weight.to(tl.float32) * _group_scale(scale, row, word, num_rows, num_columns, SIZE, GROUP)[:, None]
    tl.store(dense + row[:, None] * num_columns + column[None, :], weight,
             mask=(row[:, None] < num_rows) & (column[None, :] < num_columns))
