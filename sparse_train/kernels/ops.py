"""The kernels as operators of torch (torch.ops.sparse_train): autograd knows their gradients, and torch.compile keeps
each as one node of its graph.

    expand(values, bitmask, num_columns) -> dense         gradient: compact
    compact(dense, bitmask, num_values) -> values         gradient: expand
    linear(x, values, bitmask) -> x @ dense.T             keeps its inputs for backward, never the dense weight
    linear_grad_x, linear_grad_values                     its gradients; operators, so that no compiler expands the
                                                          weight once for forward and backward and keeps it in between
    matvec, matmul(packed, x, num_rows)                   of the PackedMatrix with that number
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparse_train.kernels.arguments import check_bits, check_count, check_tensor
from sparse_train.kernels.devices import kernels_for
from sparse_train.kernels.reference import unpack

_LIBRARY = torch.library.Library("sparse_train", "DEF")


def define_operator(schema: str, compute: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """`compute` for tensors of any device, `fake` for tensors without data."""
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_train::{name}", fake, lib=_LIBRARY)


def _check_sparse(values: Tensor, bitmask: Tensor, num_columns: int) -> None:
    check_tensor("values", values, None)
    check_bits(bitmask, num_columns, device=values.device)


def _check_dense(dense: Tensor, bitmask: Tensor, num_values: int) -> None:
    check_tensor("dense", dense, None, None)
    check_bits(bitmask, dense.shape[1], dense.shape[0], dense.device)
    check_count("num_values", num_values, 0, dense.numel())


def _expand(values: Tensor, bitmask: Tensor, num_columns: int) -> Tensor:
    _check_sparse(values, bitmask, num_columns)
    return kernels_for(values).expand(values, bitmask, num_columns, None)


def _compact(dense: Tensor, bitmask: Tensor, num_values: int) -> Tensor:
    _check_dense(dense, bitmask, num_values)
    return kernels_for(dense).compact(dense, bitmask, num_values, None)


def _linear(x: Tensor, values: Tensor, bitmask: Tensor) -> Tensor:
    return functional.linear(x, _expand(values, bitmask, x.shape[-1]))


def _linear_grad_x(grad_y: Tensor, values: Tensor, bitmask: Tensor, num_columns: int) -> Tensor:
    return grad_y @ _expand(values, bitmask, num_columns)


def _linear_grad_values(grad_y: Tensor, x: Tensor, bitmask: Tensor, num_values: int) -> Tensor:
    grad_y, x = (torch.atleast_2d(rows).flatten(0, -2) for rows in (grad_y, x))
    return _compact(grad_y.T @ x, bitmask, num_values)


define_operator("expand(Tensor values, Tensor bitmask, SymInt num_columns) -> Tensor", _expand,
                lambda values, bitmask, num_columns: values.new_empty(bitmask.shape[0], num_columns))
define_operator("compact(Tensor dense, Tensor bitmask, SymInt num_values) -> Tensor", _compact,
                lambda dense, bitmask, num_values: dense.new_empty(num_values))
define_operator("linear(Tensor x, Tensor values, Tensor bitmask) -> Tensor", _linear,
                lambda x, values, bitmask: x.new_empty(*x.shape[:-1], bitmask.shape[0]))
define_operator("linear_grad_x(Tensor grad_y, Tensor values, Tensor bitmask, SymInt num_columns) -> Tensor",
                _linear_grad_x,
                lambda grad_y, values, bitmask, num_columns: grad_y.new_empty(*grad_y.shape[:-1], num_columns))
define_operator("linear_grad_values(Tensor grad_y, Tensor x, Tensor bitmask, SymInt num_values) -> Tensor",
                _linear_grad_values, lambda grad_y, x, bitmask, num_values: grad_y.new_empty(num_values))

OPS = torch.ops.sparse_train


def _keep_bitmask(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensor, bitmask, _ = inputs
    ctx.save_for_backward(bitmask)
    ctx.size = tensor.shape[-1]


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return OPS.compact(grad, *ctx.saved_tensors, ctx.size), None, None


def _compact_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return OPS.expand(grad, *ctx.saved_tensors, ctx.size), None, None


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """The parameter itself, not the dense weight: under ZeRO-3 the engine gathers it again before backward."""
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, values, bitmask = ctx.saved_tensors
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = OPS.linear_grad_x(grad_y, values, bitmask, x.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_values = OPS.linear_grad_values(grad_y, x, bitmask, values.numel())
    return grad_x, grad_values, None


for _name, _backward, _setup in (("expand", _expand_backward, _keep_bitmask),
                                 ("compact", _compact_backward, _keep_bitmask),
                                 ("linear", _linear_backward, _keep_inputs)):
    torch.library.register_autograd(f"sparse_train::{_name}", _backward, setup_context=_setup, lib=_LIBRARY)


def expand(values: Tensor, bitmask: Tensor, num_columns: int, out: Tensor | None = None) -> Tensor:
    """(values (nnz,), bitmask (R, 8 * ceil(C / 64))) -> dense (R, C) of the values' dtype, +0 where pruned.

    `out` is a contiguous tensor to write to, which autograd does not see. Raises ValueError for arguments that do not
    fit and, on the CPU, when bits and values do not belong together; on a GPU an assertion stops the device then.
    """
    _check_sparse(values, bitmask, num_columns)
    if out is not None:
        return kernels_for(values).expand(values, bitmask, num_columns, out)
    return OPS.expand(values, bitmask, num_columns)


def compact(dense: Tensor, bitmask: Tensor, num_values: int | None = None, out: Tensor | None = None) -> Tensor:
    """Dense (R, C) -> its entries at the kept positions, row-major (nnz,).

    `num_values` is nnz where the caller knows it, `out` (nnz,) a contiguous tensor to write to, which autograd does not
    see. Raises ValueError for arguments that do not fit and for a wrong nnz, which on a GPU an assertion finds.
    """
    if num_values is None:
        _check_dense(dense, bitmask, 0)
        num_values = int(unpack(bitmask, dense.shape[1]).sum()) if out is None else out.numel()
    _check_dense(dense, bitmask, num_values)
    if out is not None:
        return kernels_for(dense).compact(dense, bitmask, num_values, out)
    return OPS.compact(dense, bitmask, num_values)


def linear(x: Tensor, values: Tensor, bitmask: Tensor) -> Tensor:
    """x (..., C), values (nnz,), bitmask (R, 8 * ceil(C / 64)) -> x W^T (..., R), under autocast in its dtype."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, values = x.to(dtype), values.to(dtype)
    return OPS.linear(x, values, bitmask)
