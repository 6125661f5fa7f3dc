"""Pruning: which weights of a model survive, and their new values.

    blockwise.py     a model, block by block, over ranks
    calls.py, collect.py
                     what blocks are called with; statistics of what their linears get
    backward.py      the loss's gradients, from the last block to the first
    layers.py        which linears are pruned, and how far
    allocation.py    the sparsity of each block
    pruner.py        the interface of a method
    magnitude.py, wanda.py, sparsegpt.py, admm.py, alps.py, obert.py
                     a method each
    compensation.py  columns that take over the errors of those before them
    refit.py         the best values for given bits
    reconstruction.py
                     values that a block is trained to
    pattern.py       bits from scores
    calibration.py, statistics.py
                     calibration batches; sums over what they make of a linear's inputs
    parameters.py    counts of parameters before and after pruning

The methods are the table PRUNERS of sparse_train/registry.py.
"""

from sparse_train.pruning.blockwise import choose_specs, prune, prune_layers
from sparse_train.pruning.calibration import calibration_batches
from sparse_train.pruning.pruner import Layer, Pruner, build_pruner

__all__ = ["Layer", "Pruner", "build_pruner", "calibration_batches", "choose_specs", "prune",
           "prune_layers"]
