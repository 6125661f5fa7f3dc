"""Models in formats of other software, a file per format, each a line of EXPORTERS in sparse_train/registry.py.

    source.py               the model folder that is read: dense or sparse, of any precision; `export` runs an exporter
    dense.py                Hugging Face's layout with zeros in place
    compressed_tensors.py   the same with INT8 or INT4 weights, as vLLM and transformers read them
    gguf.py                 a file for llama.cpp; gguf_tokenizer.py writes its tokenizer
"""

from sparse_train.exporters.source import Source, export

__all__ = ["Source", "export"]
