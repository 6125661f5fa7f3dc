"""The sparse weight: its kept values and one bit per position.

    BitmaskTensor   values and bits as a tensor, made by pruning and read by every later stage
    SparseLinear    a linear layer that trains the values; sparsify and densify exchange it with nn.Linear
    PackedLinear    a linear layer of inference, over the weight laid out for its device; PackedEmbedding
    stored.py       a weight as it is stored, codes with their scale, and parts of it
    format.py       values and bits in safetensors files; header.py checks what a folder says about itself
    save.py         a model's folder, also when Hugging Face's save_pretrained writes it
"""

from sparse_train.sparse.bitmask import BitmaskTensor
from sparse_train.sparse.format import (
    TensorFolder,
    count_bits,
    pack_nibbles,
    read_weight,
    require_finite,
    save_file,
    write_tensors,
)
from sparse_train.sparse.linear import SparseLinear, sparse_linears
from sparse_train.sparse.packed_linear import PackedEmbedding, PackedLinear, on_gpu
from sparse_train.sparse.save import save_from, write_sparse
from sparse_train.sparse.stored import Stored, stack_rows, take_columns, take_rows
from sparse_train.sparse.swap import densify, replace_module, sparsify

__all__ = [
    "BitmaskTensor", "PackedEmbedding", "PackedLinear", "SparseLinear", "Stored", "TensorFolder", "count_bits",
    "densify", "on_gpu", "pack_nibbles", "read_weight", "replace_module", "require_finite", "save_file", "save_from",
    "sparse_linears", "sparsify", "stack_rows", "take_columns", "take_rows", "write_sparse", "write_tensors",
]
