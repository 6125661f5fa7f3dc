"""The kernels for aarch64 against float64, built by a cross compiler and run in an emulator of that CPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sparse_train import kernels
from sparse_train.kernels import reference
from tests.kernels.aarch64 import COMPILER, CSRC, compile_object
from tests.kernels.test_properties import PRECISIONS, Chance, product, random_keep
from tests.training.plain import assert_as_exact

_EMULATOR = "qemu-aarch64"
_MISSING = [name for name in (COMPILER, _EMULATOR) if shutil.which(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(_MISSING), reason=f"needs {' and '.join(_MISSING)} (Debian: "
                                                   "g++-aarch64-linux-gnu, qemu-user)")]

# The CPUs, and the tiers that each supports: the first came before dot products of bytes.
_CPUS = {"cortex-a72": ["neon", "portable"], "max": ["neon_dotprod", "neon", "portable"]}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aarch64")
    for header in re.findall(r"#include <(nanobind/.*)>", (CSRC / "module.cpp").read_text()):
        (folder / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / header).touch()  # aarch64.cpp has what is needed of them
    sources = [source for source in sorted(CSRC.glob("*.cpp")) if source.name != "module.cpp"]
    objects = [compile_object(source, folder) for source in (Path(__file__).with_name("aarch64.cpp"), *sources)]
    subprocess.run([COMPILER, "-static", "-fopenmp", *objects, "-o", folder / "program"], check=True)
    return folder / "program"


@pytest.fixture(params=_CPUS)
def run(request, program, tmp_path):
    """run(kind, sizes, tensors, results): what each tier of a CPU writes, tensors like `results`."""
    def run(kind, sizes, tensors, results):
        case = tmp_path / "case"
        case.write_bytes(b"".join(_bytes(tensor) for tensor in [torch.tensor(sizes), *tensors]))
        with case.open("rb") as file:
            output = subprocess.run([_EMULATOR, "-cpu", request.param, program, kind], stdin=file, check=True,
                                    capture_output=True).stdout
        names, _, written = output.partition(b"\n")
        assert names.decode().split() == _CPUS[request.param]
        for name in names.decode().split():
            found = []
            for like in results:
                size = like.numel() * like.itemsize
                found.append(torch.frombuffer(bytearray(written[:size] or b"\0" * 8), dtype=like.dtype)[:like.numel()]
                             .view(like.shape))
                written = written[size:]
            yield name, found
        assert not written
    return run


def _bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(("seed", "num_columns"), [*((seed, None) for seed in range(12)), (12, 65_600)])
def test_weights(run, precision, seed, num_columns):
    chance = Chance(seed)
    keep = random_keep(chance, num_columns)
    given, factor = precision.make(keep, chance)
    values, scale, bits = given["values"], given.get("scale", torch.ones(0)), kernels.pack(keep)
    count, (num_rows, num_columns) = chance.randrange(10), keep.shape
    x = torch.randn(count, num_columns, generator=chance.generator)
    dense = reference.expand(values, bits, num_columns)
    exact, bound = product(x, dense.double() * factor.double(), keep, precision.rounds_x)
    operand, step = reference.quantise(x) if precision.rounds_x and x.numel() else (x, torch.ones(1))
    of_rows = factor.T if scale.ndim == 1 else torch.ones(1)
    y = torch.empty(count, num_rows)
    sizes = [num_rows, num_columns, values.numel(), values.itemsize, count, chance.choice([1, 2, 5]),
             scale.numel() * scale.itemsize, int(scale.ndim == 2)]  # a scale per group: int4
    for name, (expanded, compacted, unpacked, vectors, rows) in run(
            "weight", sizes, [bits, values, scale, x, operand], [dense, values, dense, y, y]):
        assert torch.equal(expanded, dense) and torch.equal(unpacked, dense) and torch.equal(compacted, values), name
        assert ((vectors - exact).abs() <= bound).all(), name
        assert ((rows * step * of_rows - exact).abs() <= bound).all(), name


def test_steps(run):
    generator = torch.Generator().manual_seed(0)
    heads, groups, dim, capacity, width = 6, 2, 20, 150, 1003
    x = torch.linspace(-12, 12, width)
    q, k, v, keys, cached = (torch.randn(*shape, dim, generator=generator) for shape in (
        (heads, 1), (groups, 1), (groups, 1), (groups, capacity), (groups, capacity)))
    keys[:, -1:], cached[:, -1:] = k, v

    def attention(q, keys, cached):
        shared = heads // groups
        return functional.scaled_dot_product_attention(q, keys.repeat_interleave(shared, 0),
                                                       cached.repeat_interleave(shared, 0), scale=0.5)

    def plain(x, q, keys, cached):
        return [functional.silu(x), functional.gelu(x), functional.gelu(x, approximate="tanh"), functional.relu(x),
                functional.layer_norm(x, (width,), x), x * (x.square().mean() + 1e-5).rsqrt() * x,
                attention(q, keys, cached),
                attention(q, *(part.bfloat16().to(part.dtype) for part in (keys, cached)))]

    side_by_side = functional.pad(keys, (0, 0, 0, -capacity % 16)).unflatten(1, (-1, 16)).transpose(2, 3)
    rounded, exact = plain(x, q, keys, cached), plain(*(tensor.double() for tensor in (x, q, keys, cached)))
    for name, found in run("steps", [width, heads, groups, dim, capacity], [x, q, k, v, side_by_side, cached], rounded):
        for index, (one, torch_result, truth) in enumerate(zip(found, rounded, exact, strict=True)):
            # As parts of x: where an activation is nearly 0, torch rounds as coarsely.
            sizes = x.double().abs() if index < 4 else None
            assert_as_exact(f"{name} {index}", one, torch_result, truth, sizes=sizes)
