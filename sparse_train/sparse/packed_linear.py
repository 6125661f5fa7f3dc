"""PackedLinear: the layer of sparse inference, for new tokens and for prompts. PackedEmbedding: a lookup in BF16.
`on_gpu` chooses the layer of a stored weight there."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from sparse_train.kernels import PackedMatrix
from sparse_train.sparse.stored import Stored, multiply_out

if TYPE_CHECKING:  # Triton is an extra
    from sparse_train.kernels.triton_matrix import DeviceMatrix

_FEW = 8  # tokens, for which the weight is read once


class PackedLinear(nn.Module):
    """y (..., R) = x (..., C) W^T + bias, W packed for its device; inference only, fp32 activations on the CPU and BF16
    on a GPU."""

    bias: torch.Tensor | None

    def __init__(self, weight: "PackedMatrix | DeviceMatrix", bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A token gives the same result alone, in a batch of new tokens or, up to rounding, in a prompt; int8 and
        int4 always quantise it."""
        is_step = x.ndim > 2 and x.shape[-2] == 1  # one new token per row of the batch
        is_bound_by_bytes = is_step or x.numel() <= _FEW * self.in_features  # a prompt is bound by arithmetic
        y = self.weight.matvec(x) if is_bound_by_bytes else self.weight.matmul(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bytes={self.weight.num_bytes}"


def on_gpu(stored: Stored, device: torch.device, num_rows: int, bias: torch.Tensor | None = None) -> nn.Module:
    """The layer in BF16 on `device`, of any bias there, laid out for products with `num_rows` rows.

    A weight that keeps all of its values, such as a quantised head, is dense: there are no zeros to skip.
    """
    weight, scale = stored
    rows, columns = weight.shape
    if weight.values.numel() == rows * columns:
        linear = nn.Linear(columns, rows, bias is not None, device="meta")
        linear.weight = nn.Parameter(multiply_out(weight, scale).to(device, torch.bfloat16), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear
    from sparse_train.kernels.triton_matrix import DeviceMatrix  # Triton is an extra

    values = weight.values if scale is not None else weight.values.bfloat16()
    return PackedLinear(DeviceMatrix(values.to(device), weight.bitmask.to(device), columns,
                                     None if scale is None else scale.to(device), num_rows), bias)


class PackedEmbedding(nn.Module):
    """tokens (...,) -> (..., D) fp32, rows of a PackedMatrix (V, D), which a tied head may have as well."""

    def __init__(self, weight: PackedMatrix):
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.weight.rows(tokens)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"
