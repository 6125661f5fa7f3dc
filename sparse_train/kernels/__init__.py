from sparse_train.kernels.reference import compact, expand, pack, unpack

__all__ = ["compact", "expand", "pack", "unpack"]
