"""Kernels for sparse weights, and their torch reference.

    expand, compact          training and prefill: (values, bits) -> dense and back
    linear                   training: x W^T with W expanded while it is multiplied
    PackedMatrix.matvec      decoding: y = W x with W decompressed in registers, FP32 or INT8
    PackedMatrix.matmul      prompts: the same for many x at once, by a dense product
    read_bandwidth           what the memory gives, for the byte bound
    backend, use_backend     which instructions run: avx512 (VBMI2, VNNI) or portable
    PORTABLE_NOTE            the warning where the portable ones run

All are operators of torch (`ops.py`). Which kernels move a tensor depends on its device (`registry.KERNELS`) and dtype
(`devices.py`); what none of them moves, the reference does. Those of the CPU are a table by instruction set
(`csrc/tiers.h`).
"""

from sparse_train.kernels.native import PORTABLE_NOTE, backend, backends, read_bandwidth, use_backend
from sparse_train.kernels.ops import compact, expand, linear
from sparse_train.kernels.packed import PackedMatrix
from sparse_train.kernels.reference import pack, unpack

__all__ = [
    "PORTABLE_NOTE", "PackedMatrix", "backend", "backends", "compact", "expand", "linear", "pack", "read_bandwidth",
    "unpack", "use_backend",
]
