"""Sparse folders in servers of other projects, on the kernels of this package. Nothing else imports those projects.

    vllm.py          what vLLM loads when it starts: the quantization method `sparse-train`, and checks of the folder
    vllm_linear.py   its linears: weights collected as they are read, cut for tensor parallelism, packed, multiplied
"""
