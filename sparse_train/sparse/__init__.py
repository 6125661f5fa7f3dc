"""The sparse weight: its kept values and one bit per position.

    BitmaskTensor   the pair itself, made by pruning, read by every later stage
    SparseLinear    a linear layer that trains the values; sparsify / densify put it in and take it out
    format          the pair in safetensors files; header checks all that a folder says of itself
    save            a model's folder, also where Hugging Face's save_pretrained is asked for it
"""

from sparse_train.sparse.bitmask import BitmaskTensor
from sparse_train.sparse.format import TensorFolder, save_file, write_tensors
from sparse_train.sparse.linear import SparseLinear, sparse_linears
from sparse_train.sparse.swap import densify, replace_module, sparsify

__all__ = [
    "BitmaskTensor", "SparseLinear", "TensorFolder", "densify", "replace_module", "save_file", "sparse_linears",
    "sparsify", "write_tensors",
]
