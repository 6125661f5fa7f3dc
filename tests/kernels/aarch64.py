"""The kernels for aarch64 by Debian's cross compiler. As a program, `python -m tests.kernels.aarch64`: how many
instructions a product with one vector takes for 64 positions of a weight."""

import re
import subprocess
import tempfile
from pathlib import Path

from sparse_train import kernels

CSRC = Path(kernels.__file__).parent / "csrc"
COMPILER = "aarch64-linux-gnu-g++"
_ROWS = 4  # that a loop's round multiplies, a word of each; of int4 two words
_WORDS = {"Fp32": 1, "Bf16": 1, "Int8": 1, "Int4": 2}


def compile_object(source: Path, folder: Path) -> Path:
    """With the flags that CMakeLists.txt gives it on aarch64; its object file in `folder`, where headers are found."""
    flags = " ".join(re.findall(r"^// flags for aarch64: (.*)", source.read_text(), re.MULTILINE)).split()
    target = folder / f"{source.stem}.o"
    subprocess.run([COMPILER, "-std=c++17", "-O3", "-fopenmp", "-Wall", "-Werror", "-Wno-unknown-pragmas",
                    f"-I{folder}", f"-I{CSRC}", *flags, "-c", source, "-o", target], check=True)
    return target


def _loops(path: Path) -> dict[str, int]:
    """Instructions of the shortest loop that fetches values ahead, by precision: that of one vector."""
    listing = subprocess.run(["aarch64-linux-gnu-objdump", "-dC", "--no-show-raw-insn", path], check=True, text=True,
                             capture_output=True).stdout
    shortest: dict[str, int] = {}
    for function in re.split(r"\n\n(?=[0-9a-f]+ <)", listing):
        precision = re.search(r"<.*?(?:matvec|dot).*?<.*?\b(Fp32|Bf16|Int8|Int4)", function.partition("\n")[0])
        lines = re.findall(r"^ +([0-9a-f]+):\t(\S+)(.*)", function, re.MULTILINE)
        code = [(int(address, 16), name, operands) for address, name, operands in lines]
        for end, name, operands in code if precision else ():
            target = re.search(r"\b([0-9a-f]+) <", operands) if re.match(r"b(\..*)?$|cb|tb[nz]", name) else None
            names = [name for place, name, _ in code if target and int(target[1], 16) <= place <= end]
            if "prfm" in names and precision:
                shortest[precision[1]] = min(len(names), shortest.get(precision[1], len(names)))
    return shortest


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for tier in ("neon", "neon_dotprod"):
            loops = _loops(compile_object(CSRC / f"{tier}.cpp", Path(name)))
            counts = (f"{each.lower()} {loops[each] / _ROWS / words:.0f}" for each, words in _WORDS.items())
            print(f"{tier:14}", *counts)
