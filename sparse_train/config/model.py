"""`model`: what the dense model starts from (sparse_train/models)."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sparse_train.config.base import Location, Positive, Section


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
