"""Train LLMs to be sparse, and run the sparse models. The library knows tensors, ranks and files, not SLURM."""

import importlib.util
import os
import sys
from typing import Any

# DeepSpeed compiles small extensions on first use; two environments that share one cache break each other.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))


class _OnceImported:
    """A finder that has `then` imported behind `module`, as an entry point that transformers read would do. So whoever
    imports this package can open sparse folders by from_pretrained, and who needs no model does not wait for torch."""

    def __init__(self, module: str, then: str):
        self.module, self.then = module, then

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            importlib.import_module(self.then)

        spec.loader.exec_module = exec_module
        return spec


if "transformers.quantizers.auto" in sys.modules:
    importlib.import_module("sparse_train.quantizer")
else:
    sys.meta_path.insert(0, _OnceImported("transformers.quantizers.auto", "sparse_train.quantizer"))
