"""Finished models: quantised to INT8 or INT4, exported sparse for this package's runtime, dense for other software."""

from sparse_train.compress.export import export_dense, export_sparse, unpruned_zeros
from sparse_train.compress.quantise import quantise_groups, quantise_rows

__all__ = ["export_dense", "export_sparse", "quantise_groups", "quantise_rows", "unpruned_zeros"]
