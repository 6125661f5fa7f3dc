"""What a rank of a pruning needs at most: the figures of docs/benchmarks.md.

    python -m tests.pruning_memory [WIDTH ...]    of MPT's blocks; default 1024 1280

Models of random weights are written block by block and pruned by SparseGPT on two ranks, by the job of a run. By WIDTH
and number of blocks, each rank's most resident memory beyond what it had before is printed beside `expected_bytes`, and
in the end `expected_bytes` of MPT-30B.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from sparse_train import dist
from sparse_train.config import ModelConfig, RunConfig
from sparse_train.jobs import prune
from sparse_train.jobs.job import Input, Job
from sparse_train.jobs.stage import Kind, Stage
from sparse_train.models import build_processor, describe, empty_model, own_tensors, save_model
from tests.models import tiny_tokenizer
from tests.ranks import run_ranks

NUM_TOKENS = 6 * 128
"""At most, of six examples."""


def expected_bytes(width: int, num_tokens: int) -> dict[str, int]:
    """Of a block of MPT on the rank that prunes its widest linear, 4 * width columns, by SparseGPT; without what a
    forward pass holds, and the embedding. `num_tokens`: this rank's, with padding."""
    columns = (width, width, width, 4 * width)
    return {"weights, fp32": 4 * 12 * width**2,
            "pages of the file with these, which the system may drop": 4 * 12 * width**2,
            "sums of the Hessians, fp64, lower triangles": sum(8 * size**2 // 2 for size in columns),
            "factors of the widest one, fp32": 3 * 4 * columns[-1]**2,
            "hidden states, fp32": 4 * num_tokens * width}


def write_model(folder: Path, width: int, num_blocks: int) -> None:
    """A dense MPT of random weights, of which one tensor is held at a time, and of few tokens."""
    config = ModelConfig(family="mpt", d_model=width, n_layers=num_blocks, n_heads=width // 64, max_seq_len=128,
                         vocab_size=len(tiny_tokenizer()))
    model, processor = empty_model(describe(config)), build_processor(config, tiny_tokenizer())

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, empty in own_tensors(model).items():
            yield name, torch.randn(empty.shape, generator=generator) * (0.02 if empty.ndim > 1 else 1)

    save_model(folder, model, processor, tensors())


def peak(folder: Path) -> int:
    """Bytes that this rank has at most, beyond those before, while it prunes the model `folder`/dense."""
    torch.set_num_threads(1)
    dense, before = Stage(Kind.DENSE, "dense", external=str(folder / "dense")), psutil.Process().memory_info().rss
    job = Job(RunConfig(prune={"method": "sparsegpt", "sparsity": 0.75, "num_calibration": 6, "batch_size": 2}),
              Stage(Kind.PRUNE, "prune", inputs=(dense,)), folder / "out", (Input(dense, folder / "dense"),),
              _ignore)
    return int(1e9 * prune.run(job)["peak_memory_gb"][dist.rank()]) - before


def _ignore(*_: object) -> None:
    """As a job's progress; ranks get a job pickled."""


def main(widths: list[int]) -> None:
    for width in widths:
        for num_blocks in (1, 3):
            with tempfile.TemporaryDirectory() as place:
                write_model(Path(place) / "dense", width, num_blocks)
                peaks = run_ranks(peak, 2, Path(place), timeout_s=3600)
            found, expected = (f"{found / 1e9:.3f}" for found in peaks), expected_bytes(width, NUM_TOKENS // 2)
            print(f"width {width}, blocks: {num_blocks}; GB by rank: {', '.join(found)}; expected of the first: "
                  f"{sum(expected.values()) / 1e9:.3f}", flush=True)
    parts = expected_bytes(7168, 128 * 2048 // 8)
    print("MPT-30B, 128 examples of 2,048 tokens over 8 ranks: "
          + ", ".join(f"{what} {size / 1e9:.1f}" for what, size in parts.items())
          + f"; {sum(parts.values()) / 1e9:.1f} GB together")


if __name__ == "__main__":
    main([int(width) for width in sys.argv[1:]] or [1024, 1280])
