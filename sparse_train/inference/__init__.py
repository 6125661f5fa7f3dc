"""Compressed models on the CPU, through Hugging Face's `generate`."""

from sparse_train.inference.load import Runtime, load
from sparse_train.inference.packed_linear import PackedLinear

__all__ = ["PackedLinear", "Runtime", "load"]
