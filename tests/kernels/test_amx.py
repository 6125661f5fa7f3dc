"""What test_matmul.py does not say of the tier amx: the bits of INT8, and a process that gets no tiles."""

import subprocess
import sys

import pytest
import torch

from sparse_train import kernels
from sparse_train.kernels import _native

pytestmark = pytest.mark.skipif("amx" not in kernels.backends(), reason="this CPU has no AMX")


@pytest.mark.sanitize
@pytest.mark.parametrize("num_columns", [100, 4100, 65_536, 65_800])
def test_int8_has_the_bits_of_a_product_with_vectors_where_32_bits_hold_the_sums(num_columns):
    generator = torch.Generator().manual_seed(0)
    codes = torch.full((40, num_columns), -128, dtype=torch.int8)
    codes[20:] = torch.randint(-128, 128, (20, num_columns), generator=generator)
    keep = codes < 100
    matrix = kernels.PackedMatrix(codes[keep], kernels.pack(keep), num_columns, torch.linspace(0.5, 1, 40))
    x = torch.randn(19, num_columns, generator=generator) * torch.logspace(-30, 30, 19)[:, None]
    x[0] = 255
    with kernels.use_backend("amx"):
        found = matrix._expanding(x)
        if num_columns <= 65_536:
            assert torch.equal(found, torch.stack([matrix.matvec(row) for row in x]))
    torch.testing.assert_close(found[0, :20], -128.0 * 255 * num_columns * torch.linspace(0.5, 1, 40)[:20])


_CHILD = """
import ctypes, importlib.util, sys

class Stack(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(8192)
assert not ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None)
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.tier())
"""


def test_a_process_that_may_not_use_tiles_takes_avx512():
    """Linux gives no tiles to one whose stack for signals is too small for them."""
    command = [sys.executable, "-c", _CHILD, _native.__file__]
    assert subprocess.run(command, text=True, capture_output=True, check=True).stdout == "avx512\n"
