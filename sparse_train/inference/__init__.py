"""Models on the CPU or a GPU, sparse or dense.

    load       a folder -> Runtime, whose model has Hugging Face's `generate`
    Decoder    the forward pass of a new token, for the families of decoder.PLANS; Runtime uses it (decoding.py)
"""

from sparse_train.inference.decoder import Decoder, can_decode
from sparse_train.inference.load import Runtime, load
from sparse_train.sparse import PackedLinear

__all__ = ["Decoder", "PackedLinear", "Runtime", "can_decode", "load"]
