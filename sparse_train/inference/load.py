"""A model folder, sparse or dense, as something that generates."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparse_train.errors import UserError
from sparse_train.inference.packed_linear import PackedLinear
from sparse_train.kernels import PackedMatrix
from sparse_train.models import load_model, load_tokenizer, read_config
from sparse_train.sparse import TensorFolder, replace_module


@dataclass(frozen=True)
class Runtime:
    model: PreTrainedModel
    """`model.generate(...)` is Hugging Face's."""
    tokenizer: PreTrainedTokenizerBase

    def complete(self, prompt: str, max_new_tokens: int) -> str:
        """The greedy continuation of `prompt`, without it."""
        inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        if not inputs["input_ids"].numel():
            raise UserError("the prompt is empty; give at least one character")
        made = self.model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                                   do_sample=False, max_new_tokens=max_new_tokens, use_cache=True,
                                   eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id)
        return self.tokenizer.decode(made[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def load(folder: str | Path) -> Runtime:
    """Sparse folders (fp32, bf16 computed in fp32, int8) run on the native kernels; dense ones on torch.

    Raises UserError for a folder that is no complete checkpoint.
    """
    tensors = TensorFolder(Path(folder)) if Path(folder).is_dir() else None
    model = _packed_model(tensors) if tensors and tensors.shapes else load_model(folder)
    return Runtime(model.eval(), load_tokenizer(folder))


def _packed_model(tensors: TensorFolder) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(tensors.folder), dtype=torch.float32)
    for name, shape in tensors.shapes.items():
        weight = tensors.weight(name)
        bias = tensors.get(f"{name}.bias").float() if f"{name}.bias" in tensors else None
        replace_module(model, name, PackedLinear(
            PackedMatrix(weight.values, weight.bitmask, shape[1], tensors.scale(name)), bias))
    rest = {name: tensors.get(name).float() for name in tensors.names}
    model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UserError(f"{tensors.folder}: {missing[0]} is missing; the checkpoint is not complete")
    return model
