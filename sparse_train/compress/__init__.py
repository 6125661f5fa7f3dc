"""Finished models: quantised to INT8 or INT4, exported sparse for this package's runtime, dense for other software."""

from sparse_train.compress.export import export_dense, export_sparse, unpruned_zeros
from sparse_train.compress.quantise import QUANTISERS, Codes, quantise_groups, quantise_rows
from sparse_train.compress.rounding import round_compensated

__all__ = [
    "QUANTISERS", "Codes", "export_dense", "export_sparse", "quantise_groups", "quantise_rows", "round_compensated",
    "unpruned_zeros",
]
