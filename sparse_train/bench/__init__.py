"""Measurements: interleaved timings, layers and decoding against dense torch and against the byte bound."""

from sparse_train.bench.decode import decode_rows
from sparse_train.bench.layers import MPT_7B_BLOCK, layer_rows
from sparse_train.bench.timing import Timing, interleave

__all__ = ["MPT_7B_BLOCK", "Timing", "decode_rows", "interleave", "layer_rows"]
