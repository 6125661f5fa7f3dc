"""Models as folders: config.json, tokenizer, tensors; dense in Hugging Face's layout, sparse in ours.

A folder from outside is read through transformers (hub names included); nothing of it is unpickled or executed.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)

from sparse_train.errors import UserError
from sparse_train.sparse import BitmaskTensor, TensorFolder, sparse_linears, sparsify, write_tensors


def from_config(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `config` with the head that predicts text."""
    return _auto_class(config).from_config(config, dtype=dtype)


def _auto_class(config: PretrainedConfig):
    if config.model_type == "whisper":
        return AutoModelForSpeechSeq2Seq
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def read_config(path: str | Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read a model config from {path}: {first_line(error)}; "
                        "give a folder with config.json or a hub name") from error


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A dense model from a folder or hub name, or one with SparseLinears from a sparse folder.

    Raises UserError where weights are missing, which would be random, silently, or left over.
    """
    config = read_config(path)
    if Path(path).is_dir():
        folder = TensorFolder(Path(path))
        if folder.shapes:
            return _load_sparse(folder, config, dtype)
    try:
        model, report = _auto_class(config).from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a model from {path}: {first_line(error)}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise UserError(f"{path} lacks {len(wrong)} tensors of a {config.model_type} model, such as {wrong[0]}; "
                        "the checkpoint is not complete")
    if report["unexpected_keys"]:
        odd = sorted(report["unexpected_keys"])
        raise UserError(f"{path} holds {len(odd)} tensors that a {config.model_type} model does not have, such as "
                        f"{odd[0]}; its config.json belongs to another model")
    return model


def _load_sparse(folder: TensorFolder, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model = _skeleton(folder, config, dtype)
    sparsify(model, {name: folder.weight(name) for name in folder.shapes})
    model.load_state_dict({name: folder.get(name) for name in folder.names}, strict=False, assign=True)
    model.tie_weights()
    return model.to(dtype)


def open_model(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, TensorFolder]:
    """A model without data (meta device), dense or with SparseLinears, and the folder to read its tensors from.

    For who loads tensors in parts. A hub name is downloaded first. Raises UserError where the folder lacks a tensor of
    the model or holds one too many.
    """
    if not Path(path).is_dir():
        try:
            path = snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"])
        except (OSError, ValueError) as error:
            raise UserError(f"cannot download {path}: {first_line(error)}; give a folder or a hub name") from error
    folder = TensorFolder(Path(path))
    return _skeleton(folder, read_config(path), dtype), folder


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Parameters without data (meta device); buffers that are computed, such as rotary frequencies, with."""
    with torch.device("meta"):
        model = from_config(config, dtype)
    persistent = model.state_dict().keys()
    for prefix, module in model.named_modules():
        own = [name for name, buffer in module.named_buffers(recurse=False)
               if buffer.is_meta and f"{prefix}.{name}" not in persistent]
        for name in own:
            module.register_buffer(name, torch.empty_like(getattr(module, name), device="cpu"), persistent=False)
        if own:
            # transformers' own way to fill what no checkpoint holds, used by from_pretrained.
            model._init_weights(module)
    return model


def _skeleton(folder: TensorFolder, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model = empty_model(config, dtype)
    for name, shape in folder.shapes.items():
        (num_values,), stored = folder.spec(f"{name}.values")
        if stored == "I8":
            raise UserError(f"{folder.folder}: {name} is quantised; it runs (sparse-train generate) but does not "
                            "train, so give the fp32 or bf16 folder here")
        bitmask = torch.empty(folder.spec(f"{name}.bitmask")[0], dtype=torch.uint8, device="meta")
        sparsify(model, {name: BitmaskTensor(torch.empty(num_values, dtype=dtype, device="meta"), bitmask, shape)})
    model.tie_weights()
    needed = own_tensors(model)
    stored = [*folder.names, *(f"{name}.{part}" for name in folder.shapes for part in ("values", "bitmask"))]
    # A tied tensor may be stored under its other name as well.
    wrong = [name for name in needed if name not in stored] + sorted(set(stored) - set(model.state_dict()))
    if wrong:
        raise UserError(f"{folder.folder}: {wrong[0]} is missing from the checkpoint or not part of its model")
    return model


def save_model(folder: Path, model: PreTrainedModel, processor,
               tensors: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
    """Write config, processor and tensors of `model`; a model with SparseLinears is stored compressed.

    `processor` is a Processor or a tokenizer. `tensors` (name, tensor) replaces the model's own, for models whose
    parameters are partitioned over ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in sparse_linears(model).items()}
    write_tensors(folder, own_tensors(model).items() if tensors is None else tensors, shapes)


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that make up a checkpoint: parameters and persistent buffers, tied ones once."""
    persistent = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in persistent}


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
