"""Triton's kernels compiled for GPUs that need not be there. As a program, `python -m tests.kernels.triton_cubins`: the
registers and memory of each, and how many instructions a thread spends on a position or, in a product, on a nonzero."""

import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch

TARGETS = (80, 90, 100)
PRODUCTS = {"bf16": (1, 2, 4, 16, 64), "int8": (1, 16), "int4": (1, 16), "2:4": (1,), "wide": (2,)}
"""{weight: how many rows of activations it is multiplied with}"""
_NUM_COLUMNS = 4096


class _Driver:
    """What launches ask of a GPU before they start anything."""

    def __init__(self, target: int):
        self._target = target

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._target, 32)

    def get_current_device(self):
        return self._target  # another number for each, so that no kernel is taken for another's

    def get_current_stream(self, device):
        return 0


def _launched(target: int) -> dict:
    """{call: [(kernel, positions or nonzeros of a program's step)]} of calls on a weight in CPU memory, which compile
    what they launch and do not start it."""
    from triton.runtime import JITFunction, driver

    from sparse_train.kernels import pack, triton_moves
    from sparse_train.kernels.triton_matrix import DeviceMatrix

    kernels, run = [], JITFunction.run

    def compile_only(*args, warmup, **kwargs):
        kernels.append(run(*args, warmup=True, **kwargs))

    driver.set_active(_Driver(target))
    JITFunction.run = compile_only
    found, bits = {}, torch.full((2, _NUM_COLUMNS // 8), 255, dtype=torch.uint8)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            dense = torch.zeros(2, _NUM_COLUMNS, dtype=dtype)
            for move, call in (("expand", partial(triton_moves.expand, dense.flatten(), bits, _NUM_COLUMNS)),
                               ("compact", partial(triton_moves.compact, dense, bits, dense.numel()))):
                kernels.clear()
                call()
                found[f"{move}-{dtype.itemsize}"] = [(kernel, 8 * triton_moves._MOST_BYTES) for kernel in kernels]
        for name, (keep, values, scale) in _weights().items():
            for num_rows in PRODUCTS[name]:
                matrix = DeviceMatrix(values[:int(keep.sum())], pack(keep), keep.shape[1], scale,
                                      1 if num_rows <= 4 else num_rows)
                kernels.clear()
                matrix.matmul(torch.zeros(num_rows, keep.shape[1], dtype=torch.bfloat16))
                found[f"product-{name}-{num_rows}"] = [
                    (kernel, 8 * 32 * kernel.metadata.num_warps if num_rows <= 4 else 64 * 64) for kernel in kernels]
        for name, steps in _steps().items():
            kernels.clear()
            steps.run()
            found[f"steps-{name}"] = [(kernel, 32 * kernel.metadata.num_warps) for kernel in kernels]
    finally:
        JITFunction.run = run
    return found


def _steps() -> dict:
    """Of a decoder, for one row: {attention of a model: with a norm and an activation}."""
    from sparse_train.kernels.triton_steps import GraphSteps

    found, position = {}, torch.zeros(1, dtype=torch.int64)
    for name, num_groups, activation in (("llama-8b", 8, "silu"), ("mpt-7b", 32, "gelu")):
        steps = found[name] = GraphSteps(position.device)
        hidden, values = (torch.zeros(shape, dtype=torch.bfloat16)
                          for shape in ((1, 32 * 128), (1, num_groups, 512, 128)))
        is_llama, kv = name == "llama-8b", hidden[:, :num_groups * 128]
        steps.normalise(hidden, hidden, hidden[0], None, 1e-5, hidden, is_llama)
        steps.attend(hidden, kv, kv, hidden, values, values, position, position, 0.1,
                     (values[0, 0], values[0, 0]) if is_llama else None, None if is_llama else torch.zeros(32, 512))
        steps.activate(activation, hidden, hidden if is_llama else None, hidden)
    return found


def _weights() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """{name: (keep, values, scale)}"""
    unstructured, wide = (torch.rand(64, num_columns, generator=torch.Generator().manual_seed(0)) < 0.5
                          for num_columns in (_NUM_COLUMNS, 14_336))
    two_of_four = (torch.arange(_NUM_COLUMNS) % 2 == 0).expand(64, -1)
    codes, scales = torch.zeros(64 * _NUM_COLUMNS, dtype=torch.int8), torch.ones(64, _NUM_COLUMNS // 128)
    return {"bf16": (unstructured, codes.bfloat16(), None), "int8": (unstructured, codes, scales[:, 0]),
            "int4": (unstructured, codes, scales.bfloat16()), "2:4": (two_of_four, codes.bfloat16(), None),
            "wide": (wide, torch.zeros(wide.numel(), dtype=torch.bfloat16), None)}


def _tool(name: str, *arguments: str) -> str:
    from triton.backends import nvidia

    return subprocess.run([Path(nvidia.__file__).parent / "bin" / name, *arguments], check=True, capture_output=True,
                          text=True, encoding="utf-8").stdout


def _instructions_of_loop(cubin: str) -> int:
    """Of the longest one, by the distance that its last jump goes back."""
    lines = re.findall(r"^(\.L_x_\d+):|^\s+/\*([0-9a-f]{4,})\*/\s+(.*);", _tool("nvdisasm", "-c", cubin), re.MULTILINE)
    place, labels, lengths = 0, {}, [0]
    for label, address, code in lines:
        if label:
            labels[label] = place
            continue
        place = int(address, 16) + 16
        jump = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", code)
        if jump and jump[1] in labels:
            lengths.append((place - labels[jump[1]]) // 16)
    return max(lengths)


def main() -> None:
    for target in TARGETS:
        for call, kernels in _launched(target).items():
            for kernel, step in kernels:
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(kernel.asm["cubin"])
                    file.flush()
                    used = re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", file.name))
                    instructions = _instructions_of_loop(file.name) * 32 * kernel.metadata.num_warps / step
                print(f"target={target} call={call} kernel={kernel.metadata.name} instructions={instructions:.1f}",
                      *(f"{name}={value}" for name, value in used), f"shared={kernel.metadata.shared}")


if __name__ == "__main__":
    main()
