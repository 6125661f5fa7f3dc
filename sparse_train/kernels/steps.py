"""Steps: what a decoder computes for a new token, as native calls over memory that stays where it is.

A call costs well under a microsecond, an operator of torch several, and a token of a small model takes hundreds.
"""

import functools
from collections.abc import Callable

import torch

from sparse_train.kernels import _native
from sparse_train.kernels.packed import PackedMatrix

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
"""transformers' name -> the native code's number."""


class Steps:
    """Calls in order, made once and run for every token. Letters: B rows of the batch, D width, C and R as in kernels.

    Tensors are float32 on the CPU, and those that are written are contiguous; they must not be resized or replaced.
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []
        self._kept: list[object] = []  # the native code has addresses only

    def run(self) -> None:
        for call in self._calls:
            call()

    def add(self, call: Callable[[], object]) -> None:
        self._calls.append(call)

    def normalise(self, hidden: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor,
                  bias: torch.Tensor | None, epsilon: float, out: torch.Tensor, is_rms: bool) -> None:
        """hidden (B, D) += change, where there is one; out (B, D) = norm(hidden) * weight + bias."""
        self.add(functools.partial(
            _native.add_and_normalise, self._at(hidden), self._at(change), self._at(weight), self._at(bias),
            self._at(out), len(hidden), hidden.shape[1], epsilon, is_rms))

    def activate(self, name: str, x: torch.Tensor, factor: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = f(x), times `factor` where it is given; the name is one of ACTIVATIONS, `out` may be x."""
        self.add(functools.partial(_native.activate, ACTIVATIONS[name], self._at(x), self._at(factor), self._at(out),
                                   x.numel()))

    def multiply(self, weight: PackedMatrix | torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor,
                 out: torch.Tensor) -> None:
        """out (B, R) = x (B, C) W^T + bias, W packed or dense (R, C)."""
        if isinstance(weight, PackedMatrix):
            self.add(weight.product(x, out))
            if bias is not None:
                self.add(functools.partial(out.add_, bias))
        elif len(x) == 1:
            start = (weight, x[0]) if bias is None else (bias, weight, x[0])
            self.add(functools.partial(torch.mv if bias is None else torch.addmv, *start, out=out[0]))
        else:
            start = (x, weight.T) if bias is None else (bias, x, weight.T)
            self.add(functools.partial(torch.mm if bias is None else torch.addmm, *start, out=out))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, keys: torch.Tensor,
               values: torch.Tensor, position: torch.Tensor, starts: torch.Tensor, scale: float,
               rotation: tuple[torch.Tensor, torch.Tensor] | None = None, bias: torch.Tensor | None = None,
               norms: tuple[torch.Tensor, torch.Tensor] | None = None, epsilon: float = 0.0) -> None:
        """Append k, v (B, heads of both * head_dim) to a cache, and let q (B, heads * head_dim) attend to it.

        `keys` and `values` (B, heads of both, capacity, head_dim); `position` (1,) int64: where the new token goes;
        `starts` (B,) int64: each row's first position. `rotation`: cosines and sines (capacity, rotary width) by the
        distance from the start; `bias` (heads, capacity) by the distance between q and k; `norms` (head_dim,): RMS
        norms of each head of q and of k, before they turn. q, k, v may be parts of one tensor's rows.
        """
        num_rows, num_groups, capacity, head_dim = keys.shape
        cosine, sine = rotation or (None, None)
        query_norm, key_norm = norms or (None, None)
        attention = _native.Attention(
            num_rows, out.shape[1] // head_dim, num_groups, head_dim, capacity, scale, self._at(keys), self._at(values),
            self._at(position), self._at(starts), 0 if cosine is None else cosine.shape[1], self._at(cosine),
            self._at(sine), self._at(bias), self._at(query_norm), self._at(key_norm), epsilon)
        self.add(functools.partial(attention.attend, self._at(q), self._at(k), self._at(v), self._at(out), q.stride(0),
                                   k.stride(0), torch.get_num_threads()))

    def _at(self, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return tensor.data_ptr()
