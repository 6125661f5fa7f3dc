import pytest

from sparse_train import kernels
from sparse_train.kernels import packed


@pytest.fixture(params=reversed(kernels.backends()))
def backend(request):
    """Each instruction set that this CPU has, in turn."""
    with kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def skips(monkeypatch):
    """Products of many rows skip zeros whatever the density."""
    monkeypatch.setattr(packed, "break_even", lambda num_rows, precision: 1.0)


_INTEGERS = ("int8", "int4")


@pytest.fixture(params=[*((backend, precision) for backend in reversed(kernels.backends())
                          for precision in ("fp32", *_INTEGERS)),
                        *(("amx tiles", precision) for precision in ("bf16", *_INTEGERS))], ids=" ".join)
def product(request, monkeypatch):
    """A precision whose products of many rows skip zeros on each instruction set, or are dense by tiles."""
    backend, precision = request.param
    name, _, is_dense = backend.partition(" ")
    if name not in kernels.backends():
        pytest.skip("this CPU has no AMX")
    monkeypatch.setattr(packed, "break_even", lambda num_rows, precision: -1.0 if is_dense else 1.0)
    with kernels.use_backend(name):
        yield precision
