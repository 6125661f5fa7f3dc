"""Run by a Python that has compressed-tensors 0.14 and transformers 4: write_packed.py DENSE OUT KIND writes the
checkpoint DENSE as KIND, sparse-bitmask or sparse-24-bitmask. Of this project it imports nothing."""

import sys

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    dense, out, kind = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    config = SparsityCompressionConfig.load_from_registry(kind, targets=["Linear"], ignore=["lm_head"])
    compressor = ModelCompressor.from_pretrained_model(model, sparsity_config_or_format=config)
    model.save_pretrained(out, state_dict=compressor.compress(model))
    compressor.update_config(out)
    AutoTokenizer.from_pretrained(dense).save_pretrained(out)
