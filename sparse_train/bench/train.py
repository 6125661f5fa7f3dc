"""A training step of sparse fine-tuning with a teacher, compared with a dense step and with masked training.

    dense     the dense model, cross-entropy alone
    masked    the usual way: dense weights times a stored mask, SquareHead over lists of all hidden states
    ours      values as parameters, SquareHead layer by layer

All three take turns under ZeRO-3, on the same ranks, with the same model and batch. The teacher's forward pass (1)
beside the student's forward and backward pass (1 + 2) makes the arithmetic up to 4 / 3 of the dense step's.

The FLOPs of a step are those of its matrix products. A forward pass over one sequence of T tokens takes

    F = sum over linears, the head included, of  2 * T * R * C      + num_layers * 4 * T^2 * heads * head width

where the second part is attention's two products, over all T keys as they are computed. A step takes 3 F, and F more
for a teacher; in ours without its head, whose logits SquareHead does not read. Pruned weights count as well, because
they are multiplied; recomputation does not. `fraction_of_products` is the step's FLOPs per second over those of torch's
products of the model's linears alone: y = x W^T and both gradients, one layer after the other, in the same dtype,
threads and rounds.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.comm.comm import comms_logger
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import MptConfig, MptForCausalLM, PreTrainedModel

from sparse_train import dist, kernels
from sparse_train.bench.timing import Timing, interleave
from sparse_train.config import LossConfig, TeacherConfig, TrainConfig, ZeroConfig
from sparse_train.models import family_of, load_model
from sparse_train.sparse import BitmaskTensor, replace_module, sparsify
from sparse_train.tasks import Batch
from sparse_train.training.engine import build_student, build_teacher, step_engine
from sparse_train.training.fragments import state_bytes
from sparse_train.training.losses import new_terms, weighted_loss
from sparse_train.training.order import Order
from sparse_train.training.run import TrainingRun
from sparse_train.training.step import Trainer
from sparse_train.training.terms import ModelOutputs

_SQUAREHEAD = LossConfig(feature_weight=1.0)
_GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "expand and compact": ("GeneratedBackwardFor_sparse_train_linear_default", "sparse_train::linear_grad_x",
                           "sparse_train::linear_grad_values"),
    "optimizer": ("aten::_fused_adamw_", "Optimizer.step#AdamW.step"),
}


@dataclass(frozen=True)
class TrainBench:
    path: str | None = None
    """A folder or hub name of a dense decoder with at least `vocab_size` tokens; None: an MPT of the size below."""
    d_model: int = 768
    n_layers: int = 6
    vocab_size: int = 8192
    num_tokens: int = 512
    """Per rank and step, one sequence."""
    sparsity: float = 0.75
    precision: str = "fp32"
    checkpointing: bool = False
    repeats: int = 7

    def model(self) -> PreTrainedModel:
        if self.path is not None:
            model = load_model(self.path)
            model.config.use_cache = False
            return model
        torch.manual_seed(0)
        return MptForCausalLM(MptConfig(d_model=self.d_model, n_layers=self.n_layers, n_heads=self.d_model // 64,
                                        vocab_size=self.vocab_size, max_seq_len=self.num_tokens, use_cache=False))

    def train_config(self) -> TrainConfig:
        return TrainConfig(batch_size=dist.world_size(), precision=self.precision, zero=ZeroConfig(stage=3),
                           activation_checkpointing=self.checkpointing)

    def batch(self, indices: list[int]) -> Batch:
        ids = torch.randint(self.vocab_size, (1, self.num_tokens), generator=torch.Generator().manual_seed(indices[0]))
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids)

    def keep(self, linear: nn.Linear) -> torch.Tensor:
        """(R, C) bool, drawn at random; speed does not depend on which positions are kept."""
        return torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(1)) >= self.sparsity


def train_bench(bench: TrainBench, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Collective. Under step_time, peak_memory, traffic_bytes and state_bytes: masked and ours relative to dense
    (step_time with its quartiles over rounds); under measured: the absolute values of this rank."""
    products = _Products(bench.model(), bench)
    candidates: dict[str, Trainer | _Masked] = {
        "dense": _trainer(bench, sparse=False), "masked": _Masked(bench), "ours": _trainer(bench, sparse=True)}
    steps = {name: functools.partial(_step, candidate) for name, candidate in candidates.items()}
    timings = interleave({**steps, "products": products}, bench.repeats, progress)
    measured: dict[str, dict[str, Any]] = {}
    for name, candidate in candidates.items():
        num_state_bytes = state_bytes(candidate.engine)
        peak, parts = _profile(steps[name])
        measured[name] = {"seconds": timings[name].plain(), "state_bytes": num_state_bytes,
                          "peak_memory": num_state_bytes + peak, "traffic_bytes": _traffic(steps[name]),
                          "milliseconds_of": parts, "flops": products.flops_of_step(name)}
        speed = Timing(tuple(measured[name]["flops"] / seconds for seconds in timings[name].rounds))
        most = Timing(tuple(products.flops / seconds for seconds in timings["products"].rounds))
        measured[name]["fraction_of_products"] = speed.over(most).plain()
    others = ("masked", "ours")
    return {"step_time": {name: timings[name].over(timings["dense"]).plain() for name in others},
            **{key: {name: measured[name][key] / measured["dense"][key] for name in others}
               for key in ("peak_memory", "traffic_bytes", "state_bytes")},
            "products_flops_per_second": most.plain(), "measured": measured, "bench": vars(bench),
            "ranks": dist.world_size(), "device": str(dist.device()),
            "backend": kernels.backend() if dist.device().type == "cpu" else ""}


class _Products:
    """The products of a step's linears, without all else: `flops` of them per call."""

    def __init__(self, model: PreTrainedModel, bench: TrainBench):
        self._num_tokens, config = bench.num_tokens, model.config
        linears = [linear for linear in model.modules() if isinstance(linear, nn.Linear)]
        self._shapes = [tuple(linear.weight.shape) for linear in linears]
        self._tensors = {shape: self._inputs(shape, torch.bfloat16 if bench.precision == "bf16" else torch.float32)
                         for shape in set(self._shapes)}
        self.flops = 3 * self._forward(self._shapes)
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._attention = 4 * config.num_hidden_layers * bench.num_tokens**2 * config.num_attention_heads * head_width
        self._head = self._forward([tuple(model.get_output_embeddings().weight.shape)])

    def _inputs(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """x (T, C), the gradient of y (T, R), W (R, C)."""
        rows, columns = shape
        return tuple(torch.randn(size, dtype=torch.float32).to(dist.device(), dtype) for size in (
            (self._num_tokens, columns), (self._num_tokens, rows), (rows, columns)))

    def _forward(self, shapes: list[tuple[int, ...]]) -> int:
        return sum(2 * self._num_tokens * rows * columns for rows, columns in shapes)

    def flops_of_step(self, name: str) -> float:
        """Of dense, masked or ours, on this rank; see the module's formula."""
        forward = self.flops / 3 + self._attention
        return 3 * forward + {"dense": 0, "masked": forward, "ours": forward - self._head}[name]

    def __call__(self) -> None:
        for shape in self._shapes:
            x, grad_y, weight = self._tensors[shape]
            torch.mm(x, weight.T)
            torch.mm(grad_y, weight)
            torch.mm(grad_y.T, x)
        if dist.device().type == "cuda":
            torch.cuda.synchronize()


def _trainer(bench: TrainBench, sparse: bool) -> Trainer:
    student = bench.model()
    if sparse:
        sparsify(student, {name: BitmaskTensor.from_dense(linear.weight.detach(), bench.keep(linear))
                           for name, linear in family_of(student).dense_linears(student).items()})
    run = TrainingRun(student, bench.batch, Order(None, dist.world_size(), 1, 0), bench.train_config())
    return Trainer(replace(run, loss=_SQUAREHEAD, teacher=bench.model()) if sparse else run)


class _MaskedLinear(nn.Module):
    mask: torch.Tensor

    def __init__(self, linear: nn.Linear, keep: torch.Tensor):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("mask", keep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class _Masked:
    """Masked training as it is usually written: masks as buffers, all hidden states kept until the loss."""

    def __init__(self, bench: TrainBench):
        student, config = bench.model(), bench.train_config()
        for name, linear in family_of(student).dense_linears(student).items():
            replace_module(student, name, _MaskedLinear(linear, bench.keep(linear)))
        self._bench = bench
        self.engine = build_student(student, config)
        self._teacher = build_teacher(bench.model(), config, TeacherConfig())
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = config.learning_rate

    def step(self, step: int) -> None:
        batch = self._bench.batch([step + dist.rank()]).to(dist.device())
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attend.long(), "output_hidden_states": True}
        with torch.no_grad():
            teacher = self._teacher(**inputs)
        student = self.engine(**inputs)
        outputs = ModelOutputs(*(x.flatten(0, 1) for x in (student.logits, batch.targets, batch.labels)))
        loss = weighted_loss(LossConfig(), new_terms(LossConfig()), outputs).loss
        for s, t in zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True):
            s, t = s[batch.attend].float(), t[batch.attend].float()
            loss = loss + (s - t).square().mean() / t.square().mean() / dist.world_size()
        self.engine.backward(loss * dist.world_size())
        step_engine(self.engine)


def _step(candidate: Trainer | _Masked) -> None:
    candidate.step(1)
    if dist.device().type == "cuda":
        torch.cuda.synchronize()


def _traffic(step: Callable[[], None]) -> int:
    """Bytes of the collectives of one step, from DeepSpeed's communication log."""
    comms_logger.enabled = comms_logger.prof_all = True
    comms_logger.verbose = False
    comms_logger.reset_data()
    try:
        step()
        # By operation, then by message size: [count, ...].
        return sum(size * record[0] for sizes in comms_logger.comms_dict.values() for size, record in sizes.items())
    finally:
        comms_logger.enabled = False


def _profile(step: Callable[[], None]) -> tuple[int, dict[str, float]]:
    """(peak bytes that one step allocates beyond those before it, milliseconds by kind of work)."""
    on_gpu = dist.device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, profile_memory=not on_gpu) as profiler:
        step()
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() - before
    else:
        level = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
    times = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
             for event in profiler.key_averages()}
    parts = {group: sum(times.get(name, 0) for name in names) for group, names in _GROUPS.items()}
    parts["collectives"] = sum(t for name, t in times.items() if name.startswith(("c10d::", "gloo:", "nccl:")))
    parts["everything else"] = sum(times.values()) - sum(parts.values())
    return peak, parts
