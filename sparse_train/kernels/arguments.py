"""Checks of arguments: native code sees addresses and sizes alone, and reads what it is given."""

import sys

import torch

CPU = torch.device("cpu")


def describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{value!r}, a {type(value).__name__}"
    layout = "" if value.layout == torch.strided else f" ({value.layout})"
    return f"{value.dtype} {tuple(value.shape)} on {value.device}{layout}"


def check_tensor(name: str, tensor: torch.Tensor, *shape: int | None, device: torch.device | None = None,
                 dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    """`shape`: None for a dimension of any size. Any device or dtype where none is given. Raises ValueError."""
    if (isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.ndim == len(shape)
            and all(expected in (None, size) for expected, size in zip(shape, tensor.shape, strict=True))
            and (device is None or tensor.device == device) and (dtypes is None or tensor.dtype in dtypes)):
        return
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    kinds = "" if dtypes is None else "".join(f" {str(dtype).removeprefix('torch.')}" for dtype in dtypes)
    raise ValueError(f"{name} is {describe(tensor)}; it must be a tensor of shape ({sizes})"
                     + (f" on {device}" if device else "") + (f", one of:{kinds}" if kinds else ""))


def check_bits(bitmask: torch.Tensor, num_columns: int, num_rows: int | None = None,
               device: torch.device | None = CPU) -> None:
    """The bits of a weight (num_rows, num_columns), of any number of rows where it is None. Raises ValueError."""
    check_count("num_columns", num_columns, 0)
    check_tensor("the bitmask", bitmask, num_rows, 8 * -(-num_columns // 64), device=device, dtypes=(torch.uint8,))


def check_count(name: str, value: int, least: int, most: int = sys.maxsize) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} to {most}")


def consecutive(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, one after the other in memory."""
    return tensor.resolve_neg().contiguous()


def check_target(out: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """`out`, or a new tensor where it is None, of this shape and of dtype and device of `like`. Raises ValueError."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    check_tensor("out", out, *shape, device=like.device, dtypes=(like.dtype,))
    if not out.is_contiguous() or out.is_neg():
        raise ValueError(f"out is {describe(out)}, but not contiguous; results are written to consecutive memory")
    return out
