"""A weight on a GPU for products with few vectors, in Triton, with work for nonzeros alone: the memory of data-centre
cards delivers a weight faster than a multiprocessor can test the bits of all its positions.

Columns are divided into panels of at most 4096. A panel's rows are sorted by their number of nonzeros, and 32 of them
that follow each other are a block, the work of one program. Eight threads share a row, and each has a run of it: as
many chunks of eight nonzeros as all others of its block. Sums of several panels are added up by a second launch. A
nonzero is its value and the distance to the one before it, in 4 or 8 bits, whichever makes fewer bytes of the weight; a
greater distance is bridged by zeros. Where every row keeps N of each M <= 16 columns, a nonzero's place in its M takes
that of the distance, and its number tells the rest. The chunks with one number are consecutive over the block, so that
a warp reads 512 bytes of BF16 values at a time. Activations lie in shared memory, those of up to four vectors at a
column in one word, so that the weight is read once for all of them.
"""

import torch
import triton
import triton.language as tl

from sparse_train.kernels.reference import GROUP, unpack

_ROWS, _LANES, _CHUNK = 32, 8, 8
_PANEL = 4096
"""A program stores the activations of so many columns again at each step; of four vectors they are 32 KB."""
_STAGES = 5
"""Four steps are on their way while one is multiplied: 20 KB of BF16 values and distances of four bits."""
_VECTORS = 4
"""For which a launch reads the weight once."""
_SUMS = 1024
"""That a program adds up."""


class Runs:
    """`values` (nnz,) bfloat16, int8, or codes of four bits as int8; `scale` as DeviceMatrix takes it."""

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, num_columns: int, scale: torch.Tensor | None,
                 value_bits: int):
        self.shape = num_rows, num_columns = len(bitmask), num_columns
        self._scale, self._value_bits = scale, value_bits
        keep = unpack(bitmask, num_columns)
        rows, columns = keep.nonzero(as_tuple=True)
        self._num_panels = -(-num_columns // _PANEL)
        self._width = -(-num_columns // (self._num_panels * GROUP)) * GROUP  # of a panel
        rows, sorting = (columns // self._width * num_rows + rows).sort(stable=True)  # of all panels
        columns, values = columns[sorting] % self._width, values[sorting]
        self._pattern = _pattern(keep)
        if self._pattern is None:
            missing = {bits: _missing(_distances(rows, columns), bits) for bits in (4, 8)}
            # A chunk of INT4 values must not lie in more than two groups.
            self._index_bits = 4 if self._value_bits == 4 else min(missing, key=lambda bits: (
                bits + self._value_bits) * (len(rows) + int(missing[bits].sum())))
            rows, columns, values = _bridge(rows, columns, values, missing[self._index_bits], self._index_bits)
        else:
            self._index_bits = 4

        counts = rows.bincount(minlength=self._num_panels * num_rows)
        most, order = counts.view(self._num_panels, num_rows).sort(dim=1, descending=True, stable=True)
        self._rows = torch.nn.functional.pad(order.int(), (0, -num_rows % _ROWS), value=num_rows)
        places = torch.arange(self._rows.numel(), device=order.device).view(self._rows.shape)[:, :num_rows]
        place_of_row = torch.empty_like(order).scatter_(1, order, places).view(-1)
        chunks = -(-most[:, ::_ROWS].reshape(-1) // (_LANES * _CHUNK))  # of each run of a block
        self._first_chunks = torch.nn.functional.pad(chunks.cumsum(0), (1, 0)).int()
        num_runs = _ROWS * _LANES  # of a block

        block = place_of_row[rows] // _ROWS
        index = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]  # within the row
        lane, index = index // (_CHUNK * chunks[block]), index % (_CHUNK * chunks[block])  # within the run
        run = place_of_row[rows] % _ROWS * _LANES + lane  # within the block
        place = ((self._first_chunks[block] + index // _CHUNK) * num_runs + run) * _CHUNK + index % _CHUNK
        size = int(self._first_chunks[-1]) * num_runs * _CHUNK
        self._starts = None
        if self._pattern is None:
            is_first = index == 0
            self._starts = rows.new_zeros(len(chunks) * num_runs, dtype=torch.int32)
            self._starts[(block * num_runs + run)[is_first]] = columns[is_first].int()
            codes = _distances(rows, columns).masked_fill_(is_first, 0)
        else:
            codes = columns % self._pattern[1]
        self._codes = pack_codes(codes.new_zeros(size).index_copy(0, place, codes), self._index_bits)
        self.values = values.new_zeros(size).index_copy(0, place, values)
        if self._value_bits == 4:
            self.values = pack_codes(self.values + 8, 4)
        self.tensors = (self.values, self._codes, self._starts, self._first_chunks, self._rows, scale)
        """What a product reads of the weight."""

    def _launch(self, kernel, *arguments, **constants) -> None:
        kept, of = self._pattern or (0, 0)
        kernel[(self._rows.numel() // _ROWS,)](
            self.values, self._codes, self._starts, self._first_chunks, self._rows, self._scale, *arguments,
            *self.shape, -(-self.shape[1] // GROUP), VALUE_BITS=self._value_bits, INDEX_BITS=self._index_bits,
            KEPT=kept, OF=of, GROUP=GROUP, WIDTH=self._width, COLUMNS=triton.next_power_of_2(self._width), ROWS=_ROWS,
            LANES=_LANES, CHUNK=_CHUNK, STAGES=_STAGES, num_warps=_ROWS * _LANES // 32, enable_fp_fusion=True,
            **constants)

    def multiply(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """y (B, R) = x (B, C) W^T, both contiguous BF16."""
        for part, out in zip(x.split(_VECTORS), y.split(_VECTORS), strict=True):
            sums = out if self._num_panels == 1 else x.new_empty(self._num_panels, *out.shape, dtype=torch.float32)
            self._launch(_multiply, part, sums, len(part), VECTORS=triton.next_power_of_2(len(part)))
            if self._num_panels > 1:
                add_sums(sums, out)

    def expand(self) -> torch.Tensor:
        """-> the weight (R, C) BF16."""
        dense = self.values.new_zeros(self.shape, dtype=torch.bfloat16)
        self._launch(_expand, dense)
        return dense


def _pattern(keep: torch.Tensor) -> tuple[int, int] | None:
    """(N, M) where every row keeps N of each M columns, M at most 16. Places among more columns would take eight bits,
    and distances between them four."""
    for of in (4, 8, 16):
        if keep.numel() and keep.shape[1] % of == 0:
            counts = keep.unflatten(1, (-1, of)).sum(2)
            kept = int(counts[0, 0])
            if kept and _CHUNK * of <= kept * GROUP // 2 and bool((counts == kept).all()):
                return kept, of
    return None


def _distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of each nonzero to the one before it in its row, of the first one 0."""
    return columns.diff(prepend=columns[:1]).masked_fill_(rows.diff(prepend=rows[:1]) > 0, 0)


def _missing(distances: torch.Tensor, bits: int) -> torch.Tensor:
    """How many zeros each nonzero needs before it, so that none is farther than these bits can tell."""
    return (distances - 1).clamp_(min=0) // (2 ** bits - 1)


def _bridge(rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, missing: torch.Tensor,
            bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Insert these zeros, with the greatest distance between them."""
    ends = (missing + 1).cumsum(0)
    source = torch.arange(len(rows), device=rows.device).repeat_interleave(missing + 1)
    back = ends[source] - 1 - torch.arange(len(source), device=rows.device)  # how many places before its nonzero
    before = columns[source] - _distances(rows, columns)[source]
    bridged = before + (2 ** bits - 1) * (missing[source] - back + 1)
    return (rows[source], torch.where(back == 0, columns[source], bridged),
            values[source].masked_fill_(back > 0, 0))


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 4 or 8 bits -> uint8, of two codes of four bits the first one in the low half."""
    codes = codes.to(torch.uint8)
    return codes if bits == 8 else codes[::2] | codes[1::2] << 4


def add_sums(sums: torch.Tensor, y: torch.Tensor) -> None:
    """y (B, R) BF16 = the sum of (N, B, R) FP32 over its first dimension, in its order."""
    _add[(-(-y.numel() // _SUMS),)](sums, y, y.numel(), len(sums), SUMS=_SUMS, num_warps=4, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["size", "num_sums"])
def _add(sums, y, size, num_sums, SUMS: tl.constexpr):
    place = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    total = tl.zeros([SUMS], tl.float32)
    for number in range(num_sums):
        total += tl.load(sums + number * size + place, mask=place < size, other=0)
    tl.store(y + place, total, mask=place < size)


@triton.jit
def _load_codes(codes, run, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """-> (RUNS, CHUNK) int32 of 4 or 8 bits."""
    BYTES: tl.constexpr = CHUNK * BITS // 8
    byte = tl.load(codes + run[:, None] * BYTES + tl.arange(0, BYTES)[None, :]).to(tl.int32)
    if BITS == 4:
        byte = tl.reshape(tl.join(byte & 15, byte >> 4), [run.numel, CHUNK])
    return byte


@triton.jit
def _load_chunk(values, codes, scale, row, chunk, at, first_group, num_groups, VALUE_BITS: tl.constexpr,
                INDEX_BITS: tl.constexpr, KEPT: tl.constexpr, OF: tl.constexpr, GROUP: tl.constexpr,
                COLUMNS: tl.constexpr, RUNS: tl.constexpr, CHUNK: tl.constexpr):
    """-> values (RUNS, CHUNK) FP32 and their columns, of the chunk with this number of each run; `at` moves on."""
    run = chunk * RUNS + tl.arange(0, RUNS)
    code = _load_codes(codes, run, INDEX_BITS, CHUNK)
    if KEPT:
        column_before = at // KEPT * OF
        column = tl.minimum((at[:, None] + tl.arange(0, CHUNK)[None, :]) // KEPT * OF + code, COLUMNS - 1)
    else:
        column_before = at
        column = at[:, None] + tl.cumsum(code, 1)
    if VALUE_BITS == 4:
        value = (_load_codes(values, run, 4, CHUNK) - 8).to(tl.float32)
        group = column_before // GROUP
        last = num_groups - 1 - first_group
        scale += row * num_groups + first_group
        here = tl.load(scale + tl.minimum(group, last)).to(tl.float32)
        beyond = tl.load(scale + tl.minimum(group + 1, last)).to(tl.float32)
        value *= tl.where(column < (group[:, None] + 1) * GROUP, here[:, None], beyond[:, None])
    else:
        value = tl.load(values + run[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]).to(tl.float32)
    return value, column, at + (CHUNK if KEPT else tl.sum(code, 1))


@triton.jit
def _first_places(starts, first, last, block, KEPT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
                  CHUNK: tl.constexpr):
    """Of each run of the block: the column where it starts or, of a pattern, how many nonzeros are before it."""
    run = tl.arange(0, ROWS * LANES)
    return run % LANES * ((last - first) * CHUNK) if KEPT else tl.load(starts + block * ROWS * LANES + run)


@triton.jit
def _activations(x, column, num_vectors, num_columns, VECTORS: tl.constexpr):
    """The BF16 numbers of the vectors at each column as one word, the first one lowest."""
    word = tl.zeros(column.shape, tl.uint16 if VECTORS == 1 else tl.uint32 if VECTORS == 2 else tl.uint64)
    for i in tl.static_range(VECTORS):
        vector = tl.minimum(i, num_vectors - 1)  # in place of a fourth one that there is not, the third one again
        number = tl.load(x + vector * num_columns + column, mask=column < num_columns, other=0)
        word |= number.to(tl.uint16, bitcast=True).to(word.dtype) << 16 * i
    return word


@triton.jit
def _sum(value, word, i: tl.constexpr):
    """The sums (RUNS,) of the values (RUNS, CHUNK) times number i of each word."""
    return tl.sum(value * ((word >> 16 * i).to(tl.uint32) << 16).to(tl.float32, bitcast=True), 1)


@triton.jit
def _product(value, column, word, VECTORS: tl.constexpr):
    """-> (RUNS, VECTORS): the values (RUNS, CHUNK) times the activations at their columns, summed over each chunk."""
    word = tl.reshape(tl.gather(word, tl.reshape(column, [column.numel]), 0), column.shape)
    if VECTORS == 1:
        total = _sum(value, word, 0)[:, None]
    elif VECTORS == 2:
        total = tl.join(_sum(value, word, 0), _sum(value, word, 1))
    else:
        total = tl.reshape(tl.join(tl.join(_sum(value, word, 0), _sum(value, word, 2)),
                                   tl.join(_sum(value, word, 1), _sum(value, word, 3))), [value.shape[0], 4])
    return total


@triton.jit(do_not_specialize=["num_rows", "num_vectors"])
def _multiply(values, codes, starts, first_chunks, rows, scale, x, y, num_vectors, num_rows, num_columns, num_groups,
              VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr, KEPT: tl.constexpr, OF: tl.constexpr,
              GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
              LANES: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, VECTORS: tl.constexpr):
    block = tl.program_id(0)
    panel = block // tl.cdiv(num_rows, ROWS)
    first, last = tl.load(first_chunks + block), tl.load(first_chunks + block + 1)
    at = _first_places(starts, first, last, block, KEPT, ROWS, LANES, CHUNK)
    row = tl.load(rows + block * ROWS + tl.arange(0, ROWS * LANES) // LANES)
    row = tl.minimum(row, num_rows - 1)
    word = _activations(x, panel * WIDTH + tl.arange(0, COLUMNS), num_vectors, num_columns, VECTORS)
    total = tl.zeros([ROWS * LANES, VECTORS], tl.float32)
    for chunk in tl.range(first, last, num_stages=STAGES):
        value, column, at = _load_chunk(values, codes, scale, row, chunk, at, panel * (WIDTH // GROUP), num_groups,
                                        VALUE_BITS, INDEX_BITS, KEPT, OF, GROUP, COLUMNS, ROWS * LANES, CHUNK)
        total += _product(value, column, word, VECTORS)
    row = tl.load(rows + block * ROWS + tl.arange(0, ROWS))[:, None]
    vector = tl.arange(0, VECTORS)[None, :]
    result = tl.sum(tl.reshape(total, [ROWS, LANES, VECTORS]), 1)
    if VALUE_BITS == 8:
        result *= tl.load(scale + row, mask=row < num_rows, other=0)
    tl.store(y + (panel * num_vectors + vector) * num_rows + row, result,
             mask=(row < num_rows) & (vector < num_vectors))


@triton.jit(do_not_specialize=["num_rows"])
def _expand(values, codes, starts, first_chunks, rows, scale, dense, num_rows, num_columns, num_groups,
            VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr, KEPT: tl.constexpr, OF: tl.constexpr,
            GROUP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
            CHUNK: tl.constexpr, STAGES: tl.constexpr):
    block = tl.program_id(0)
    panel = block // tl.cdiv(num_rows, ROWS)
    first, last = tl.load(first_chunks + block), tl.load(first_chunks + block + 1)
    at = _first_places(starts, first, last, block, KEPT, ROWS, LANES, CHUNK)
    row = tl.load(rows + block * ROWS + tl.arange(0, ROWS * LANES) // LANES)
    exists = row < num_rows
    row = tl.minimum(row, num_rows - 1).to(tl.int64)
    for chunk in tl.range(first, last, num_stages=STAGES):
        value, column, at = _load_chunk(values, codes, scale, row, chunk, at, panel * (WIDTH // GROUP), num_groups,
                                        VALUE_BITS, INDEX_BITS, KEPT, OF, GROUP, COLUMNS, ROWS * LANES, CHUNK)
        if VALUE_BITS == 8:
            value *= tl.load(scale + row)[:, None]
        # A zero that bridges or fills may lie where another value is.
        tl.store(dense + row[:, None] * num_columns + panel * WIDTH + column, value,
                 mask=(value != 0) & exists[:, None])
