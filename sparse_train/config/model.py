"""`model`: what the dense model starts from (sparse_train/models)."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from sparse_train.config.base import Location, Positive, Section
from sparse_train.registry import FAMILIES


class ModelConfig(Section):
    path: Location | None = None
    """A local folder, GGUF file or hub name to start from; None initialises a new model of the size below. With a path,
    the size only says what to expect where the hub cannot be reached (--dry-run)."""
    family: str = "mpt"
    """An architecture of sparse_train/registry.py, such as mpt, t5, whisper or llama."""
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
    """whisper: the length of audio that the encoder takes, a multiple of 0.02."""

    @property
    def ffn_width(self) -> int:
        return self.d_ff or 4 * self.d_model

    @field_validator("family")
    @classmethod
    def _family_is_registered(cls, family: str) -> str:
        return FAMILIES.check(family)

    @model_validator(mode="after")
    def _widths_fit_the_family(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide d_model={self.d_model}")
        if not FAMILIES.entries[self.family].has_ffn_width and self.ffn_width != 4 * self.d_model:
            raise ValueError(f"d_ff={self.d_ff}: the FFN of {self.family} is 4 * d_model = {4 * self.d_model} wide; "
                             "leave it out")
        return self

    @model_validator(mode="after")
    def _kv_heads_fit_the_family(self) -> Self:
        if self.n_kv_heads not in (None, self.n_heads) and not FAMILIES.entries[self.family].has_kv_heads:
            others = ", ".join(name for name, entry in FAMILIES.entries.items() if entry.has_kv_heads)
            raise ValueError(f"n_kv_heads={self.n_kv_heads}: {self.family} has as many heads of keys as n_heads="
                             f"{self.n_heads}; leave it out, or take a family that shares them: {others}")
        if self.n_heads % (self.n_kv_heads or self.n_heads):
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        return self

    @model_validator(mode="after")
    def _window_is_whole_states(self) -> Self:
        step = FAMILIES.entries[self.family].audio_step_s
        if step is None:
            return self
        num_states = round(self.window_seconds / step)
        if num_states < 1 or abs(self.window_seconds / step - num_states) > 1e-6:
            raise ValueError(f"window_seconds={self.window_seconds}: a state of {self.family}'s encoder is {step:g} s, "
                             f"so give a multiple, such as {max(1, num_states) * step:g}")
        return self
