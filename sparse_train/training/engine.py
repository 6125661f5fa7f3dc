"""Everything that knows ZeRO: a student engine that trains, a teacher engine that only answers.

The student's `values` are ordinary parameters to DeepSpeed. The teacher has its own ZeRO-3 engine without an optimizer:
sharded over the same ranks, gathered layer by layer during its forward, never trained.
"""

import hashlib
from collections.abc import Iterator

import deepspeed
import torch
from torch import nn

from sparse_train import dist
from sparse_train.config import TrainConfig
from sparse_train.models import family_of, own_tensors
from sparse_train.models.family import block_output
from sparse_train.sparse import sparse_linears

_BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 reserves 2 GB per rank in fp32


def build_engines(student: nn.Module, teacher: nn.Module | None, config: TrainConfig):
    """(student engine, teacher engine or None), partitioned as `config` says. Digests of the bits must agree."""
    dist.require_agreement("the bits of sparse weights", bits_digests(student))
    if config.activation_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    student_engine = deepspeed.initialize(
        model=student, optimizer=_optimizer(student, config),
        config=_deepspeed_config(config, config.zero.stage, accumulation=config.accumulation,
                                 gradient_clipping=config.clip))[0]
    if teacher is None:
        return student_engine, None
    teacher.eval().requires_grad_(False)
    return student_engine, deepspeed.initialize(model=teacher, config=_deepspeed_config(config, stage=3))[0]


def _deepspeed_config(config: TrainConfig, stage: int, accumulation: int = 1, gradient_clipping: float = 0.0) -> dict:
    return {
        # Batches are ours to split, unevenly too: the losses are normalised over ranks, and DeepSpeed never counts.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        # Always said: the default became 1.0 in 0.19.3.
        "gradient_clipping": gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": config.zero.persistence_threshold,
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            "stage3_prefetch_bucket_size": _BUCKET,
        },
        "steps_per_print": 2**31,
    }


def _optimizer(student: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with decay on matrices and kept values, none on norms and biases."""
    values = {id(linear.values) for linear in sparse_linears(student).values()}
    parameters = list(student.parameters())
    decayed = [p for p in parameters if p.ndim > 1 or id(p) in values]
    others = [p for p in parameters if not (p.ndim > 1 or id(p) in values)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate,
                             betas=config.betas)


def bits_digests(model: nn.Module) -> dict[str, str]:
    """sha256 of each sparse weight's bits, by module name."""
    return {name: hashlib.sha256(linear.bitmask.cpu().numpy().tobytes()).hexdigest()
            for name, linear in sparse_linears(model).items()}


def step_engine(engine) -> torch.Tensor | float | None:
    """One `engine.step()`; returns the norm of the whole gradient before clipping, None between boundaries."""
    norm = None
    if engine.is_gradient_accumulation_boundary() and not engine.zero_optimization():
        # DeepSpeed keeps no norm in plain fp32, and drops the gradients in step().
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return engine.get_global_grad_norm() if norm is None else norm


def gathered_tensors(engine) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the engine's model, whole on the CPU, gathered one by one. Every rank must iterate."""
    for name, tensor in own_tensors(engine.module).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            yield name, tensor.detach().cpu().clone()


class FeatureTap:
    """Collects the block outputs (B, T, D) of a forward pass run inside `with tap:`, for one take().

    Outside of it the hooks do nothing: activation checkpointing runs the blocks again in the backward pass.
    """

    def __init__(self, model: nn.Module):
        self._features: list[torch.Tensor] = []
        self._open = False
        for block in family_of(model).block_list(model):
            block.register_forward_hook(self._record)

    def _record(self, module, inputs, output):
        if self._open:
            self._features.append(block_output(output))

    def __enter__(self) -> "FeatureTap":
        self._features, self._open = [], True
        return self

    def __exit__(self, *exception):
        self._open = False

    def take(self) -> list[torch.Tensor]:
        """One per block; the tap lets go of them."""
        taken, self._features = self._features, []
        return taken
