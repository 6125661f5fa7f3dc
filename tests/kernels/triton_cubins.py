"""Triton's kernels compiled for GPUs that need not be there. As a program, `python -m tests.kernels.triton_cubins`: the
registers and memory of each, and how many instructions a thread spends on a position."""

import re
import subprocess
import tempfile
from pathlib import Path

TARGETS = (80, 90, 100)
_WARPS = {"count": 1, "expand": 4, "compact": 4}


def _compile(kernel: str, num_bytes: int, target: int) -> bytes:
    """As _move launches it for a weight whose addresses and columns are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparse_train.kernels import triton_moves as moves

    function = moves._count_parts if kernel == "count" else moves._move_parts
    constants = {"TILE_BYTES": moves._MOST_BYTES} | ({} if kernel == "count" else {
        "EXPANDS": kernel == "expand", "COUNTS": moves._COUNTS})
    types = {"bits": "*u8", "counts": "*i32", "dense": f"*i{8 * num_bytes}", "values": f"*i{8 * num_bytes}"}
    aligned = {*types, "num_columns", "row_bytes"}
    names = function.arg_names
    source = ASTSource(
        function, {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in aligned})
    return triton.compile(source, GPUTarget("cuda", target, 32), {
        "num_warps": _WARPS[kernel], "debug": kernel != "count", **moves.OPTIONS}).asm["cubin"]


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
        for kernel, sizes in (("expand", (2, 4)), ("compact", (2, 4)), ("count", (0,))):
            for num_bytes in sizes:
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(_compile(kernel, num_bytes, target))
                    file.flush()
                    used = re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", _tool("cuobjdump", "-res-usage", file.name))
                    per_position = _instructions_of_loop(file.name) * 32 * _WARPS[kernel] / (8 * 256)
                print(f"target={target} kernel={kernel} bytes={num_bytes} instructions={per_position:.1f}",
                      *(f"{name}={value}" for name, value in used))


if __name__ == "__main__":
    main()
