"""Kernels for sparse weights, and their torch reference.

    expand, compact          training and prefill: (values, bits) -> dense and back
    linear                   training: x W^T with W expanded while it is multiplied
    PackedMatrix.matvec      decoding: y = W x with W decompressed in registers, FP32, BF16, INT8 or INT4
    PackedMatrix.matmul      prompts: the same for many x at once, skipping zeros or by a dense product
    break_even               the density up to which it skips zeros, measured on this machine
    DeviceMatrix             both on a GPU; in triton_matrix.py, since Triton is an extra
    Steps, ACTIVATIONS       decoding: what is between the products of a new token, and the products themselves; on a
                             GPU triton_steps.py has them
    read_bandwidth           of the memory, in bytes per second, for the byte bound
    GROUP, scale_of_columns  columns that share a scale in INT4
    backend, use_backend     which instructions are used: avx512 (VBMI2, VNNI), avx512f, avx2, neon_dotprod, neon,
                             portable
    PORTABLE_NOTE            the warning printed where the portable kernels run

The products and moves are operators of torch (`ops.py`, `packed.py`). A tensor's device (the table KERNELS of
sparse_train/registry.py) and dtype (`devices.py`) choose the kernels, and on the CPU the instruction set does
(`csrc/tiers.h`). The reference takes over where no kernels fit.
"""

from sparse_train.kernels.native import PORTABLE_NOTE, backend, backends, read_bandwidth, use_backend
from sparse_train.kernels.ops import compact, expand, linear
from sparse_train.kernels.packed import PackedMatrix, break_even
from sparse_train.kernels.reference import GROUP, pack, scale_of_columns, unpack
from sparse_train.kernels.steps import ACTIVATIONS, Steps

__all__ = [
    "ACTIVATIONS", "GROUP", "PORTABLE_NOTE", "PackedMatrix", "Steps", "backend", "backends", "break_even", "compact",
    "expand", "linear", "pack", "read_bandwidth", "scale_of_columns", "unpack", "use_backend",
]
