"""Sequence parallelism: two ranks that share the tokens compute what one process does, outputs and gradients."""

from dataclasses import replace

import pytest
import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_train import dist
from sparse_train.config import TrainConfig, ZeroConfig
from sparse_train.errors import UserError
from sparse_train.models import family_of
from sparse_train.sparse import BitmaskTensor, sparsify
from sparse_train.training import Hooks, gathered_tensors, train
from sparse_train.training.sequence import parallelise_attention, split_tokens
from tests.models import tiny_mpt
from tests.ranks import run_ranks
from tests.training.plain import Float64, Lines, assert_as_exact, assert_trained_as_exact, train_plain
from tests.training.test_parity import _training_run


def _model(kind):
    torch.manual_seed(0)
    if kind.startswith("mpt"):
        model = tiny_mpt()
        if kind == "mpt-sparse":
            sparsify(model, {name: BitmaskTensor.from_dense(linear.weight.detach(),
                                                            torch.rand_like(linear.weight) < 0.4)
                             for name, linear in family_of(model).prunable_linears(model).items()})
    else:
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
            num_key_value_heads=1 if kind == "llama-mqa" else 2, max_position_embeddings=64, use_cache=False))
    if kind == "mpt-checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _batch(lengths):
    ids = torch.randint(50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    attend = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(attend, ids, 0), attend


def _run(model, ids, attend, weight):
    """Logits, and the gradients of a sum over real tokens of weighted log-probabilities."""
    logits = model(input_ids=ids, attention_mask=attend.long(), use_cache=False).logits
    (logits.log_softmax(-1) * weight * attend[..., None]).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _weight(shape):
    return torch.randn(*shape, 50, generator=torch.Generator().manual_seed(2))


def _split(kind, batches):
    group, model, found = distributed.group.WORLD, _model(kind), []
    parallelise_attention(model, group)
    for lengths in batches:  # lengths and batch sizes change from step to step
        ids, attend = _batch(lengths)
        model.zero_grad()
        logits, grads = _run(model, split_tokens(ids, group, 0), split_tokens(attend, group, False),
                             _weight_part(ids.shape, group))
        found.append((logits, {name: dist.sum_over_ranks(grad.clone()) for name, grad in grads.items()}))
    return found


def _weight_part(shape, group):
    weight = _weight(shape)
    padding = torch.zeros(shape[0], -shape[1] % 2, 50)
    return torch.cat([weight, padding], 1).chunk(2, 1)[distributed.get_rank(group)]


@pytest.mark.parametrize("kind", ["mpt", "mpt-sparse", "mpt-checkpointing", "llama", "llama-mqa"])
def test_two_ranks_that_share_the_tokens_are_one(kind):
    batches = ([12, 7], [9], [16, 3, 2])  # 3 and 2 of 16: one rank holds all of a row's real tokens
    ranks = run_ranks(_split, 2, kind, batches)
    for index, lengths in enumerate(batches):
        ids, attend = _batch(lengths)
        logits, grads = _run(_model(kind), ids, attend, _weight(ids.shape))
        exact_kind = kind.replace("mpt-checkpointing", "mpt")  # what is computed again would be so outside Float64
        with Float64():
            exact_logits, exact_grads = _run(_model(exact_kind).double(), ids, attend, _weight(ids.shape))
        mine = torch.cat([rank[index][0] for rank in ranks], 1)[:, :ids.shape[1]]
        assert_as_exact("logits", mine[attend], logits[attend], exact_logits[attend])
        assert ranks[0][index][1].keys() == grads.keys()
        for name, grad in grads.items():
            assert_as_exact(name, ranks[0][index][1][name], grad, exact_grads[name])


def _refuse():
    group, told = distributed.group.WORLD, []
    for model in (tiny_mpt(d_model=48), _model("llama")):
        try:
            parallelise_attention(model, group)
        except UserError as error:
            told.append(str(error))
    return told


def test_heads_that_do_not_divide_are_refused():
    told = run_ranks(_refuse, 3)[0]
    assert told == ["2 heads cannot be divided over 3 ranks of a sequence; use a number of ranks that divides them",
                    "4 heads cannot be divided over 3 ranks of a sequence; use a number of ranks that divides them"]


def _training(stage, num_sharing, features):
    """What train and train_plain begin with. Norms as features are inside of blocks, which are computed again."""
    config = TrainConfig(steps=4, batch_size=6, accumulation=2, learning_rate=2e-3, warmup_steps=1, weight_decay=0.1,
                         sequence_parallel=num_sharing, activation_checkpointing=features == "norms",
                         zero=ZeroConfig(stage=stage, persistence_threshold=0))
    run = _training_run(config)
    return replace(run, loss=run.loss.model_copy(update={"features": features}))


def _train(folder, stage):
    found = []
    for features in ("blocks", "norms"):
        lines = Lines()
        outcome = train(_training(stage, 2, features), folder / features, Hooks(lines))
        found.append((lines.found, dict(gathered_tensors(outcome.engine))))
    return found


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (3, 2), (3, 4)])
def test_training_with_shared_tokens_is_training_on_one_process(stage, world, tmp_path):
    """Losses over partitioned hidden states, targets across the cut, and with four ranks two groups of two."""
    found = run_ranks(_train, world, tmp_path, stage)[0]
    for trained, features in zip(found, ("blocks", "norms"), strict=True):
        plain, exact = (train_plain(_training(stage, 1, features), dtype) for dtype in (torch.float32, torch.float64))
        assert_trained_as_exact(*trained, plain, exact)
