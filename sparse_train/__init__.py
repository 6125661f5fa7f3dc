"""Train LLMs to be sparse, and run the sparse models. The library knows tensors, ranks and files, not SLURM."""

import os
import sys

# DeepSpeed compiles small extensions on first use; two environments that share one cache break each other.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
