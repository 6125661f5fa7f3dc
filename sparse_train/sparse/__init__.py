"""The sparse weight: its kept values and one bit per position.

    BitmaskTensor   the pair itself, made by pruning, read by every later stage
    SparseLinear    a linear layer that trains the values; sparsify / densify put it in and take it out
    format          the pair in safetensors files
"""

from sparse_train.sparse.bitmask import BitmaskTensor
from sparse_train.sparse.format import TensorFolder, write_tensors
from sparse_train.sparse.linear import SparseLinear, densify, replace_module, sparse_linears, sparsify

__all__ = [
    "BitmaskTensor", "SparseLinear", "TensorFolder", "densify", "replace_module", "sparse_linears", "sparsify",
    "write_tensors",
]
