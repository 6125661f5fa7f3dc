"""A GGUF file, which llama.cpp and what is built on it read: tensors as llama.cpp names and orders them, and the
tokenizer.

Codes of an int8 folder are those of Q8_0, and codes of an int4 folder those of Q4_0, with the scale of their row or
group as the scale of each block of 32, in fp16. All other weights are rounded by the gguf package. Embedding and head
have at least eight bits, and vectors are fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparse_train import kernels
from sparse_train.errors import UserError
from sparse_train.exporters.gguf_tokenizer import add_tokenizer
from sparse_train.exporters.source import Source
from sparse_train.models import own_tensors

if TYPE_CHECKING:  # an extra
    from gguf import GGMLQuantizationType, GGUFWriter

_BLOCK = 32
"""Columns that share a scale in Q4_0, Q4_1 and Q8_0."""
_TYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
_MAX_ALIBI_BIAS = 8.0  # that of transformers' MPT, whatever its config says


def write(source: Source, out: Path, type_: str | None) -> None:
    """`type_`: of the blocks' matrices. Raises UserError for a model that llama.cpp does not have, or computes
    otherwise, and for a tokenizer that it does not have."""
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, quant_shape_to_byte_shape

    config, type_ = source.model.config, type_ or _TYPES[source.precision]
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UserError(f"{source.folder}: {config.model_type} models are not written as GGUF; give one of "
                        f"{', '.join(ARCHITECTURES)}")
    activation = getattr(config, "hidden_act", architecture.activation)
    if activation != architecture.activation:
        raise UserError(f"{source.folder}: its activation is {activation}, and llama.cpp computes "
                        f"{architecture.activation} in {config.model_type} models; it is not written as GGUF")
    writer = GGUFWriter(out, architecture.name)
    writer.add_name(Path(source.folder).name)
    writer.add_file_type(LlamaFileType["ALL_F32" if type_ == "F32" else f"MOSTLY_{type_}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    architecture.add_sizes(writer, config)
    add_tokenizer(writer, source)
    tensors = list(_named(source, architecture, type_))
    frequencies = _frequency_factors(source, architecture)
    if frequencies is not None:
        writer.add_tensor_info("rope_freqs.weight", frequencies.shape, frequencies.dtype, frequencies.nbytes)
    for tensor in tensors:
        shape = quant_shape_to_byte_shape(tensor.shape, tensor.kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if frequencies is not None:
        writer.write_tensor_data(frequencies)
    for tensor in tensors:
        writer.write_tensor_data(tensor.read())
    writer.close()


@dataclass(frozen=True)
class _Tensor:
    source: Source
    ours: str
    name: str
    """llama.cpp's."""
    shape: tuple[int, ...]
    kind: "GGMLQuantizationType"
    rows: torch.Tensor | None
    """The order of its rows in the file."""

    def read(self) -> np.ndarray:
        """Its bytes in the file."""
        from gguf import quantize

        module = self.ours.removesuffix(".weight")
        if (codes := self._codes(module)) is not None:
            return _blocks(*codes, self.kind.name == "Q4_0")
        weight = self._ordered(self.source.tensors.get_dense(self.ours).float())
        return quantize(np.ascontiguousarray(weight.numpy()), self.kind)

    def _codes(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes (R, C) and scale of a weight that the folder has in the precision of `kind`."""
        tensors = self.source.tensors
        if module not in tensors.shapes or (scale := tensors.scale(module)) is None:
            return None
        if self.kind.name != ("Q8_0" if scale.ndim == 1 else "Q4_0"):
            return None
        return self._ordered(tensors.weight(module).to_dense()), self._ordered(scale)

    def _ordered(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.rows is None else tensor[self.rows]


def _named(source: Source, architecture: "Architecture", type_: str) -> list[_Tensor]:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    config, found = source.model.config, []
    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == architecture.name)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for ours, tensor in own_tensors(source.model).items():
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(f"{source.folder}: llama.cpp has no name for its tensor {ours}; it is not written as GGUF")
        is_block, is_vector = theirs.startswith("blk."), tensor.ndim == 1
        kind = "F32" if is_vector else type_ if is_block or not type_.startswith("Q") else "Q8_0"
        if kind.startswith("Q") and tensor.shape[1] % _BLOCK:
            raise UserError(f"{source.folder}: {ours} has {tensor.shape[1]} columns, and a block of GGUF has {_BLOCK}; "
                            "give --type F32, F16 or BF16")
        rows = architecture.rows(theirs.split(".")[-2], config)
        found.append(_Tensor(source, ours, theirs, tuple(tensor.shape), GGMLQuantizationType[kind], rows))
    return found


def _blocks(codes: torch.Tensor, scale: torch.Tensor, is_int4: bool) -> np.ndarray:
    """(R, bytes) uint8 of Q8_0 or Q4_0: per block the scale, fp16, then 32 codes, of int4 plus 8 and in 16 bytes, whose
    high halves are the second 16 codes."""
    num_rows, num_columns = codes.shape
    blocks = codes.view(num_rows, -1, _BLOCK)
    scale = (scale[:, None].expand(-1, blocks.shape[1]) if scale.ndim == 1
             else kernels.scale_of_columns(scale, num_columns)[:, ::_BLOCK])
    halves = (blocks + 8).to(torch.uint8).view(num_rows, -1, 2, _BLOCK // 2)
    stored = halves[:, :, 0] | halves[:, :, 1] << 4 if is_int4 else blocks.view(torch.uint8)
    steps = scale.half().contiguous()[:, :, None].view(torch.uint8)
    return torch.cat([steps, stored], 2).view(num_rows, -1).numpy()


def _frequency_factors(source: Source, architecture: "Architecture") -> np.ndarray | None:
    """What rotary frequencies are divided by, where they are scaled. Raises UserError where that is not all that is
    done."""
    config = source.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3") or architecture.name != "llama":
        raise UserError(f"{source.folder}: its rotary frequencies are scaled ({kind}), which is not written as GGUF "
                        f"for {config.model_type} models")
    scaled = source.model.get_buffer("model.rotary_emb.inv_freq").double()
    usual = rope["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.double) / len(scaled))
    return (usual / scaled).float().numpy()


def _add_llama(writer: "GGUFWriter", config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # llama.cpp attends to all tokens before, so a window bounds how long texts may be.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_mpt(writer: "GGUFWriter", config: Any) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.expansion_ratio * config.d_model)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_max_alibi_bias(_MAX_ALIBI_BIAS)
    if config.attn_config.clip_qkv:
        writer.add_clamp_kqv(config.attn_config.clip_qkv)


def _add_gpt_neox(writer: "GGUFWriter", config: Any) -> None:
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_dimension_count(int(config.hidden_size // config.num_attention_heads
                                        * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _same_rows(name: str, config: Any) -> torch.Tensor | None:
    return None


def _llama_rows(name: str, config: Any) -> torch.Tensor | None:
    """llama.cpp rotates neighbouring rows of a head, transformers the rows of its two halves."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
    if heads is None:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return torch.arange(heads * head_dim).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _gpt_neox_rows(name: str, config: Any) -> torch.Tensor | None:
    """llama.cpp has all queries, then keys, then values; transformers these three of each head."""
    if name != "attn_qkv":
        return None
    return torch.arange(3 * config.hidden_size).view(config.num_attention_heads, 3, -1).transpose(0, 1).reshape(-1)


@dataclass(frozen=True)
class Architecture:
    name: str
    """llama.cpp's."""
    add_sizes: Callable[["GGUFWriter", Any], None]
    rows: Callable[[str, Any], torch.Tensor | None] = _same_rows
    """The order of the rows of a tensor, by the last part of its name; None: as they are."""
    activation: str = "silu"


ARCHITECTURES = {
    "llama": Architecture("llama", _add_llama, _llama_rows),
    "mistral": Architecture("llama", _add_llama, _llama_rows),
    "qwen2": Architecture("qwen2", _add_llama),
    "qwen3": Architecture("qwen3", _add_llama),
    "olmo2": Architecture("olmo2", _add_llama),
    "mpt": Architecture("mpt", _add_mpt, activation="gelu"),
    "gpt_neox": Architecture("gptneox", _add_gpt_neox, _gpt_neox_rows, "gelu"),
}
"""By transformers' model_type."""
