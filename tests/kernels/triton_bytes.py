"""What products on a GPU read of a weight with random bits, beside the dense one in BF16: `python -m
tests.kernels.triton_bytes`. It needs no GPU. Their ratio bounds the speedup where both are limited by bytes."""

import torch

from sparse_train import kernels
from sparse_train.kernels.triton_matrix import DeviceMatrix

_WEIGHTS = (*(("bf16", sparsity) for sparsity in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)), ("int8", 0.5), ("int8", 0.75),
            ("int4", 0.5), ("int4", 0.75))
_NUM_ROWS = 1024


def _bytes(keep: torch.Tensor, precision: str, num_rows: int) -> int:
    values = torch.zeros(int(keep.sum()), dtype=torch.bfloat16 if precision == "bf16" else torch.int8)
    scale = {"bf16": None, "int8": torch.ones(len(keep)),
             "int4": torch.ones(len(keep), -(-keep.shape[1] // kernels.GROUP), dtype=torch.bfloat16)}[precision]
    return DeviceMatrix(values, kernels.pack(keep), keep.shape[1], scale, num_rows).num_bytes


def main() -> None:
    print("columns  precision  sparsity  1 row: bytes per position  bound  16 rows: bytes per position  bound")
    for num_columns in (4096, 14336):
        scores = torch.rand(_NUM_ROWS, num_columns, generator=torch.Generator().manual_seed(0))
        weights = [(precision, f"{sparsity:.2f}", scores >= sparsity) for precision, sparsity in _WEIGHTS]
        weights += [("bf16", f"{n}:{m}", (scores.unflatten(1, (-1, m)).argsort(-1).argsort(-1) < n).flatten(1))
                    for n, m in ((2, 4), (16, 32), (16, 64))]
        for precision, sparsity, keep in weights:
            runs, tiles = (_bytes(keep, precision, num_rows) / keep.numel() for num_rows in (1, 16))
            print(f"{num_columns:7}  {precision:9}  {sparsity:>8}  {runs:25.3f}  {2 / runs:5.2f}"
                  f"  {tiles:27.3f}  {2 / tiles:5.2f}")


if __name__ == "__main__":
    main()
