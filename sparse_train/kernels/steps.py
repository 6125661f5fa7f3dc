"""Steps: what a decoder computes for a new token, as native calls over memory that stays where it is.

A call costs well under a microsecond, an operator of torch several, and a token of a small model takes hundreds.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from sparse_train.kernels import _native
from sparse_train.kernels.arguments import CPU, check_tensor, describe
from sparse_train.kernels.packed import PackedMatrix

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
"""transformers' name -> the native code's number."""
_BLOCK = _native.key_block


class Steps:
    """Calls in order, made once and run for every token. Letters: B rows of the batch, D width, C and R as in kernels.

    Tensors are float32, a cache's also bfloat16, on the CPU and contiguous, and must not be resized. Raises ValueError
    for what does not fit.
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []
        self._products: list[Callable[[], object]] = []
        self._kept: list[object] = []  # the native code has addresses only

    def run(self) -> None:
        for call in self._calls:
            call()

    def run_products(self) -> None:
        """Those with weights alone, to measure them."""
        for call in self._products:
            call()

    def add(self, call: Callable[[], object]) -> None:
        self._calls.append(call)

    @staticmethod
    def key_cache(values: torch.Tensor) -> torch.Tensor:
        """Memory for the keys of as many tokens as `values` (B, heads, capacity, head_dim) has room for. Keys lie in
        blocks of some tokens, entry by entry, so that a query is multiplied with a block at once: (B, heads, blocks,
        head_dim, tokens of a block)."""
        num_rows, num_heads, capacity, head_dim = values.shape
        return values.new_empty(num_rows, num_heads, -(-capacity // _BLOCK), head_dim, _BLOCK)

    @staticmethod
    def put_keys(cache: torch.Tensor, keys: torch.Tensor) -> None:
        """Write `keys` (B, heads, T, head_dim) to the beginning of a `key_cache`."""
        whole, rest = divmod(keys.shape[2], _BLOCK)
        by_token = cache.transpose(3, 4)
        by_token[:, :, :whole] = keys[:, :, :whole * _BLOCK].unflatten(2, (whole, _BLOCK))
        by_token[:, :, whole:whole + 1, :rest] = keys[:, :, None, whole * _BLOCK:]

    def embed(self, table: PackedMatrix | torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """out (B, D) = the rows `tokens` (B,) int64 of the table (V, D), packed or dense."""
        self.add((lambda: out.copy_(table.rows(tokens))) if isinstance(table, PackedMatrix) else
                 functools.partial(torch.index_select, table, 0, tokens, out=out))

    def normalise(self, hidden: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor,
                  bias: torch.Tensor | None, epsilon: float, out: torch.Tensor, is_rms: bool) -> None:
        """hidden (B, D) += change, where there is one; out (B, D) = norm(hidden) * weight + bias."""
        num_rows, width = hidden.shape
        self.add(functools.partial(
            _native.add_and_normalise, self._at(hidden), self._at(change, num_rows, width), self._at(weight, width),
            self._at(bias, width), self._at(out, num_rows, width), num_rows, width, epsilon, is_rms))

    def activate(self, name: str, x: torch.Tensor, factor: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = f(x), times `factor` where it is given; the name is one of ACTIVATIONS, `out` may be x."""
        self.add(functools.partial(_native.activate, ACTIVATIONS[name], self._at(x), self._at(factor, *x.shape),
                                   self._at(out, *x.shape), x.numel()))

    def multiply(self, weight: PackedMatrix | torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor,
                 out: torch.Tensor) -> None:
        """out (B, R) = x (B, C) W^T + bias, W packed or dense (R, C)."""
        self._at(x, None, weight.shape[1])
        self._at(out, len(x), weight.shape[0])
        if isinstance(weight, torch.Tensor) and len(x) == 1:
            start = (weight, x[0]) if bias is None else (bias, weight, x[0])
            self._add_products([functools.partial(torch.mv if bias is None else torch.addmv, *start, out=out[0])])
        else:
            self._add_products(product_calls(weight, bias, x, out))

    def _add_products(self, calls: list[Callable[[], object]]) -> None:
        self._calls += calls
        self._products += calls

    def attend(self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, out: torch.Tensor,
               keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, starts: torch.Tensor, scale: float,
               rotation: tuple[torch.Tensor, torch.Tensor] | None = None, bias: torch.Tensor | None = None,
               norms: tuple[torch.Tensor, torch.Tensor] | None = None, epsilon: float = 0.0) -> None:
        """Append k, v (B, heads of both * head_dim) to a cache, and let q (B, heads * head_dim) attend to it; without k
        and v, as in cross-attention, to what is there.

        `keys` as `key_cache` makes it, `values` (B, heads of both, capacity, head_dim); `position` (1,) int64: the last
        one, where k and v go, below the capacity; `starts` (B,) int64: each row's first one, and a row that starts
        behind the last one becomes NaN. `rotation`: cosines and sines (capacity, rotary width) by the distance from the
        start; `bias` (heads, capacity) by the distance between q and k; `norms` (head_dim,): RMS norms of each head of
        q and of k, before they turn. q, k, v may be parts of one tensor's rows.
        """
        num_rows, num_groups, capacity, head_dim = values.shape
        num_heads = out.shape[1] // head_dim
        cosine, sine = rotation or (None, None)
        query_norm, key_norm = norms or (None, None)
        rotary = 0 if cosine is None else cosine.shape[1]
        k_stride = check_attention(num_heads, num_groups, head_dim, rotary, k, v)
        attention = _native.Attention(
            num_rows, num_heads, num_groups, head_dim, capacity, scale, values.dtype == torch.bfloat16,
            self._at(keys, num_rows, num_groups, -(-capacity // _BLOCK), head_dim, _BLOCK, dtypes=(values.dtype,)),
            self._at(values, dtypes=(torch.float32, torch.bfloat16)),
            self._at(position, 1, dtypes=(torch.int64,)), self._at(starts, num_rows, dtypes=(torch.int64,)), rotary,
            self._at(cosine, capacity, rotary), self._at(sine, capacity, rotary), self._at(bias, num_heads, capacity),
            self._at(query_norm, head_dim), self._at(key_norm, head_dim), epsilon)
        q_at, k_at, v_at = (self._at(part, num_rows, heads * head_dim, is_part=True)
                            for part, heads in ((q, num_heads), (k, num_groups), (v, num_groups)))
        self.add(functools.partial(
            attention.attend, q_at, k_at, v_at, self._at(out, num_rows, num_heads * head_dim), q.stride(0), k_stride,
            torch.get_num_threads()))

    def _at(self, tensor: torch.Tensor | None, *shape: int | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,),
            is_part: bool = False) -> int:
        """Its address, 0 for None. Raises ValueError where it is not of this shape (any, where none is given)."""
        if tensor is None:
            return 0
        check_step(tensor, *shape, device=CPU, dtypes=dtypes, is_part=is_part)
        self._kept.append(tensor)
        return tensor.data_ptr()


def product_calls(weight: Any, bias: torch.Tensor | None, x: torch.Tensor,
                  out: torch.Tensor) -> list[Callable[[], object]]:
    """out (B, R) = x (B, C) W^T + bias, W packed or dense (R, C)."""
    if isinstance(weight, torch.Tensor):
        start = (x, weight.T) if bias is None else (bias, x, weight.T)
        return [functools.partial(torch.mm if bias is None else torch.addmm, *start, out=out)]
    calls = [weight.product(x, out)]
    if bias is not None:
        calls.append(functools.partial(out.add_, bias))
    return calls


def check_step(tensor: torch.Tensor | None, *shape: int | None, device: torch.device | None = None,
               dtypes: tuple[torch.dtype, ...] | None = None, is_part: bool = False) -> None:
    """Raises ValueError where a tensor is not of this shape (any, where none is given), or its numbers, of a part those
    of each row, do not follow one another."""
    if tensor is None:
        return
    check_tensor("a tensor of a step", tensor, *(shape or tensor.shape), device=device, dtypes=dtypes)
    if tensor.numel() and not (tensor.stride(-1) == 1 if is_part else tensor.is_contiguous()):
        raise ValueError(f"a tensor of a step is {describe(tensor)}, with strides {tensor.stride()}; a step reads "
                         "numbers that follow one another")


def check_attention(num_heads: int, num_groups: int, head_dim: int, rotary: int, k: torch.Tensor | None,
                    v: torch.Tensor | None) -> int:
    """How far the rows of k and v are apart, 0 without them. Raises ValueError for what does not fit together."""
    if num_heads % num_groups or rotary % 2 or rotary > head_dim:
        raise ValueError(f"{num_heads} heads cannot share {num_groups} of keys and values, or {rotary} of the "
                         f"{head_dim} numbers of a head cannot turn")
    k_stride, v_stride = (0 if part is None else part.stride(0) for part in (k, v))
    if (k is None) != (v is None) or k_stride != v_stride:
        raise ValueError(f"k is {describe(k)}, with rows {k_stride} numbers apart, and v {describe(v)}, with rows "
                         f"{v_stride} apart; both must be alike, or both missing")
    return k_stride
