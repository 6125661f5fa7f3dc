"""PackedLinear: the layer of sparse inference. One token multiplies with the compressed weight; many expand it once."""

import torch
from torch import nn
from torch.nn import functional

from sparse_train.kernels import PackedMatrix


class PackedLinear(nn.Module):
    """y (..., R) = x (..., C) W^T + bias, W a PackedMatrix; inference only, fp32 activations on the CPU."""

    def __init__(self, weight: PackedMatrix, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == self.in_features:
            y = self.weight.matvec(x).view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        # Prefill is bound by arithmetic, not by bytes: a dense product is what the CPU does best.
        return functional.linear(x, self.weight.to_dense(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bytes={self.weight.num_bytes}"
