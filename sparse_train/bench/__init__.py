"""Timings, with the candidates in turns: layers, decoding, moves of weights, and training steps; gradients of losses.

    layers.py, decode.py   batch-1 products and tokens, compared with dense torch and with the memory's bandwidth
    compare.py, peers/     models, shapes (shapes.py) and other engines in one run
    moves.py, train.py     expanding and compacting weights; a training step
    gpu.py                 layers and decoding on a GPU
    prune.py               pruning a block, by phase
    losses.py              what each loss makes of a student's gradient
    timing.py, tables.py, plots.py   the measurement itself, its tables and pictures
"""

from sparse_train.bench.decode import decode_rows
from sparse_train.bench.layers import MPT_7B_BLOCK, layer_rows
from sparse_train.bench.timing import Timing, interleave

__all__ = ["MPT_7B_BLOCK", "Timing", "decode_rows", "interleave", "layer_rows"]
