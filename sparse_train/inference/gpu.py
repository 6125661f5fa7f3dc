"""Models on a GPU: in BF16, sparse weights as DeviceMatrix."""

import torch
from torch import nn

from sparse_train.errors import UserError
from sparse_train.extras import require
from sparse_train.models import ModelFolder
from sparse_train.sparse import on_gpu

_LEAST_CAPABILITY = (8, 0)


def find_gpu() -> torch.device:
    """The current one. Raises UserError where there is none, or none that the kernels are written for."""
    if torch.version.cuda is None:
        raise UserError(f"cuda: torch {torch.__version__} is built without CUDA; install a build with it, or run on "
                        "the CPU")
    if not torch.cuda.is_available():
        raise UserError("cuda: torch sees no GPU; give this process one, or run on the CPU")
    require("cuda")
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        raise UserError(f"cuda: {torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, "
                        "and the kernels need 8.0 (A100) or more; run on the CPU")
    return torch.device("cuda", torch.cuda.current_device())


def packed_modules(tensors: ModelFolder, device: torch.device, batch_size: int) -> dict[str, nn.Module]:
    """What computes with the weights of `tensors.shapes`, by the names of the modules that it replaces, laid out for
    steps of `batch_size` answers. FP32 values become BF16."""
    modules = {}
    for name in tensors.shapes:
        bias = tensors.get(f"{name}.bias").to(device, torch.bfloat16) if f"{name}.bias" in tensors else None
        modules[name] = on_gpu((tensors.weight(name), tensors.scale(name)), device, batch_size, bias)
    return modules
