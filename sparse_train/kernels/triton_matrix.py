"""y = W x for one token on a GPU, in Triton, with work for nonzeros alone: the memory of data-centre cards delivers a
weight faster than a multiprocessor can test the bits of all its positions.

A weight is laid out once, when it is loaded. Rows are sorted by their number of nonzeros, and 32 of them that follow
each other are a block, the work of one program. Eight threads share a row, and each has a run of it: as many chunks of
eight nonzeros as all others of its block. A nonzero is its value in BF16 and the distance to the one before it in eight
bits; a greater distance is bridged by zeros. The chunks with one number are consecutive over the block, so that a warp
reads 512 bytes of values and 256 of distances at a time. Activations lie in shared memory, in FP32, and sums are FP32.
"""

import torch
import triton
import triton.language as tl

from sparse_train.kernels.arguments import check_bits, check_tensor, consecutive, describe
from sparse_train.kernels.reference import unpack

_ROWS, _LANES, _CHUNK = 32, 8, 8
_STAGES = 5
"""Four chunks of each run are on their way while one is multiplied: 24 KB of a program."""
_MOST_DISTANCE = 255
_MOST_COLUMNS = 32_768
"""128 KB of activations in shared memory."""


class DeviceMatrix:
    """A sparse weight (R, C) laid out for products on a GPU; inference only.

    `values` (nnz,) bfloat16, and `bitmask` (R, 8 * ceil(C / 64)) uint8 on the same device. `num_rows`, of x, is how
    many vectors most products will have: the layout is chosen for them, any other number is right too. Products take
    and give BF16 and sum in FP32. They are launches on torch's current stream that wait for nothing, with memory from
    torch alone, so a CUDA graph captures them. Raises ValueError for what does not fit.
    """

    dtype = torch.bfloat16
    """Of the activations that it multiplies, which is what code asks a layer's weight for."""

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
                 scale: torch.Tensor | None = None, num_rows: int = 1):
        check_tensor("values", values, None, dtypes=(torch.bfloat16,))
        check_bits(bitmask, num_columns, device=values.device)
        if not 0 < num_columns <= _MOST_COLUMNS:
            raise ValueError(f"num_columns is {num_columns}; a product on the GPU takes 1 to {_MOST_COLUMNS}")
        self.shape, self.device, self.precision = (len(bitmask), num_columns), values.device, "bf16"
        self.density = len(values) / max(1, self.shape[0] * self.shape[1])
        keep = unpack(bitmask, num_columns)
        order = keep.sum(1).argsort(descending=True)
        number = torch.zeros(self.shape, dtype=torch.int64, device=values.device)
        number[keep] = torch.arange(len(values), device=values.device)
        rows, columns = keep[order].nonzero(as_tuple=True)
        values = values[number[order][rows, columns]]
        rows, columns, values = _bridge(rows, columns, values)

        counts = rows.bincount(minlength=_ROWS * -(-len(order) // _ROWS))
        chunks = -(-counts.view(-1, _ROWS).amax(1) // (_LANES * _CHUNK))  # of each run of a block
        self._first_chunks = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
        block, run_length = rows // _ROWS, _CHUNK * chunks[rows // _ROWS]
        index = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]  # within the row
        lane, index = index // run_length, index % run_length
        run = rows % _ROWS * _LANES + lane  # within the block
        place = (((self._first_chunks[block] + index // _CHUNK) * (_ROWS * _LANES) + run) * _CHUNK + index % _CHUNK)
        size = int(self._first_chunks[-1]) * _ROWS * _LANES * _CHUNK
        self._values = values.new_zeros(size).index_copy(0, place, values)
        distance = columns.diff(prepend=columns[:1])
        self._starts = rows.new_zeros(len(chunks) * _ROWS * _LANES, dtype=torch.int32)
        is_first = index == 0
        self._starts[(block * _ROWS * _LANES + run)[is_first]] = columns[is_first].int()
        distance[is_first] = 0
        self._distances = distance.new_zeros(size, dtype=torch.uint8).index_copy(0, place, distance.to(torch.uint8))
        self._rows = torch.nn.functional.pad(order.int(), (0, len(chunks) * _ROWS - len(order)), value=len(order))

    @property
    def num_bytes(self) -> int:
        """What a product reads of the weight."""
        return sum(tensor.nbytes for tensor in (self._values, self._distances, self._starts, self._rows))

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., C) BF16 -> (..., R) BF16, with any number of rows: the rule of which kernel is here alone."""
        if (not isinstance(x, torch.Tensor) or not x.ndim or x.shape[-1] != self.shape[1] or x.dtype != self.dtype
                or x.device != self.device or x.layout != torch.strided):
            raise ValueError(f"x is {describe(x)}; it needs rows of {self.shape[1]} bfloat16 numbers on {self.device}")
        y = x.new_empty(*x.shape[:-1], self.shape[0])
        if y.numel():
            rows = consecutive(x).view(-1, self.shape[1])
            with torch.cuda.device_of(x):
                for row, out in zip(rows, y.view(len(rows), -1), strict=True):
                    _matvec[(len(self._rows) // _ROWS,)](
                        self._values, self._distances, self._starts, self._first_chunks, self._rows, row, out,
                        self.shape[0], self.shape[1], triton.next_power_of_2(self.shape[1]), _ROWS, _LANES, _CHUNK,
                        _STAGES, num_warps=_ROWS * _LANES // 32, enable_fp_fusion=True)
        return y

    matvec = matmul


def _bridge(rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Insert zeros before each nonzero that is too far from the one before it in its row."""
    distance = columns.diff(prepend=columns[:1])
    distance[rows.diff(prepend=rows[:1]) > 0] = 0
    missing = (distance - 1).clamp(min=0) // _MOST_DISTANCE
    source = torch.arange(len(rows), device=rows.device).repeat_interleave(missing + 1)
    ends = (missing + 1).cumsum(0)[source]
    back = ends - 1 - torch.arange(len(source), device=rows.device)  # how many places before its nonzero
    bridged = columns[source] - distance[source] + _MOST_DISTANCE * (missing[source] - back + 1)
    return (rows[source], torch.where(back == 0, columns[source], bridged),
            torch.where(back == 0, values[source], torch.zeros_like(values[source])))


@triton.jit(do_not_specialize=["num_rows"])
def _matvec(values, distances, starts, first_chunks, rows, x, y, num_rows, num_columns, COLUMNS: tl.constexpr,
            ROWS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr):
    block = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    activations = tl.load(x + column, mask=column < num_columns, other=0).to(tl.float32)
    run = tl.arange(0, ROWS * LANES)
    place = run[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    at = tl.load(starts + block * ROWS * LANES + run)
    total = tl.zeros([ROWS * LANES], tl.float32)
    for chunk in tl.range(tl.load(first_chunks + block), tl.load(first_chunks + block + 1), num_stages=STAGES):
        offset = chunk * (ROWS * LANES * CHUNK)
        value = tl.load(values + offset + place).to(tl.float32)
        distance = tl.load(distances + offset + place).to(tl.int32)
        which = tl.reshape(at[:, None] + tl.cumsum(distance, 1), [ROWS * LANES * CHUNK])
        total += tl.sum(value * tl.reshape(tl.gather(activations, which, 0), [ROWS * LANES, CHUNK]), 1)
        at += tl.sum(distance, 1)
    row = tl.load(rows + block * ROWS + tl.arange(0, ROWS))
    tl.store(y + row, tl.sum(tl.reshape(total, [ROWS, LANES]), 1), mask=row < num_rows)
