"""python -m sparse_train.bench: the linears of one MPT-7B block at several sparsities; the last line is JSON."""

import argparse
import json

import torch
from rich.console import Console

from sparse_train import kernels
from sparse_train.bench.layers import MPT_7B_BLOCK, layer_rows, print_rows, random_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=_sparsity, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bandwidth, rows = kernels.read_bandwidth(), []
    for sparsity in options.sparsity:
        rows += layer_rows("mpt-7b block", random_weights(MPT_7B_BLOCK, sparsity), options.repeats, bandwidth)
    print_rows(rows, Console(width=140))
    print(json.dumps({"backend": kernels.backend(), "threads": options.threads, "bandwidth": bandwidth, "rows": rows}))


def _sparsity(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1)")
    return value


main()
