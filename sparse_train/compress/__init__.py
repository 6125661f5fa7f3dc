"""Finished models: quantised to INT8, exported sparse for this package's runtime, and dense for other software."""

from sparse_train.compress.export import export_dense, export_sparse, unpruned_zeros
from sparse_train.compress.quantise import quantise_rows

__all__ = ["export_dense", "export_sparse", "quantise_rows", "unpruned_zeros"]
