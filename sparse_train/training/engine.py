"""Everything that knows ZeRO: a student engine that trains, a teacher engine that only answers.

The student's `values` are ordinary parameters to DeepSpeed. The teacher has its own ZeRO-3 engine without an optimizer:
sharded over the same ranks, gathered layer by layer during its forward, never trained.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train import dist
from sparse_train.config import TeacherConfig, TrainConfig
from sparse_train.models import load_model, open_model, own_tensors
from sparse_train.sparse import TensorFolder, sparse_linears
from sparse_train.training.partition import part

_BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 reserves 2 GB per rank in fp32
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_student(path: str | Path, config: TrainConfig) -> PreTrainedModel:
    """The model to train: partitioned while it is read under ZeRO-3, whole otherwise. Collective."""
    if config.zero.stage < 3:
        return load_model(path)
    return _load_partitioned(path, _DTYPES[config.precision], _student_settings(config))


def load_teacher(path: str | Path, config: TrainConfig, teacher: TeacherConfig) -> PreTrainedModel:
    """The frozen model, partitioned while it is read. Collective."""
    return _load_partitioned(path, _DTYPES[teacher.precision or config.precision], _teacher_settings(config, teacher))


def build_student(model: nn.Module, config: TrainConfig):
    """The training engine."""
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = deepspeed.initialize(model=model, optimizer=_optimizer(model, config), config=_student_settings(config))[0]
    if not engine.zero_optimization():
        # In bf16 DeepSpeed has taken a step to make the moments: at rate 0, but Adam's count would be one ahead.
        engine.basic_optimizer.state.clear()
    return engine


def build_teacher(model: nn.Module, config: TrainConfig, teacher: TeacherConfig):
    """The answering engine. The model stays in eval mode whatever is asked of the engine."""
    model.eval().requires_grad_(False)
    model.train = lambda mode=True: model
    return deepspeed.initialize(model=model, config=_teacher_settings(config, teacher))[0]


def _student_settings(config: TrainConfig) -> dict[str, Any]:
    settings = _settings(config.precision, config.zero.stage, config.zero.persistence_threshold)
    settings |= {"gradient_accumulation_steps": config.accumulation,
                 # Always said: the default became 1.0 in 0.19.3.
                 "gradient_clipping": config.clip}
    if config.zero.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW steps on the CPU without a compiler
    return settings


def _teacher_settings(config: TrainConfig, teacher: TeacherConfig) -> dict[str, Any]:
    settings = _settings(teacher.precision or config.precision, 3, teacher.persistence_threshold)
    if teacher.offload:
        settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return settings


def _settings(precision: str, stage: int, persistence_threshold: int) -> dict[str, Any]:
    return {
        # Batches are ours to split, unevenly too: the losses are normalised over ranks, and DeepSpeed never counts.
        "train_micro_batch_size_per_gpu": 1,
        # A bad step is to be seen, not skipped: the loop stops at a norm that is not finite.
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
    decayed = {id(p) for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1} | values
    groups = [{"params": [p for p in trained if id(p) in decayed], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=config.betas, fused=True)


def _load_partitioned(path: str | Path, dtype: torch.dtype, settings: dict[str, Any]) -> PreTrainedModel:
    """A model under ZeRO-3 of which this rank has read its own slices and nothing else.

    The memory of a whole tensor is reserved while its slice is copied, but its other pages are never touched. Only what
    is put together of several stored tensors, such as fused experts, is made whole first.
    """
    model, folder = open_model(path, dtype)
    for name in dist.share(list(folder.shapes)):
        folder.bits(name)  # a range does not show whether bits and values belong together
    partitioner = deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype)
    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for short, empty in list(module.named_parameters(recurse=False)):
            if id(empty) not in made:
                name = f"{module_name}.{short}" if module_name else short
                made[id(empty)] = _read_slice(partitioner, folder, name, empty)
            setattr(module, short, made[id(empty)])
    for module_name, module in model.named_modules():
        for short, buffer in list(module.named_buffers(recurse=False)):
            name = f"{module_name}.{short}" if module_name else short
            module._buffers[short] = (folder.get(name) if buffer.is_meta else buffer).to(dist.device())
    return model


def _read_slice(partitioner, folder, name: str, empty: nn.Parameter) -> nn.Parameter:
    whole = torch.empty(empty.shape, dtype=empty.dtype, device=dist.device())
    parameter = nn.Parameter(whole, requires_grad=empty.requires_grad)
    partitioner._convert_to_deepspeed_param(parameter)
    start, stop = part(parameter.ds_numel, dist.rank(), dist.world_size())
    read = folder.get_range(name, start, stop) if empty.is_meta else empty.detach().flatten()[start:stop]
    whole.view(-1)[start:stop] = read.to(whole)
    parameter.partition()
    return parameter


class FrozenBits:
    """The bits of a model's sparse weights as they were at the start, the same on all ranks. Collective.

    `digests`: module name -> sha256. Raises RuntimeError, on every rank, where ranks differ.
    """

    def __init__(self, model: nn.Module):
        self._linears, self.digests = sparse_linears(model), {}
        for name, linear in self._linears.items():
            with gathered(linear.bitmask):
                self.digests[name] = _digest(linear.bitmask)
        dist.require_agreement("the bits of sparse weights", self.digests)

    def settle(self) -> None:
        """To be called when the engine has partitioned the model: what this rank holds from now on shall not change."""
        self._own = self._digest_own()

    def check(self) -> None:
        """Collective. Raises RuntimeError, on every rank, with the tensor and the ranks that hold other bits by now."""
        now = self._digest_own()
        everyone = dist.gather_objects([name for name, digest in self._own.items() if now[name] != digest])
        for name in self._linears:
            ranks = [rank for rank, changed in enumerate(everyone) if name in changed]
            if ranks:
                raise RuntimeError(f"the bits of {name} have changed since the start on ranks {ranks}")

    def _digest_own(self) -> dict[str, str]:
        return {name: _digest(getattr(linear.bitmask, "ds_tensor", linear.bitmask))
                for name, linear in self._linears.items()}


def audit(path: Path, bits: dict[str, str]) -> None:
    """Raises RuntimeError where the sparse weights in the folder `path` are not those with the digests `bits`. That
    values are finite and as many as the bits is checked in reading."""
    folder = TensorFolder(path)
    if folder.shapes.keys() != bits.keys():
        raise RuntimeError(f"{path} holds {len(folder.shapes)} sparse weights, the model {len(bits)}")
    for name in folder.shapes:
        weight = folder.weight(name)
        if _digest(weight.bitmask) != bits[name]:
            raise RuntimeError(f"{path}: the bits of {name} are not those that were trained with")


def _digest(bitmask: torch.Tensor) -> str:
    return hashlib.sha256(bitmask.detach().cpu().numpy().tobytes()).hexdigest()


def gathered(parameter: torch.Tensor):
    """A context in which a parameter is whole, for reading. Collective where it is partitioned."""
    return deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id"))


def gathered_tensors(engine) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the engine's model, whole on the CPU, gathered one by one. Every rank must iterate."""
    for name, tensor in own_tensors(engine.module).items():
        with gathered(tensor):
            yield name, tensor.detach().cpu().clone()


def step_engine(engine) -> torch.Tensor | float | None:
    """One `engine.step()`; returns the norm of the whole gradient before clipping, None between boundaries."""
    norm = None
    if engine.is_gradient_accumulation_boundary() and not engine.zero_optimization():
        # DeepSpeed keeps no norm without ZeRO, and drops the gradients in step().
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return engine.get_global_grad_norm() if norm is None else norm
