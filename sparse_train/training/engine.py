"""DeepSpeed's engines: a student's that trains, a teacher's that only answers.

The student's `values` are ordinary parameters to DeepSpeed. The teacher has its own ZeRO-3 engine without an optimizer:
sharded over the same ranks, gathered layer by layer during its forward, never trained.
"""

import math
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train.compat.deepspeed import full_shape
from sparse_train.config import TeacherConfig, TrainConfig
from sparse_train.sparse import sparse_linears

_BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 reserves 2 GB per rank in fp32


def build_student(model: PreTrainedModel, config: TrainConfig) -> Any:
    """The training engine, a DeepSpeedEngine. Collective."""
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.register_forward_pre_hook(_convert_inputs, with_kwargs=True)
    engine = deepspeed.initialize(model=model, optimizer=_optimizer(model, config), config=student_settings(config))[0]
    if not engine.zero_optimization():
        # In bf16 DeepSpeed has taken a step to make the moments: at rate 0, but Adam's count would be one ahead.
        engine.basic_optimizer.state.clear()
    return engine


def build_teacher(model: PreTrainedModel, config: TrainConfig, teacher: TeacherConfig) -> Any:
    """The answering engine, a DeepSpeedEngine whose model stays in eval mode. Collective."""
    model.eval().requires_grad_(False)
    model.register_forward_pre_hook(_convert_inputs, with_kwargs=True)

    def stay_in_eval_mode(mode: bool = True) -> nn.Module:
        return model

    # Helpers of both libraries call train().
    model.train = stay_in_eval_mode  # type: ignore[method-assign]
    return deepspeed.initialize(model=model, config=teacher_settings(config, teacher))[0]


def _convert_inputs(model: PreTrainedModel, args: tuple[Any, ...],
                    inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Batches hold fp32 spectrograms, also those of models in bf16; student and teacher may differ in it."""
    return args, {name: value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
                  for name, value in inputs.items()}


def student_settings(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of the student's engine."""
    settings = _settings(config.precision, config.zero.stage, config.zero.persistence_threshold)
    settings |= {"gradient_accumulation_steps": config.accumulation,
                 # Set explicitly: the default became 1.0 in 0.19.3.
                 "gradient_clipping": config.clip}
    if config.zero.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW steps on the CPU without a compiler
    return settings


def teacher_settings(config: TrainConfig, teacher: TeacherConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of the teacher's engine, which partitions it whatever the student's stage."""
    settings = _settings(teacher.precision or config.precision, 3, teacher.persistence_threshold)
    if teacher.offload:
        settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return settings


def _settings(precision: str, stage: int, persistence_threshold: int) -> dict[str, Any]:
    return {
        # DeepSpeed never counts examples: they are split here, unevenly too, and the losses normalised over ranks.
        "train_micro_batch_size_per_gpu": 1,
        # A step that overflows must not be skipped: the training stops at a norm that is not finite.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": persistence_threshold,
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            "stage3_prefetch_bucket_size": _BUCKET,
        },
        "steps_per_print": 2**31,
    }


def _optimizer(student: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with decay on matrices and kept values, none on norms and biases. The loop sets its learning rate."""
    values = {id(linear.values) for linear in sparse_linears(student).values()}
    trained = [p for p in student.parameters() if p.requires_grad]
    decayed = {id(p) for p in trained if len(full_shape(p)) > 1} | values
    groups = [{"params": [p for p in trained if id(p) in decayed], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=config.betas, fused=True)


def step_engine(engine: Any) -> float:
    """Call `engine.step()` after a micro-step's backward pass.

    Returns the norm of the whole gradient before clipping where that ended an optimizer step, NaN otherwise. The norm
    is the same on all ranks, and the one number of a step that the host waits for.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return math.nan
    if engine.zero_optimization():
        engine.step()
        return float(engine.get_global_grad_norm())
    # DeepSpeed keeps no norm without ZeRO, and drops the gradients in step().
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return float(norm)
