"""Parts of stored weights, against slices of the dense weight."""

import pytest
import torch

from sparse_train.compress.quantise import quantise_groups, quantise_rows
from sparse_train.sparse import BitmaskTensor, stack_rows, take_columns, take_rows
from sparse_train.sparse.stored import multiply_out

_SHAPE = (12, 700)


def _stored(precision, shape=_SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator)
    weight = BitmaskTensor.from_dense(dense, torch.rand(shape, generator=generator) < 0.3)
    if precision in ("int8", "int4"):
        return (quantise_rows if precision == "int8" else quantise_groups)(weight)
    return BitmaskTensor(weight.values.to(getattr(torch, precision)), weight.bitmask, shape), None


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_rows_columns_and_stacks_are_those_of_the_dense_weight(precision):
    stored = _stored(precision)
    dense, keep = multiply_out(*stored), stored[0].keep
    for rows in (torch.tensor([3, 4, 5]), torch.tensor([11, 0, 0, 7]), torch.tensor([], dtype=torch.int64)):
        part = take_rows(*stored, rows)
        assert torch.equal(multiply_out(*part), dense[rows]) and torch.equal(part[0].keep, keep[rows])
    for start, stop in ((0, 700), (0, 350), (350, 700), (128, 256), (100, 101), (130, 140), (639, 700)):
        (weight, scale), num_front = take_columns(*stored, start, stop)
        part, front = multiply_out(weight, scale), num_front
        assert front == (start % 128 if precision == "int4" else 0)
        assert torch.equal(part[:, front:], dense[:, start:stop]) and not weight.keep[:, :front].any()
        assert torch.equal(weight.keep[:, front:], keep[:, start:stop]) and weight.dtype == stored[0].dtype
        assert scale is None or scale.shape == (12, -(-(front + stop - start) // 128))[:scale.ndim]
    other = _stored(precision, (5, 700), seed=1)
    both = stack_rows([stored, other])
    assert torch.equal(multiply_out(*both), torch.cat([dense, multiply_out(*other)])) and both[0].shape == (17, 700)
