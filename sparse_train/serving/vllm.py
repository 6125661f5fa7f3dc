"""The plug-in of vLLM (entry point `vllm.general_plugins`): `vllm serve FOLDER` for sparse folders.

vLLM finds the quantization method by `quantization_config` in config.json. Each of its processes calls `register`, so
this imports little.
"""

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

_REORDERED = ("bloom", "falcon")
_HEADS = ("lm_head", "proj_out", "embed_out")


class SparseTrainConfig(QuantizationConfig):
    """`quantization_config` of a sparse folder."""

    def __init__(self, precision: str, dense: list[str]):
        """`precision`: of the sparse weights. `dense`: names of the linears that have a dense weight."""
        super().__init__()
        self.precision, self.dense, self.folder = precision, dense, ""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SparseTrainConfig":
        from sparse_train.sparse.header import PRECISIONS, VERSION

        version, precision, dense = (config.get(key) for key in ("version", "precision", "modules_to_not_convert"))
        if version != VERSION:
            raise RuntimeError(f"config.json: quantization_config has version {version!r} of the sparse format, this "
                               f"release of sparse-train reads {VERSION}; update sparse-train")
        if precision not in PRECISIONS.values() or not isinstance(dense, list):
            raise RuntimeError("config.json: quantization_config lacks a precision or modules_to_not_convert; fetch "
                               "or write the folder again")
        return cls(str(precision), dense)

    def get_name(self) -> str:
        return "sparse-train"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM calls this once, before it starts the processes that load the model: the place to find a damaged folder,
        while one line is still the end of it. Raises RuntimeError; pydantic would wrap a ValueError."""
        from sparse_train.errors import UserError
        from sparse_train.sparse import TensorFolder

        self.folder = model_name
        if hf_config is None:
            return
        if hf_config.model_type in _REORDERED:
            raise RuntimeError(f"{model_name}: vLLM reorders the rows of a {hf_config.model_type} model as it reads "
                               "them, which it cannot do with sparse weights; serve the dense export")
        is_dense = any(name.rpartition(".")[2] in _HEADS for name in self.dense)
        if getattr(hf_config, "tie_word_embeddings", False) and not is_dense:
            # The head has codes of its own; the embedding keeps its floats.
            hf_config.tie_word_embeddings = hf_config.get_text_config().tie_word_embeddings = False
        if Path(model_name).is_dir():
            try:
                tensors = TensorFolder(Path(model_name))
                for name in tensors.shapes:
                    if ".experts." in name:
                        raise UserError(f"{model_name}: {name} is sparse, and vLLM multiplies experts by kernels of "
                                        "its own; serve the dense export")
                    tensors.bits(name)
            except UserError as error:
                raise RuntimeError(str(error)) from None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.dense = hf_to_vllm_mapper.apply_list(self.dense)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from sparse_train.serving.vllm_linear import SparseLinearMethod

        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        # Where vLLM multiplies several linears in one: its name, which may begin with a parent's, and theirs.
        fused = {key: parts for key, parts in self.packed_modules_mapping.items() if f".{prefix}".endswith(f".{key}")}
        names = [prefix.removesuffix(key) + part for key, parts in fused.items() for part in parts] or [prefix]
        if not all(name in self.dense for name in names):
            return SparseLinearMethod(self)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register() -> None:
    register_quantization_config("sparse-train")(SparseTrainConfig)
