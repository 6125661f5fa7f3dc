"""Sparse models that other code made -> sparse model folders of this package.

    importer.py              what an importer is, and which one a source belongs to
    dense.py                 dense checkpoints and GGUF files: zeros become bits
    compressed_tensors.py    sparse-bitmask and sparse-24-bitmask: their bits stay
    write.py                 which linears become sparse; the folder, tensor by tensor
"""

from sparse_train.importers.importer import Importer, open_source
from sparse_train.importers.write import Imported, import_model

__all__ = ["Imported", "Importer", "import_model", "open_source"]
