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
