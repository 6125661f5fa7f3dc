"""The schema of a run: one frozen, closed model per section, composed by RunConfig. What a key means stands under it.

Closed means that an unknown key is a mistake. `config_file.py` reads files into these sections.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


def _absolute(path: str) -> str:
    """A run is looked at, and goes on, from other folders than the one it was begun in."""
    found = os.path.expanduser(path)
    return os.path.abspath(found) if os.path.exists(found) else path


Location = Annotated[str, AfterValidator(_absolute)]
"""Of a file or folder, where there is one of that name, else on the hub."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class TaskConfig(Section):
    name: Literal["arithmetic", "gsm8k", "translation", "numbers", "speech", "dialtones", "text"] = "arithmetic"
    """arithmetic, numbers and dialtones are generated and need no data; the others read task.path. A run without a name
    takes the generated one that its model.family can do."""
    path: Location | None = None
    """A folder or file, or the name of a data set on the hub; what it must hold is in the task's module."""
    subset: str | None = None
    """Of a hub data set, such as de-en or hi."""
    train_split: str = "train"
    """What is trained on, as the data calls it: a hub split, a file's name without its ending, a value of an index's
    column `split`. Several are joined by +, such as train+validation."""
    test_split: str = "test"
    """What is evaluated on, likewise."""
    languages: tuple[str, str] = ("en", "de")
    """translation: from and to, as the data set calls them."""
    language: str | None = None
    """speech: for Whisper's multilingual tokenizers, such as hindi."""
    prompt: str | None = None
    """Template of the prompt in training and evaluation, such as "Question: {question}\\nAnswer:"; None: the task's."""
    answer: str | None = None
    """Template of the answer."""
    test_prompt: str | None = None
    """Template of the prompt in evaluation, where it differs."""
    shots: Annotated[int, Field(ge=0)] = 0
    """gsm8k: solved training examples in front of each test prompt, in its template."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Of data that comes without a split: the share whose text hashes into the test split."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """More unusable rows than this are an error; fewer are counted and named in the log."""
    max_length: Positive = 512
    """Longest example in tokens; longer training examples are left out, counted and some of them named in the log."""

    def split_name(self, split: str) -> str:
        """What the data calls "train" or "test"."""
        return self.train_split if split == "train" else self.test_split


class ModelConfig(Section):
    path: Location | None = None
    """A local folder or hub name to start from; None initialises a new model of the size below. With a path, the size
    only says what to expect where the hub cannot be reached (--dry-run)."""
    family: Literal["mpt", "t5", "t5-gated", "whisper", "llama", "mistral", "qwen3", "olmo2", "gpt_neox", "opt"] = "mpt"
    d_model: Positive = 128
    n_layers: Positive = 4
    """Of each stack, where there is an encoder and a decoder."""
    n_heads: Positive = 4
    n_kv_heads: Positive | None = None
    """Heads of keys and values, where a family shares them; None: as many as n_heads."""
    d_ff: Positive | None = None
    """Width of the FFN; None: 4 * d_model."""
    max_seq_len: Positive = 512
    vocab_size: Positive = 512
    """Upper bound on the vocabulary of the tokenizer trained on the task's own text (new models only)."""
    window_seconds: Annotated[float, Field(gt=0)] = 30.0
    """whisper: the length of sound that the encoder takes, a multiple of 0.02."""

    @property
    def ffn_width(self) -> int:
        return self.d_ff or 4 * self.d_model

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide d_model={self.d_model}")
        if self.family == "mpt" and self.ffn_width != 4 * self.d_model:
            raise ValueError(f"d_ff={self.d_ff}: the FFN of mpt is 4 * d_model = {4 * self.d_model} wide; leave it out")
        return self

    @model_validator(mode="after")
    def _heads_of_keys_exist(self):
        shared = ("llama", "mistral", "qwen3", "olmo2")
        if self.n_kv_heads not in (None, self.n_heads) and self.family not in shared:
            raise ValueError(f"n_kv_heads={self.n_kv_heads}: {self.family} has as many heads of keys as n_heads="
                             f"{self.n_heads}; leave it out, or take a family that shares them: {', '.join(shared)}")
        if self.n_heads % (self.n_kv_heads or self.n_heads):
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        return self

    @field_validator("window_seconds")
    @classmethod
    def _whole_states(cls, seconds: float) -> float:
        if abs(seconds * 50 - round(seconds * 50)) > 1e-6 or seconds < 0.02:
            raise ValueError(f"window_seconds={seconds}: a state of Whisper's encoder is 0.02 s, so give a multiple, "
                             f"such as {max(1, round(seconds * 50)) / 50:g}")
        return seconds


class ZeroConfig(Section):
    stage: int = 3
    """DeepSpeed's ZeRO stage of the student: 0 replicates, 1 partitions the optimizer, 2 gradients, 3 parameters."""
    persistence_threshold: Annotated[int, Field(ge=0)] = 10_000
    """Stage 3 keeps parameters with fewer elements than this whole on every rank."""
    offload_optimizer: bool = False
    """Keep master values and moments in the hosts' memory and step there (stages 1 to 3)."""

    @field_validator("stage")
    @classmethod
    def _stage_exists(cls, stage: int) -> int:
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"there is no ZeRO stage {stage}; use 0, 1, 2 or 3")
        return stage

    @model_validator(mode="after")
    def _something_to_offload(self):
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs a ZeRO stage that partitions the optimizer; use 1, 2 or 3")
        return self


class TeacherConfig(Section):
    """The frozen teacher's own engine: ZeRO-3 without an optimizer."""

    precision: Literal["fp32", "bf16"] | None = None
    """None: the student's."""
    offload: bool = False
    """Keep its parameters in the hosts' memory until a layer runs."""
    persistence_threshold: Annotated[int, Field(ge=0)] = 10_000
    """Parameters with fewer elements than this stay whole on every rank."""


class TrainConfig(Section):
    """What the dense and the sparse fine-tune share."""

    steps: Positive = 1000
    """Optimizer steps."""
    batch_size: Positive = 32
    """Examples per optimizer step over all ranks and micro-steps; the result does not depend on the number of ranks."""
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
    precision: Literal["fp32", "bf16"] = "fp32"
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
    def _micro_batches_divide(self):
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} must divide batch_size={self.batch_size}")
        return self


class DenseConfig(TrainConfig):
    path: Location | None = None
    """A dense model that is already fine-tuned on the task: it becomes the teacher and nothing is trained."""


class PruneConfig(Section):
    method: Literal["magnitude", "sparsegpt"] = "sparsegpt"
    sparsity: float | tuple[float, ...] | None = None
    """The fraction of each prunable weight that becomes zero, uniform over layers; an N:M pattern implies it. A list,
    ascending, is a chain: each level is pruned from the fine-tuned weights of the one before."""
    pattern: str = "unstructured"
    """unstructured, or N:M: N kept of every M along a row."""
    num_calibration: Positive = 128
    """Training examples whose activations make the Hessians (sparsegpt)."""
    calibration: TaskConfig | None = None
    """Whose training examples they are; None: the run's task. {name: text, path: ...} is general text."""
    batch_size: Positive = 16
    """Calibration examples per forward pass."""
    damping: Annotated[float, Field(gt=0)] = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    block_size: Positive = 128
    """Columns whose bits are chosen together (sparsegpt, unstructured)."""

    @property
    def levels(self) -> tuple["PruneConfig", ...]:
        """One config per sparsity, in the order of the chain."""
        several = self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)
        return tuple(self.model_copy(update={"sparsity": sparsity}) for sparsity in several)

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, None when unstructured."""
        if self.pattern == "unstructured":
            return None
        num_kept, size = self.pattern.split(":")
        return int(num_kept), int(size)

    @model_validator(mode="after")
    def _pattern_and_sparsity_agree(self):
        if self.pattern == "unstructured":
            if self.sparsity is None:
                raise ValueError("sparsity is missing; give a number in [0, 1)")
            levels = [level.sparsity for level in self.levels]
            for sparsity in levels:
                if not 0 <= sparsity < 1:
                    raise ValueError(f"sparsity={sparsity} is outside [0, 1); 0.75 removes three weights of four")
            if not levels or sorted(set(levels)) != levels:
                raise ValueError(f"sparsity={levels} is no chain; give levels that rise, such as [0.5, 0.75]")
            return self
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.pattern):
            raise ValueError(f"pattern={self.pattern!r} is neither unstructured nor N:M, such as 2:4")
        num_kept, size = self.group
        if num_kept > size:
            raise ValueError(f"pattern={self.pattern} keeps more than it has; N:M keeps N of every M")
        implied = 1 - num_kept / size
        if isinstance(self.sparsity, tuple):
            raise ValueError(f"pattern={self.pattern} has one sparsity, {implied:g}; a chain needs "
                             "pattern=unstructured")
        if self.sparsity is not None and abs(self.sparsity - implied) > 1e-9:
            raise ValueError(f"sparsity={self.sparsity} contradicts pattern={self.pattern}, which makes {implied:g}; "
                             "leave sparsity out (prune.sparsity=null)")
        object.__setattr__(self, "sparsity", implied)
        return self


_PRESETS: dict[str, dict[str, Any]] = {
    "paper-mpt": {"feature_weight": 1.0, "normalise": "micro_batch", "epsilon": 2.0**-7, "final_feature": "norm",
                  "logit_tokens": "labelled"},
    "paper-t5": {"feature_weight": 1.0, "normalise": "micro_batch", "epsilon": 1e-9, "epsilon_per": "position"},
    "paper-whisper": {"task_weight": 0.5, "feature_weight": 1.0, "normalise": "micro_batch", "epsilon": 1e-8,
                      "epsilon_per": "position", "layers": tuple(range(10)), "encoder_padding": True},
    "sparseml": {"feature_weight": 1.0, "normalise": "micro_batch"},
}


class LossConfig(Section):
    """total = task_weight * CE + logit_weight * KL(teacher || student) * T^2 + feature_weight * SquareHead."""

    preset: Literal["paper-mpt", "paper-t5", "paper-whisper", "sparseml"] | None = None
    """Start from the formulas of that code; keys given beside it win."""
    task_weight: Weight = 1.0
    logit_weight: Weight = 0.0
    feature_weight: Weight = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    normalise: Literal["global", "micro_batch"] = "global"
    """What a ratio is formed over: all ranks of the micro-step, or each rank's micro-batch with a mean over ranks."""
    epsilon: Weight = 0.0
    """Added to the teacher's mean square in SquareHead's denominator."""
    epsilon_per: Literal["token", "position"] = "token"
    """That mean is over real tokens, or over all positions, padding counted as zeros."""
    final_feature: Literal["block", "norm"] = "block"
    """The last feature: the last block's output, or the final norm's."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Blocks of each stack whose outputs are compared; None takes all."""
    encoder_padding: bool = False
    """Count an encoder's padding as tokens in SquareHead."""
    logit_tokens: Literal["predicted", "labelled"] = "predicted"
    """KL at the positions that predict a target, or at the targets' own positions (off by one in a decoder)."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given):
        chosen = given.get("preset") if isinstance(given, dict) else None
        return {**_PRESETS.get(chosen, {}), **given} if chosen else given

    @model_validator(mode="after")
    def _something_to_learn(self):
        if self.task_weight == self.logit_weight == self.feature_weight == 0:
            raise ValueError("all loss weights are 0; give task_weight, logit_weight or feature_weight")
        if self.layers == ():
            raise ValueError("layers is empty; name blocks, or leave it out for all of them")
        return self

    @property
    def needs_teacher(self) -> bool:
        return self.logit_weight > 0 or self.feature_weight > 0


class FinetuneConfig(TrainConfig):
    losses: dict[str, LossConfig] = {"squarehead": LossConfig(feature_weight=1.0)}
    """One fine-tune per entry, all with the same budget; the name is the folder's and the report's."""
    teacher: TeacherConfig = TeacherConfig()

    @field_validator("losses")
    @classmethod
    def _at_least_one(cls, losses):
        if not losses:
            raise ValueError("losses is empty; name at least one, such as squarehead: {feature_weight: 1}")
        for name in losses:
            if not re.fullmatch("[a-z0-9_][a-z0-9_-]{0,99}", name):
                raise ValueError(f"a loss is called {name!r}; take small letters, digits, _ and -, such as squarehead")
        taken = {"dense", "prune", "one-shot"} & set(losses)
        if taken:
            raise ValueError(f"a loss cannot be called {min(taken)}, which the report calls another model")
        return losses


class EvaluateConfig(Section):
    num_examples: Positive = 200
    """Test examples that are generated for and scored."""
    batch_size: Positive = 50
    max_new_tokens: Positive = 256
    num_beams: Positive = 1
    """1 is greedy."""


class CompressConfig(Section):
    loss: str | None = None
    """Which of finetune.losses is compressed, benchmarked and reported; None: the only one."""
    precisions: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "int8")
    """One sparse folder per precision; int8 has one scale per row."""


class BenchmarkConfig(Section):
    devices: tuple[Literal["cpu", "gpu"], ...] = ("cpu",)
    """One benchmark stage each; on a cluster each can have a place of its own."""
    repeats: Positive = 20
    new_tokens: Positive = 64
    """Tokens decoded per measurement of tokens/s."""
    reference_layers: Literal["mpt-7b", "none"] = "mpt-7b"
    """The linears of one block of this model are timed beside the run's own."""

    @field_validator("devices")
    @classmethod
    def _devices_differ(cls, devices):
        if not devices or len(set(devices)) < len(devices):
            raise ValueError(f"devices={list(devices)}: name cpu, gpu or both, each once")
        return devices


class WandbConfig(Section):
    project: str = "sparse-train"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrackingConfig(Section):
    wandb: WandbConfig | None = None
    """metrics.jsonl is always written; wandb when this is set, and training goes on if it fails."""


_GENERATED = {"t5": "numbers", "whisper": "dialtones"}  # task.name by family; arithmetic for all others


class RunConfig(Section):
    name: str = "run"
    about: str = ""
    """What the reader of the run's results should know; printed with them. It is true of this file's run: a file that
    extends this one does not have it, nor a run with overrides, but for name and folder."""
    folder: str = "runs"
    """The run's files go to folder/name."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    dense: DenseConfig = DenseConfig()
    prune: PruneConfig
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compress: CompressConfig = CompressConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    tracking: TrackingConfig = TrackingConfig()
    sweep: dict[str, tuple[Any, ...]] = {}
    """Dotted keys and the values that each takes. A run does every combination, in folders below the run's, and trains
    the dense model once for those that agree on it."""

    @model_validator(mode="before")
    @classmethod
    def _task_of_the_family(cls, given):
        model, task = (given.get(key, {}) for key in ("model", "task")) if isinstance(given, dict) else (None, None)
        if isinstance(model, dict) and isinstance(task, dict) and "name" not in task:
            family = str(model.get("family")).partition("-")[0]
            if family in _GENERATED:
                return {**given, "task": {**task, "name": _GENERATED[family]}}
        return given

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(f"name={name}: a run's name is letters, digits, . _ and -, at most 100, and begins with "
                             "neither . nor -, such as my-run")
        return name

    @model_validator(mode="after")
    def _one_loss_is_compressed(self):
        names, chosen = ", ".join(self.finetune.losses), self.compress.loss
        if chosen is None and len(self.finetune.losses) > 1:
            raise ValueError(f"compress.loss is missing: finetune.losses has {names}; give the one whose model is "
                             f"compressed, such as compress.loss={list(self.finetune.losses)[-1]}")
        if chosen is not None and chosen not in self.finetune.losses:
            raise ValueError(f"compress.loss={chosen} is none of finetune.losses: {names}; give the one whose model is "
                             f"compressed, such as compress.loss={list(self.finetune.losses)[-1]}")
        return self

    @property
    def compressed_loss(self) -> str:
        return self.compress.loss or next(iter(self.finetune.losses))

    @field_validator("sweep")
    @classmethod
    def _something_to_sweep(cls, sweep):
        for key, values in sweep.items():
            if not values:
                raise ValueError(f"{key} has no value; list at least one, such as [1, 2]")
            if key in ("name", "folder", "sweep"):
                raise ValueError(f"{key} is what tells combinations apart; sweep over another key")
        return sweep

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name
