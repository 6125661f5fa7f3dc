"""A trained sparse model made ready: quantised, stored sparse for our runtime, stored dense for everyone else's."""

from sparse_train.compress.export import export_dense, export_sparse, unpruned_zeros
from sparse_train.compress.quantise import quantise_rows

__all__ = ["export_dense", "export_sparse", "quantise_rows", "unpruned_zeros"]
