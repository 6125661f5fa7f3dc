"""SparseLinear: the layer of sparse training. It trains `values`; its bits are a frozen parameter.

The dense weight exists only while the layer runs: forward expands it, multiplies and drops it; backward expands it
again for the input's gradient, and compacts the dense weight gradient to the kept positions. A pruned position is not a
parameter, so no optimizer, weight decay, clipping or resume can bring it back, and ZeRO partitions, reduces and
checkpoints `values` like any other parameter.
"""

import torch
from torch import nn

from sparse_train import kernels
from sparse_train.sparse.bitmask import BitmaskTensor


class SparseLinear(nn.Module):
    """y = x W^T + bias with W as (values, bitmask). Replaces an `nn.Linear`.

    `weight` (BitmaskTensor) has shape (out_features, in_features); `bias` (out_features,) or None.
    """

    def __init__(self, weight: BitmaskTensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.values = nn.Parameter(weight.values.detach().clone())
        # A parameter, not a buffer: ZeRO-3 partitions frozen parameters and gathers them with the values.
        self.bitmask = nn.Parameter(weight.bitmask.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def weight(self) -> BitmaskTensor:
        """Values and bits, without gradient; they share memory with the parameters."""
        return BitmaskTensor(self.values.detach(), self.bitmask.detach(), (self.out_features, self.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = kernels.linear(x, self.values, self.bitmask)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    """The SparseLinears of `model` by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
