"""Sparse models that other code made -> sparse model folders of this package.

    entrance.py              what an entrance is, and which one a source belongs to
    dense.py                 dense checkpoints and GGUF files: zeros become bits
    compressed_tensors.py    sparse-bitmask and sparse-24-bitmask: their bits stay
    write.py                 which linears become sparse; the folder, tensor by tensor
"""

from sparse_train.entrances.entrance import Entrance, open_source
from sparse_train.entrances.write import Imported, import_model

__all__ = ["Entrance", "Imported", "import_model", "open_source"]
