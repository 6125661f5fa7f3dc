"""Train LLMs to be sparse, and run the sparse models. This package knows tensors, ranks and files, nothing of SLURM."""

import os
import sys

# DeepSpeed compiles small extensions on first use; two environments that share one cache break each other.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
