"""Loads a model folder, sparse or dense, for generation."""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train.compat.transformers import to_device, untie
from sparse_train.config import EvaluateConfig
from sparse_train.config.base import Precision
from sparse_train.errors import UserError, first_line
from sparse_train.inference import cpu, gpu
from sparse_train.inference.decoding import Decoders
from sparse_train.models import Processor, fill, load_processor, open_model
from sparse_train.models.checkpoint import DTYPES
from sparse_train.sparse import PackedLinear, replace_module, save_from
from sparse_train.tasks import Example, generate, read
from sparse_train.tasks.batch import encode_prompt
from sparse_train.tasks.conversation import Message

_NEW_TOKENS = 128


@dataclass(frozen=True)
class Runtime:
    model: PreTrainedModel
    """`model.generate(...)` is Hugging Face's."""
    processor: Processor
    precision: str = "fp32"
    """Of the values of its sparse weights, without the head's."""
    kv_cache: Precision = "fp32"
    """Of the keys and values that `generate` keeps on the CPU. bf16 halves what a token reads of a long text, and
    rounds it. On a GPU they are BF16."""
    decoders: Decoders = field(default_factory=Decoders, init=False, repr=False, compare=False)

    @property
    def is_sparse(self) -> bool:
        """Whether it runs on kernels of this package."""
        return any(isinstance(module, PackedLinear) for module in self.model.modules())

    @property
    def sparsity(self) -> float:
        """Of all weights that have zeros; 0 where there are none."""
        weights = [module.weight for module in self.model.modules()
                   if isinstance(module, PackedLinear) and module.weight.density < 1]
        sizes = [weight.shape[0] * weight.shape[1] for weight in weights]
        kept = sum(weight.density * size for weight, size in zip(weights, sizes, strict=True))
        return 1 - kept / sum(sizes) if weights else 0.0

    def generate(self, examples: Sequence[Example], max_new_tokens: int, **options: Any) -> list[str]:
        """As sparse_train.tasks.generate, which has the `options`, and through a Decoder where there is one."""
        return generate(self.model, self.processor, examples, EvaluateConfig(max_new_tokens=max_new_tokens),
                        loop_for=functools.partial(self.decoders.loop_for, kv_cache=self.kv_cache), **options)

    def complete(self, prompt: str, max_new_tokens: int | None = None,
                 history: tuple[Message, ...] | None = None, **options: Any) -> str:
        """The continuation of `prompt`, or an encoder-decoder's answer to it; with a `history`, which may be empty, the
        assistant's answer to it as a user's turn behind these messages.

        `max_new_tokens` None: 128, or as many as the model has positions for. Raises UserError for more than that. The
        `options` are those of `generate`; without them the answer is greedy.
        """
        return self.complete_all([prompt], max_new_tokens, history, **options)[0]

    def complete_all(self, prompts: Sequence[str], max_new_tokens: int | None = None,
                     history: tuple[Message, ...] | None = None, **options: Any) -> list[str]:
        """As `complete`, for several prompts in one batch."""
        for prompt in prompts:
            if not prompt:
                raise UserError("the prompt is empty; give at least one character")
            if not read.is_unicode(prompt):
                raise UserError(f"the prompt {prompt!r} is not UTF-8; give it as UTF-8")
        if self.processor.features is not None:
            raise UserError("a speech model answers sound, not a prompt; use sparse_train.tasks.generate")
        examples = [Example(prompt, "", history=history) for prompt in prompts]
        try:
            if max_new_tokens is None:
                longest = len(self.processor.decoder_prefix) or max(len(encode_prompt(example, self.processor))
                                                                    for example in examples)
                max_new_tokens = max(1, min(_NEW_TOKENS, (self.processor.positions or sys.maxsize) - longest))
            return self.generate(examples, max_new_tokens, **options)
        except UserError as error:
            raise UserError(f"{self.model.name_or_path}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise UserError(f"{self.model.name_or_path}: the GPU's memory does not hold {len(prompts)} answers at a "
                            f"time ({first_line(error)}); give fewer or shorter ones") from error
        except OSError:  # of a streamer that writes
            raise
        except Exception as error:  # some facts of config.json, such as the width of a window, matter only here
            raise UserError(f"{self.model.name_or_path}: the model cannot run ({type(error).__name__}: "
                            f"{first_line(error)}); give a folder whose config.json is that of its tensors") from error


def load(folder: str | Path, shared: bool = True, device: Literal["cpu", "cuda"] = "cpu",
         batch_size: int = 1, kv_cache: Precision = "fp32") -> Runtime:
    """Sparse folders (fp32, bf16, int8, int4) run on the kernels of the device, dense ones on torch.

    On the CPU activations are fp32; on a GPU (cuda) the model computes in BF16, and fp32 values become BF16. `shared`:
    on the CPU large sparse weights lie in a file that all processes map (shared.py), else in memory of this process.
    `batch_size`: how many answers at a time a GPU's weights are laid out for; any other number is right as well.
    `kv_cache`: as in Runtime. Raises UserError for one that is neither, for a folder that is not a complete checkpoint,
    and where no GPU can run it.
    """
    if kv_cache not in DTYPES:
        raise UserError(f"kv_cache={kv_cache!r}: there is no such cache; give one of {', '.join(DTYPES)}")
    try:
        model, precision = _load(folder, shared, device, batch_size)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{folder}: the GPU's memory does not hold it ({first_line(error)}); give a smaller or sparser "
                        "model, or run it on the CPU") from error
    return Runtime(model.eval(), load_processor(folder), precision, kv_cache)


def _load(folder: str | Path, shared: bool, device: str, batch_size: int) -> tuple[PreTrainedModel, str]:
    """The model, and the precision of its sparse weights without the head's, or of all where it is dense."""
    on = torch.device("cpu") if device == "cpu" else gpu.find_gpu()
    model, tensors = open_model(folder, torch.float32 if device == "cpu" else torch.bfloat16, quantised=True)
    if tensors.shapes:
        put_packed(model, cpu.packed_modules(model, tensors, shared) if device == "cpu" else
                   gpu.packed_modules(tensors, on, batch_size), tensors.folder)
    fill(model, tensors)
    head = model.get_output_embeddings()
    precisions = [module.weight.precision for module in model.modules()
                  if isinstance(module, PackedLinear) and module is not head]
    return to_device(model, on), next(iter(precisions), "fp32" if device == "cpu" else "bf16")


def put_packed(model: PreTrainedModel, modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Replace `modules`, by their names in `model`, whose packed weights were read from `folder`."""
    for name, module in modules.items():
        replace_module(model, name, module)
    untie(model, {f"{name}.weight" for name in modules})
    save_from(model, folder)
