"""What 75% sparsity saves on the prunable weights: state, checkpoint and traffic, counted and not derived."""

import pytest
import torch

from sparse_train.bench.train import TrainBench, _traffic
from sparse_train.compat.deepspeed import gradient_buffer
from sparse_train.config import TrainConfig, ZeroConfig
from sparse_train.models import family_of
from sparse_train.sparse import BitmaskTensor, sparsify
from sparse_train.training import checkpoint
from sparse_train.training.fragments import KINDS, own_fragments, state_bytes
from sparse_train.training.order import Order
from sparse_train.training.run import TrainingRun
from sparse_train.training.step import Trainer
from tests.ranks import run_ranks

# So few tokens in the vocabulary that nearly all weights are prunable.
_BENCH = TrainBench(d_model=256, n_layers=4, vocab_size=8, num_tokens=32)


def _count(folder, precision):
    found = {}
    for kind in ("dense", "sparse"):
        student = _BENCH.model()
        if kind == "sparse":
            sparsify(student, {name: BitmaskTensor.from_dense(linear.weight.detach(), _BENCH.keep(linear))
                               for name, linear in family_of(student).prunable_linears(student).items()})
        config = TrainConfig(batch_size=2, precision=precision, zero=ZeroConfig(stage=3))
        trainer = Trainer(TrainingRun(student, _BENCH.batch, Order(None, 2, 1, 0), config))
        for step in (1, 2):
            trainer.step(step)
        checkpoint.save(trainer.engine, trainer.bits, folder / kind, 2, {}, 2, lambda: None)
        files = (folder / kind).rglob("rank-*.safetensors")
        parts = {name: sum(fragment.tensors[name].nbytes for fragment in own_fragments(trainer.engine))
                 for name in KINDS}
        bits = sum(p.ds_tensor.nbytes for p in trainer.engine.module.parameters() if p.dtype == torch.uint8)
        found[kind] = {
            **parts, "gradients": gradient_buffer(trainer.engine).nbytes,
            "checkpoint": sum(file.stat().st_size for file in files), "state": state_bytes(trainer.engine),
            "traffic": _traffic(lambda trainer=trainer: trainer.step(3)), "bits": bits,
        }
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_quarter_of_the_weights_is_a_quarter_of_everything(precision, tmp_path):
    for found in run_ranks(_count, 2, tmp_path, precision):
        sparse, dense = found["sparse"], found["dense"]
        ratios = {name: sparse[name] / dense[name] for name in dense if dense[name]}
        for name in (*KINDS, "gradients", "checkpoint"):
            assert ratios[name] <= 0.27, (name, ratios)
        assert ratios["traffic"] <= 0.28, ratios
        assert sparse["bits"] == _BENCH.n_layers * 12 * _BENCH.d_model**2 // 8 // 2  # numel / 8 / world
