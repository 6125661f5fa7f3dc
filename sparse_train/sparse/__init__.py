"""The sparse weight: its kept values and one bit per position.

    BitmaskTensor   values and bits as a tensor, made by pruning and read by every later stage
    SparseLinear    a linear layer that trains the values; sparsify and densify exchange it with nn.Linear
    format.py       values and bits in safetensors files; header.py checks what a folder says about itself
    save.py         a model's folder, also when Hugging Face's save_pretrained writes it
"""

from sparse_train.sparse.bitmask import BitmaskTensor
from sparse_train.sparse.format import TensorFolder, count_bits, pack_nibbles, save_file, write_tensors
from sparse_train.sparse.linear import SparseLinear, sparse_linears
from sparse_train.sparse.save import save_from, write_sparse
from sparse_train.sparse.swap import densify, replace_module, sparsify

__all__ = [
    "BitmaskTensor", "SparseLinear", "TensorFolder", "count_bits", "densify", "pack_nibbles", "replace_module",
    "save_file", "save_from", "sparse_linears", "sparsify", "write_sparse", "write_tensors",
]
