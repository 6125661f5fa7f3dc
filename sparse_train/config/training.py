"""`dense` and what `finetune` shares with it: steps, batches, AdamW, ZeRO, checkpoints (sparse_train/training)."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from sparse_train.config.base import Location, Positive, Precision, Section, Weight


class ZeroConfig(Section):
    stage: int = 3
    """DeepSpeed's ZeRO stage of the student: 0 replicates, 1 partitions the optimizer, 2 gradients, 3 parameters."""
    persistence_threshold: Annotated[int, Field(ge=0)] = 10_000
    """Stage 3 keeps parameters with fewer elements than this whole on every rank."""
    offload_optimizer: bool = False
    """Keep master values and moments in CPU memory and step there (stages 1 to 3)."""

    @field_validator("stage")
    @classmethod
    def _stage_exists(cls, stage: int) -> int:
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"there is no ZeRO stage {stage}; use 0, 1, 2 or 3")
        return stage

    @model_validator(mode="after")
    def _something_to_offload(self) -> Self:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs a ZeRO stage that partitions the optimizer; use 1, 2 or 3")
        return self


class TeacherConfig(Section):
    """The frozen teacher's own engine: ZeRO-3 without an optimizer."""

    precision: Precision | None = None
    """None: the student's."""
    offload: bool = False
    """Keep its parameters in CPU memory until a layer runs."""
    persistence_threshold: Annotated[int, Field(ge=0)] = 10_000
    """Parameters with fewer elements than this stay whole on every rank."""


class TrainConfig(Section):
    """What the dense and the sparse fine-tune share."""

    steps: Positive = 1000
    """Optimizer steps."""
    batch_size: Positive = 32
    """Examples (with task.pack: windows of them) per optimizer step over all ranks and micro-steps; the result does not
    depend on the number of ranks."""
    accumulation: Positive = 1
    """Micro-steps per optimizer step; must divide batch_size."""
    num_examples: Positive | None = None
    """Train on the first this many examples, repeated; None takes all there are."""
    learning_rate: Weight = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Linear warm-up to learning_rate, then linear decay to zero at the last step."""
    weight_decay: Weight = 0.0
    """AdamW's decoupled decay, on matrices and kept values; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: Weight = 1.0
    """Largest norm of the gradient over all parameters; 0 leaves it as it is."""
    precision: Precision = "fp32"
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the rest of it again in the backward pass."""
    sequence_parallel: Positive = 1
    """This many consecutive ranks share the tokens of an example; must divide the ranks and the attention heads."""
    zero: ZeroConfig = ZeroConfig()
    checkpoint_every: Positive = 100
    """Steps between checkpoints from which a stopped job goes on."""
    checkpoints_kept: Positive = 2
    """The newest this many stay on disk."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl."""

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} must divide batch_size={self.batch_size}")
        return self


class DenseConfig(TrainConfig):
    path: Location | None = None
    """A dense model (folder, hub name or GGUF file) that is already fine-tuned on the task: it becomes the teacher and
    nothing is trained."""
