"""The layer errors of each pruning method on activations of a pretrained model: the table of docs/benchmarks.md.

    python -m tests.layer_errors GSM8K    a folder with train.jsonl; SmolLM2-135M-Instruct must have been fetched
                                          (python -m tests.weights smollm2-135m)

The error of a linear is tr(d H d^T) / tr(W H W^T), with d the change of the weight W. H is that of the questions that
the methods see, or of as many others. All inputs are the dense model's, so that each method has the same problem.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pytest
import torch

from sparse_train.config import PruneConfig, TaskConfig
from sparse_train.models import as_folder, family_of, load_model, load_processor
from sparse_train.pruning import Layer, build_pruner
from sparse_train.pruning.statistics import Hessian
from sparse_train.tasks import Batch, build_task, training_examples
from tests.weights import needs_weights

LADDER = {"magnitude": {"method": "magnitude"}, "wanda": {"method": "wanda"}, "sparsegpt": {"method": "sparsegpt"},
          "sparsegpt, refit": {"method": "sparsegpt", "refit": True}, "admm": {"method": "admm"},
          "alps": {"method": "alps"}}
"""From the largest error to the smallest."""
PATTERNS = {"50%": {"sparsity": 0.5}, "70%": {"sparsity": 0.7}, "2:4": {"pattern": "2:4"}}
_BLOCKS, _KINDS = (2, 10, 20, 28), ("q_proj", "o_proj", "up_proj", "down_proj")
_NUM_EXAMPLES, _BATCH_SIZE = 32, 8


def layer_error(updated: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    difference, whole, hessian = (updated - weight).double(), weight.double(), hessian.double()
    return float(((difference @ hessian) * difference).sum() / ((whole @ hessian) * whole).sum())


def linears_of(model, blocks: Sequence[int]) -> dict[str, torch.nn.Linear]:
    """One of each that share their inputs. The model loses the blocks after the last of `blocks`."""
    model.model.layers = model.model.layers[:max(blocks) + 1]
    return {name: linear for name, linear in family_of(model).dense_linears(model).items()
            if int(name.split(".")[2]) in blocks and name.endswith(_KINDS)}


@torch.no_grad()
def collect(model, linears: Mapping[str, torch.nn.Linear], batches: Iterable[Batch]) -> dict[str, Hessian]:
    """Of what reaches each linear."""
    found = {name: Hessian(linear.in_features, torch.device("cpu")) for name, linear in linears.items()}
    attend: list[torch.Tensor] = []
    handles = [linear.register_forward_pre_hook(lambda _, args, hessian=found[name]: hessian.add(args[0][attend[-1]]))
               for name, linear in linears.items()]
    for batch in batches:
        attend.append(batch.attend)
        model.model(input_ids=batch.input_ids, attention_mask=batch.attend.long())
    for handle in handles:
        handle.remove()
    return found


def errors(name: str, weight: torch.Tensor, keys: Mapping, seen: Hessian,
           unseen: Hessian) -> tuple[float, float, float]:
    """(error on the inputs that the method sees, on others, CPU seconds)."""
    spec, start = PruneConfig(**keys), time.process_time()
    pruner = build_pruner(spec)
    updated, _ = pruner.prune(Layer(name, weight, spec.levels[0]), pruner.Statistics and seen)
    seconds = time.process_time() - start
    return *(layer_error(updated, weight, hessian.mean()) for hessian in (seen, unseen)), seconds


def _rows(path: str) -> Iterator[str]:
    folder = as_folder(str(needs_weights("smollm2-135m")))
    processor, model = load_processor(folder), load_model(folder)
    task = build_task(TaskConfig(name="gsm8k", path=path, max_length=384))
    examples, linears = training_examples(task, processor, 2 * _NUM_EXAMPLES)[0], linears_of(model, _BLOCKS)
    seen, unseen = (collect(model, linears, (task.batch(part[start:start + _BATCH_SIZE], processor)
                                             for start in range(0, len(part), _BATCH_SIZE)))
                    for part in (examples[:_NUM_EXAMPLES], examples[_NUM_EXAMPLES:]))
    num_tokens = [next(iter(found.values())).num_tokens for found in (seen, unseen)]
    yield f"{len(linears)} linears of blocks {', '.join(map(str, _BLOCKS))}; tokens seen and unseen: {num_tokens}"
    yield f"{'zeros':6} {'method':18} {'seen':>7} {'unseen':>7} {'CPU s':>6}"
    for pattern, level in PATTERNS.items():
        for method, keys in LADDER.items():
            found = torch.tensor([errors(name, linear.weight.detach(), {**keys, **level}, seen[name], unseen[name])
                                  for name, linear in linears.items()])
            mean, total = found.mean(0), found[:, 2].sum()
            yield f"{pattern:6} {method:18} {mean[0]:7.4f} {mean[1]:7.4f} {total:6.1f}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.layer_errors GSM8K")
    try:
        for row in _rows(sys.argv[1]):
            print(row, flush=True)
    except pytest.skip.Exception as missing:  # as a test says it
        print(missing, file=sys.stderr)
        sys.exit(2)
