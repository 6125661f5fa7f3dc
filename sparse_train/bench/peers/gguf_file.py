"""A dense model folder as a GGUF file, of the same weights: Llama and MPT, as llama.cpp names and orders them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_train.errors import UserError
from sparse_train.extras import require
from sparse_train.models import load_processor, open_model, own_tensors

_BLOCK = 32
"""Columns that share a scale in Q4_0, Q4_1 and Q8_0."""


class NotWritten(UserError):
    """There is no GGUF file of this model here."""


def write_gguf(folder: str | Path, kind: str, file: Path) -> int:
    """Write `folder` to `file` and return the bytes of the weights that a token reads.

    `kind`: of the blocks' matrices, F32, Q4_0, Q4_1 or Q8_0, as the gguf package quantises; embedding and head have at
    least eight bits, vectors are fp32. Raises NotWritten.
    """
    require("gguf")
    from gguf import (
        GGML_QUANT_VERSION,
        MODEL_ARCH,
        GGMLQuantizationType,
        GGUFWriter,
        LlamaFileType,
        get_tensor_name_map,
        quantize,
    )

    model, tensors = open_model(folder)
    config, name = model.config, model.config.model_type
    if name not in WRITERS:
        raise NotWritten(f"{folder}: {name} models are not written as GGUF; give one of {', '.join(WRITERS)}")
    writer = GGUFWriter(file, name)
    heads = WRITERS[name](writer, config, str(folder))
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_tokenizer(writer, folder, config.vocab_size)
    names = get_tensor_name_map({"llama": MODEL_ARCH.LLAMA, "mpt": MODEL_ARCH.MPT}[name], config.num_hidden_layers)
    num_bytes = 0
    for ours in own_tensors(model):
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise NotWritten(f"{folder}: llama.cpp has no name for its tensor {ours}")
        weight = tensors.get(ours).float()
        if theirs.split(".")[-2] in heads:
            weight = weight[_rotary_order(len(weight), heads[theirs.split(".")[-2]])]
        if weight.ndim > 1 and weight.shape[1] % _BLOCK:
            raise NotWritten(f"{folder}: {ours} has {weight.shape[1]} columns, and a block of GGUF has {_BLOCK}; give "
                             f"a model whose widths are multiples of {_BLOCK}")
        dtype = GGMLQuantizationType[_kind(kind, theirs, weight.ndim)]
        stored = quantize(np.ascontiguousarray(weight.numpy()), dtype)
        writer.add_tensor(theirs, stored, raw_dtype=dtype)
        # One row of an embedding is read, all of one that is the head as well.
        num_bytes += stored.nbytes if theirs != "token_embd.weight" or config.tie_word_embeddings else 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return num_bytes


def _kind(kind: str, name: str, num_dimensions: int) -> str:
    if num_dimensions == 1:
        return "F32"
    return kind if name.startswith("blk.") or kind == "F32" else "Q8_0"


def _llama(writer: Any, config: Any, folder: str) -> dict[str, int]:
    """Writes the sizes; returns the number of heads of each tensor whose rows are in another order there."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise NotWritten(f"{folder}: its rotary frequencies are scaled ({rope['rope_type']}), which is not written as "
                         "GGUF")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}


def _mpt(writer: Any, config: Any, folder: str) -> dict[str, int]:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.expansion_ratio * config.d_model)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_max_alibi_bias(8.0)  # that of transformers' MPT, whatever its config says
    if config.attn_config.clip_qkv:
        writer.add_clamp_kqv(config.attn_config.clip_qkv)
    return {}


WRITERS: dict[str, Callable[[Any, Any, str], dict[str, int]]] = {"llama": _llama, "mpt": _mpt}
"""transformers' model_type, which is llama.cpp's name of the architecture too."""


def _rotary_order(num_rows: int, num_heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of a head, transformers the rows of its two halves."""
    return torch.arange(num_rows).view(num_heads, 2, -1).transpose(1, 2).reshape(-1)


def _add_tokenizer(writer: Any, folder: str | Path, vocab_size: int) -> None:
    """Prompts are given as ids; the engines only ask for a tokenizer of that size."""
    tokenizer = load_processor(folder).tokenizer
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges") or [("a", "b")]
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([names.get(token, f"<unused {token}>") for token in range(vocab_size)])
    writer.add_token_types([1] * vocab_size)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(tokenizer.eos_token_id)
