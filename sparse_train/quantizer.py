"""Sparse folders in transformers' from_pretrained, as quantised checkpoints: a model with the kernels of this package.

    __init__.py of the package   has this module imported as soon as transformers knows quantizers
    SparseConfig                 quantization_config of config.json
    SparseQuantizer              what from_pretrained calls while it makes and fills a model

transformers finds the dense tensors in the files and places them; it sees nothing of the sparse ones, whose modules are
put in at the end. The rest of the package is imported only when a model is loaded, because transformers is only half
imported when it imports this.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_train.errors import UserError
from sparse_train.sparse.header import METHOD, SPARSE, VERSION

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_FILES = (f"{SPARSE}.safetensors", f"{SPARSE}.safetensors.index.json")


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """`quantization_config` of a sparse folder; docs/format.md describes its keys. Raises UserError for a newer one."""

    def __init__(self, version: int = VERSION, weights: str = _FILES[0], precision: str = "fp32",
                 modules_to_not_convert: Sequence[str] = (), **_: Any):
        if version != VERSION or weights not in _FILES:
            raise UserError(f"config.json has a sparse checkpoint of version {version!r} in {weights!r}, this release "
                            f"reads version {VERSION} in {' or '.join(_FILES)}; update sparse-train")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' own are an enumeration
        self.version, self.weights, self.precision = version, weights, precision
        self.modules_to_not_convert = list(modules_to_not_convert)


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Loads a sparse folder: on the CPU with FP32 activations, on a GPU in BF16, whatever `dtype` says."""

    quantization_config: SparseConfig
    requires_calibration = True  # of a dense model there is nothing to do
    is_trainable = False
    _device = torch.device("cpu")
    _is_gpu = False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True  # by sparse/save.py

    def update_device_map(self, device_map: dict[str, Any] | str | None) -> dict[str, Any] | None:
        """One device. Raises UserError for several, and for a GPU that cannot run the kernels."""
        from sparse_train.inference import gpu

        if device_map is None:
            return None
        if isinstance(device_map, str):  # auto, balanced, ...
            device_map = {"": "cuda" if torch.cuda.is_available() else "cpu"}
        place, *others = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values()}
        if others or place.partition(":")[0] not in ("cpu", "cuda"):
            raise UserError(f"device_map={device_map}: a sparse model lies on one device, cpu or a GPU; give its name")
        self._device, self._is_gpu = torch.device(place), place.startswith("cuda")
        if self._is_gpu:
            found = gpu.find_gpu()
            if self._device.index is None or found.type != "cuda":  # in tests, Triton's interpreter
                self._device = found
        return {"": self._device}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self._is_gpu else torch.float32

    def update_attn_implementation(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """Called before the files are looked for."""
        from sparse_train.compat.transformers import name_weights

        name_weights(config, self.quantization_config.weights)
        return config

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", checkpoint_files: Iterable[str] = (),
                                             **_: Any) -> None:
        self._folder = Path(next(iter(checkpoint_files))).parent

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """Take the modules out that are packed; and convert nothing, since a sparse folder has the model's own names.

        This is called between making the model, inside of which no other can be made, and filling it. Raises UserError
        for a folder that is not complete or another model.
        """
        from sparse_train.compat.transformers import ignore_unexpected, untie
        from sparse_train.inference import PackedLinear, cpu
        from sparse_train.models import open_model
        from sparse_train.sparse import replace_module

        own, tensors = open_model(self._folder, quantised=True)
        if not isinstance(model, type(own)):
            raise UserError(f"{self._folder} is a {type(own).__name__}, not a {type(model).__name__}; load it by the "
                            "Auto class of the former, such as AutoModelForCausalLM")
        names = list(tensors.shapes) if self._is_gpu else cpu.packed_names(own, tensors)
        for name in names:  # initialisation asks some for weight and bias, and changes nothing of one on meta
            module: Any = model.get_submodule(name)
            replace_module(model, name, PackedLinear(module.weight.detach(), getattr(module, "bias", None)))
        model.all_tied_weights_keys = own.all_tied_weights_keys
        untie(model, {f"{name}.weight" for name in names})
        ignore_unexpected(model, names)
        self._opened = own, tensors
        return []

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        from sparse_train.inference import cpu, gpu
        from sparse_train.inference.load import put_packed

        own, tensors = self._opened
        del self._opened
        put_packed(model, gpu.packed_modules(tensors, self._device, batch_size=1) if self._is_gpu else
                   cpu.packed_modules(own, tensors, shared=True), tensors.folder)
        return model.eval()
