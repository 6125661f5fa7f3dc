"""GraphSteps: what a decoder computes for a new token on a GPU, in one CUDA graph.

The products of a token are expected to take less time than Python needs to launch its kernels. So all of these are
replayed by one call, and what lies between two products is one kernel each, where torch has up to a dozen. Positions
are read from memory, so every token has the same graph.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from sparse_train.kernels.cuda_graph import CudaGraph
from sparse_train.kernels.steps import ACTIVATIONS, Steps, check_attention, check_step, product_calls

_SPAN = 256
"""Cached tokens that one program attends to: a longer text is divided among several."""
_SCORES = 64
"""Of so many tokens and heads at a time, as registers hold them."""

_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class GraphSteps(Steps):
    """Steps on a GPU. Tensors are of one dtype, sums in float32; keys lie as values do. Elsewhere, where Triton
    interprets its kernels, calls run one by one."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._buffers: dict[tuple[int, ...], torch.Tensor] = {}
        self.run, self.run_products = (  # type: ignore[method-assign]
            CudaGraph(run, device) if device.type == "cuda" else run
            for run in (functools.partial(_run, calls) for calls in (self._calls, self._products)))

    @staticmethod
    def key_cache(values: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(values)

    @staticmethod
    def put_keys(cache: torch.Tensor, keys: torch.Tensor) -> None:
        cache[:, :, :keys.shape[2]] = keys

    def normalise(self, hidden: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor,
                  bias: torch.Tensor | None, epsilon: float, out: torch.Tensor, is_rms: bool) -> None:
        num_rows, width = hidden.shape
        for tensor, shape in ((hidden, (num_rows, width)), (change, (num_rows, width)), (out, (num_rows, width)),
                              (weight, (width,)), (bias, (width,))):
            check_step(tensor, *shape)
        self.add(functools.partial(
            _normalise[(num_rows,)], hidden, change, weight, bias, out, width, epsilon, is_rms,
            triton.next_power_of_2(width), num_warps=8, **_OPTIONS))

    def activate(self, name: str, x: torch.Tensor, factor: torch.Tensor | None, out: torch.Tensor) -> None:
        for tensor in (x, factor, out):
            check_step(tensor, *x.shape)
        self.add(functools.partial(_activate[(triton.cdiv(x.numel(), 1024),)], x, factor, out, x.numel(),
                                   ACTIVATIONS[name], 1024, **_OPTIONS))

    def multiply(self, weight: Any, bias: torch.Tensor | None, x: torch.Tensor, out: torch.Tensor) -> None:
        check_step(x, None, weight.shape[1])
        check_step(out, len(x), weight.shape[0])
        self._add_products(product_calls(weight, bias, x, out))

    def attend(self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, out: torch.Tensor,
               keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor, starts: torch.Tensor, scale: float,
               rotation: tuple[torch.Tensor, torch.Tensor] | None = None, bias: torch.Tensor | None = None,
               norms: tuple[torch.Tensor, torch.Tensor] | None = None, epsilon: float = 0.0) -> None:
        num_rows, num_groups, capacity, head_dim = values.shape
        num_heads = out.shape[1] // head_dim
        num_shared, num_parts = num_heads // num_groups, triton.cdiv(capacity, _SPAN)
        cosine, sine = rotation or (None, None)
        query_norm, key_norm = norms or (None, None)
        rotary = 0 if cosine is None else cosine.shape[1]
        k_stride = check_attention(num_heads, num_groups, head_dim, rotary, k, v)
        for tensor, shape in ((out, (num_rows, num_heads * head_dim)), (keys, values.shape), (values, values.shape),
                              (cosine, (capacity, rotary)), (sine, (capacity, rotary)), (bias, (num_heads, capacity)),
                              (query_norm, (head_dim,)), (key_norm, (head_dim,))):
            check_step(tensor, *shape)
        for tensor, size in ((position, 1), (starts, num_rows)):
            check_step(tensor, size, dtypes=(torch.int64,))
        for tensor, heads in ((q, num_heads), (k, num_groups), (v, num_groups)):
            check_step(tensor, num_rows, heads * head_dim, is_part=True)
        parts = self._buffer(out, num_rows, num_heads, num_parts, head_dim)
        tops, totals = (self._buffer(out, num_rows, num_heads, num_parts, number) for number in (-1, -2))
        self.add(functools.partial(
            _attend[(num_rows * num_groups, num_parts)], q, k, v, out, keys, values, position, starts, cosine, sine,
            bias, query_norm, key_norm, parts, tops, totals, q.stride(0), k_stride, capacity, num_parts, scale, epsilon,
            num_groups, num_shared, head_dim, rotary, num_parts == 1, triton.next_power_of_2(num_shared),
            triton.next_power_of_2(head_dim), _SPAN, max(1, _SCORES // triton.next_power_of_2(num_shared)),
            num_warps=4, **_OPTIONS))
        if num_parts > 1:
            self.add(functools.partial(
                _add_parts[(num_rows * num_heads,)], parts, tops, totals, out, num_parts, head_dim,
                triton.next_power_of_2(num_parts), triton.next_power_of_2(head_dim), **_OPTIONS))

    def _buffer(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Float32, one for all blocks; a last number below 0 tells those of one shape apart."""
        if shape not in self._buffers:
            self._buffers[shape] = like.new_empty(shape if shape[-1] > 0 else shape[:-1], dtype=torch.float32)
        return self._buffers[shape]


def _run(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


@triton.jit
def _normalise(hidden, change, weight, bias, out, width, epsilon, IS_RMS: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    is_in = column < width
    x = tl.load(hidden + row * width + column, mask=is_in, other=0).to(tl.float32)
    if change is not None:
        x += tl.load(change + row * width + column, mask=is_in, other=0).to(tl.float32)
        rounded = x.to(hidden.dtype.element_ty)
        tl.store(hidden + row * width + column, rounded, mask=is_in)
        x = rounded.to(tl.float32)
    if not IS_RMS:
        x = tl.where(is_in, x - tl.sum(x, 0) / width, 0)
    y = x / tl.sqrt(tl.sum(x * x, 0) / width + epsilon) * tl.load(weight + column, mask=is_in, other=0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=is_in, other=0).to(tl.float32)
    tl.store(out + row * width + column, y.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _activate(x, factor, out, count, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """NAME: a number of ACTIVATIONS."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_in = place < count
    a = tl.load(x + place, mask=is_in, other=0).to(tl.float32)
    if NAME == 0:
        y = a * tl.sigmoid(a)
    elif NAME == 1:
        y = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
    elif NAME == 2:
        y = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))  # tanh(z) = 2 sigmoid(2 z) - 1
    else:
        y = tl.where(a < 0, 0.0, a)  # NaN stays
    if factor is not None:
        y *= tl.load(factor + place, mask=is_in, other=0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _turn(heads, is_head, norm, cosine, sine, epsilon, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
          DIM: tl.constexpr):
    """Heads of a query or a key, given by the addresses of their first numbers -> (heads, DIM), normalised and turned
    by a row of cosines and sines."""
    entry = tl.arange(0, DIM)
    x = tl.load(heads[:, None] + entry[None, :], mask=is_head[:, None] & (entry < HEAD_DIM)[None, :], other=0)
    x = x.to(tl.float32)
    if norm is not None:
        factor = 1 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + epsilon)
        x *= factor[:, None] * tl.load(norm + entry, mask=entry < HEAD_DIM, other=0).to(tl.float32)[None, :]
    if ROTARY > 0:
        is_low, is_turned = entry < ROTARY // 2, entry < ROTARY
        partner = tl.where(is_low, entry + ROTARY // 2, entry - ROTARY // 2)
        y = tl.load(heads[:, None] + partner[None, :], mask=is_head[:, None] & is_turned[None, :], other=0)
        y = y.to(tl.float32)
        if norm is not None:
            y *= factor[:, None] * tl.load(norm + partner, mask=is_turned, other=0).to(tl.float32)[None, :]
        y = tl.where(is_low[None, :], -y, y)
        cosine_at = tl.load(cosine + entry, mask=is_turned, other=0).to(tl.float32)
        sine_at = tl.load(sine + entry, mask=is_turned, other=0).to(tl.float32)
        x = tl.where(is_turned[None, :], x * cosine_at[None, :] + y * sine_at[None, :], x)
    return x


@triton.jit
def _attend(q, k, v, out, keys, values, position, starts, cosine, sine, bias, query_norm, key_norm, parts, tops, totals,
            q_stride, k_stride, capacity, num_parts, scale, epsilon, NUM_GROUPS: tl.constexpr, NUM_HEADS: tl.constexpr,
            HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, IS_WHOLE: tl.constexpr, HEADS: tl.constexpr,
            DIM: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr):
    """The heads of a row that share keys attend to a part of the text. The first part has the new token too: its key
    and value are in registers, and are written for the next tokens."""
    row, group, part = tl.program_id(0) // NUM_GROUPS, tl.program_id(0) % NUM_GROUPS, tl.program_id(1)
    last, start = tl.load(position), tl.load(starts + row)
    head, entry = tl.arange(0, HEADS), tl.arange(0, DIM)
    is_head, is_entry = head < NUM_HEADS, entry < HEAD_DIM
    number = group * NUM_HEADS + head
    cosine_at, sine_at = cosine, sine
    if ROTARY > 0:
        cosine_at, sine_at = cosine + (last - start) * ROTARY, sine + (last - start) * ROTARY
    query = _turn(q + row * q_stride + number * HEAD_DIM, is_head, query_norm, cosine_at, sine_at, epsilon, HEAD_DIM,
                  ROTARY, DIM) * scale
    cached = (tl.program_id(0).to(tl.int64) * capacity) * HEAD_DIM
    if k is not None:
        one = tl.arange(0, 1)
        new_key = _turn(k + row * k_stride + group * HEAD_DIM + one, one == 0, key_norm, cosine_at, sine_at, epsilon,
                        HEAD_DIM, ROTARY, DIM).to(keys.dtype.element_ty)
        new_value = tl.load(v + row * k_stride + group * HEAD_DIM + one[:, None] + entry[None, :],
                        mask=is_entry[None, :], other=0)
        new_place = cached + last * HEAD_DIM + one[:, None] + entry[None, :]
        is_stored = is_entry[None, :] & (part + one[:, None] == 0)
        tl.store(keys + new_place, new_key, mask=is_stored)
        tl.store(values + new_place, new_value, mask=is_stored)
        top = tl.sum(query * new_key.to(tl.float32), 1)
        if bias is not None:
            top += tl.load(bias + number * capacity, mask=is_head, other=0).to(tl.float32)
        top = tl.where(part == 0, top, float("-inf"))
        total = tl.where(part == 0, 1.0, 0.0) + tl.zeros([HEADS], tl.float32)
        context = tl.where(part == 0, new_value.to(tl.float32), 0.0) + tl.zeros([HEADS, DIM], tl.float32)
        end = last
    else:
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        context = tl.zeros([HEADS, DIM], tl.float32)
        end = last + 1
    for begin in tl.range(tl.maximum(start, part * SPAN), tl.minimum(end, (part + 1) * SPAN), KEYS, num_stages=3):
        token = begin + tl.arange(0, KEYS)
        is_there = token < tl.minimum(end, (part + 1) * SPAN)
        place = cached + token[:, None] * HEAD_DIM + entry[None, :]
        is_read = is_there[:, None] & is_entry[None, :]
        key = tl.load(keys + place, mask=is_read, other=0).to(tl.float32)
        scores = tl.sum(query[:, None, :] * key[None, :, :], 2)
        if bias is not None:
            scores += tl.load(bias + number[:, None] * capacity + (last - token)[None, :],
                              mask=is_head[:, None] & is_there[None, :], other=0).to(tl.float32)
        scores = tl.where(is_there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares, rest = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
        value = tl.load(values + place, mask=is_read, other=0).to(tl.float32)
        context = context * rest[:, None] + tl.sum(shares[:, :, None] * value[None, :, :], 1)
        total, top = total * rest + tl.sum(shares, 1), higher
    if IS_WHOLE:
        tl.store(out + (row * NUM_GROUPS * NUM_HEADS + number)[:, None] * HEAD_DIM + entry[None, :],
                 (context / total[:, None]).to(out.dtype.element_ty), mask=is_head[:, None] & is_entry[None, :])
    else:
        at = (row * NUM_GROUPS * NUM_HEADS + number) * num_parts + part
        tl.store(parts + at[:, None] * HEAD_DIM + entry[None, :], context, mask=is_head[:, None] & is_entry[None, :])
        tl.store(tops + at, top, mask=is_head)
        tl.store(totals + at, total, mask=is_head)


@triton.jit
def _add_parts(parts, tops, totals, out, num_parts, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr):
    part, entry = tl.arange(0, PARTS), tl.arange(0, DIM)
    is_part, is_entry = part < num_parts, entry < HEAD_DIM
    at = tl.program_id(0) * num_parts + part
    top = tl.load(tops + at, mask=is_part, other=float("-inf"))
    share = tl.exp(top - tl.max(top, 0))
    total = tl.sum(share * tl.load(totals + at, mask=is_part, other=0), 0)
    context = tl.load(parts + at[:, None] * HEAD_DIM + entry[None, :], mask=is_part[:, None] & is_entry[None, :],
                      other=0)
    tl.store(out + tl.program_id(0) * HEAD_DIM + entry,
             (tl.sum(share[:, None] * context, 0) / total).to(out.dtype.element_ty), mask=is_entry)
