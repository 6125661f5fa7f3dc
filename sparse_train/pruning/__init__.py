"""Pruning: scores decide the bits, the update decides the values.

    magnitude   the largest |w| survive
    sparsegpt   second-order scores and error compensation (arXiv 2301.00774)
"""

from sparse_train.pruning.blockwise import prune
from sparse_train.pruning.pattern import check_pattern

__all__ = ["check_pattern", "prune"]
