"""Packing changes no example's logits and no step of a training; mixing in other examples is exact."""

import contextlib
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sparse_train.compat.transformers import separates_sequences
from sparse_train.config import LossConfig, RunConfig, TrainConfig, ZeroConfig
from sparse_train.errors import UserError
from sparse_train.jobs.finetune import TrainingData
from sparse_train.models import family_of
from sparse_train.sparse import BitmaskTensor, sparsify
from sparse_train.tasks import Example
from sparse_train.tasks.batch import IGNORED, collate
from sparse_train.tasks.packing import Windows, best_fit, collate_windows
from sparse_train.training import Hooks, TrainingRun, gathered_tensors, train
from sparse_train.training.losses import new_terms, weighted_loss
from sparse_train.training.order import Mix, Order
from sparse_train.training.terms import ModelOutputs
from tests import model_types
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.training.plain import (
    Float64,
    Lines,
    assert_as_exact,
    assert_trained_as_exact,
    states_of,
    train_plain,
)

_LOSS = LossConfig(task_weight=1.0, logit_weight=0.5, feature_weight=1.0)
_SLIDING = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}  # one layer of each kind


def _examples():
    return [Example("Say nine", " 9 9 9"), Example("", " one two"), Example("Say it", " it"),
            Example("1 + 1 =", " 2 and then some 3 4 5"), Example("a", "b")]


def _model(kind):
    family = "llama" if kind == "qwen2" else kind
    model, processor = tiny_model(family)
    if kind == "qwen2":  # outside the table; its second layer's attention reaches four tokens back
        model = Qwen2ForCausalLM(Qwen2Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(processor.tokenizer), max_position_embeddings=64, **_SLIDING))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # so that attention and positions are decisive
    return model.eval(), processor


def _computed(kind, batch):
    """(logits at real tokens, terms, gradients)."""
    (student, _), (teacher, _) = _model(kind), _model(kind)
    if batch.positions is not None:
        for model in (student, teacher):
            family_of(model).separate_examples(model)
    dtype = torch.get_default_dtype()
    student, teacher = student.to(dtype), teacher.to(dtype)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
        teacher_logits, teacher_states = states_of(teacher, batch.inputs())
    logits, states = states_of(student, batch.inputs())
    terms = new_terms(_LOSS)
    for name, state in states.items():
        terms["feature"].add_features(state, teacher_states[name], batch.attend)
    rows = (x.flatten(0, 1) for x in (logits, batch.targets, batch.labels, teacher_logits))
    shares = weighted_loss(_LOSS, terms, ModelOutputs(*rows))
    shares.loss.backward()
    return (logits.detach()[batch.attend], shares.detached().terms,
            {name: p.grad for name, p in student.named_parameters() if p.grad is not None})


@contextlib.contextmanager
def _float64():
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "olmo2", "qwen2", "gpt_neox", "opt", "mpt"])
def test_a_window_computes_what_its_examples_do(kind):
    _, processor = _model(kind)
    examples = _examples()
    windows = [examples[:3], examples[3:]]
    alone, packed = collate(examples, processor), collate_windows(windows, processor)
    assert len(packed.input_ids) == 2 and packed.attend.sum() == alone.attend.sum()
    plain, found = _computed(kind, alone), _computed(kind, packed)
    with _float64():
        exact = _computed(kind, alone)
    assert_as_exact("logits", found[0], plain[0], exact[0])
    for part in (1, 2):
        assert found[part].keys() == exact[part].keys()
        for name, tensor in exact[part].items():
            # A divergence is the difference of two cross-entropies, and rounded as they are.
            sizes = exact[1]["task"] if name == "logit" else None
            assert_as_exact(name, found[part][name], plain[part][name], tensor, sizes=sizes)


def test_no_example_predicts_the_first_token_of_the_next():
    _, processor = _model("llama")
    examples = _examples()
    packed, alone = collate_windows([examples], processor), collate(examples, processor)
    starts = (packed.positions[0] == 0).nonzero()[1]
    assert packed.labels[0, starts] != IGNORED  # an example without a prompt, behind another
    assert packed.targets[packed.attend].tolist() == alone.targets[alone.attend].tolist()
    assert packed.positions[0].tolist() == [place for row in alone.attend.sum(1).tolist() for place in range(row)]
    empty = collate_windows([], processor)
    assert empty.input_ids.shape == (1, 1) and not empty.attend.any() and not empty.positions.any()


def test_windows_are_full_and_the_same_for_the_same_seed():
    lengths = torch.randint(20, 200, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    windows = best_fit(lengths, 256, seed=3)
    assert sorted(index for window in windows for index in window) == list(range(500))
    assert max(sum(lengths[index] for index in window) for window in windows) <= 256
    assert sum(lengths) / (256 * len(windows)) > 0.9
    assert windows == best_fit(lengths, 256, seed=3) != best_fit(lengths, 256, seed=4)
    assert best_fit([5, 5, 5], 5, seed=0) == [[index] for window in best_fit([5, 5, 5], 5, seed=0) for index in window]


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_a_model_that_cannot_keep_examples_apart_is_refused(kind):
    model, _ = tiny_model(kind)
    with pytest.raises(UserError, match=rf"^task.pack=true: a {kind} model cannot keep the examples of a window apart"):
        family_of(model).separate_examples(model)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types.TYPES)
def test_a_type_that_is_said_to_keep_sequences_apart_does(model_type):
    try:
        model = model_types.built(model_type)
    except Exception as error:
        pytest.skip(f"no tiny model: {error}")
    if not separates_sequences(model):
        pytest.skip("refused")
    rows, places = [[5, 9, 13, 22, 7, 31, 8, 2, 3], [7, 31, 8, 2, 3]], [0, 1, 2, 3, 0, 1, 2, 3, 4]
    with torch.no_grad():
        try:
            alone = model(input_ids=torch.tensor([rows[1]]), use_cache=False).logits[0]
        except Exception as error:
            pytest.skip(f"the tiny model does not run: {error}")
        inputs = {"input_ids": torch.tensor([rows[0]]), "position_ids": torch.tensor([places])}
        packed = model(**inputs, use_cache=False).logits[0]
    torch.testing.assert_close(packed[4:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "bloom", "mamba", "lfm2_moe", "qwen3_next", "t5gemma"])
def test_a_type_that_does_not_keep_sequences_apart_is_refused(model_type):
    assert not separates_sequences(model_types.built(model_type))


def _training(kind, packed, stage):
    """What train and train_plain begin with. Both see the same examples in each step."""
    (student, processor), (teacher, _) = _model(kind), _model(kind)
    sparsify(student, {name: BitmaskTensor.from_dense(linear.weight.detach(), torch.rand_like(linear.weight) < 0.5)
                       for name, linear in family_of(student).prunable_linears(student).items()})
    windows = Windows(_examples() + _examples()[1:], processor, 32, seed=1)
    assert len(windows) == 4 and max(map(len, (windows[index] for index in range(4)))) > 2

    def fetch(indices):
        rows = [windows[index] for index in indices]
        return collate_windows(rows, processor) if packed else collate([e for row in rows for e in row], processor)

    config = TrainConfig(steps=4, batch_size=3, learning_rate=1e-3, warmup_steps=1, activation_checkpointing=True,
                         zero=ZeroConfig(stage=stage, persistence_threshold=0))
    return TrainingRun(student, fetch, Order(len(windows), 3, 1, 0), config, packed=packed, loss=_LOSS, teacher=teacher)


def _train(folder):
    found = {}
    for kind, stage in (("mpt", 3), ("llama", 2)):
        lines = Lines()
        outcome = train(_training(kind, True, stage), folder / kind, Hooks(lines))
        found[kind] = lines.found, dict(gathered_tensors(outcome.engine))
    return found


def test_training_on_windows_is_training_on_their_examples(tmp_path):
    """Of three windows one rank has one, the other two."""
    ranks = run_ranks(_train, 2, tmp_path)
    for kind, (lines, tensors) in ranks[0].items():
        plain, exact = (train_plain(_training(kind, False, 0), dtype) for dtype in (torch.float32, torch.float64))
        assert_trained_as_exact(lines, tensors, plain, exact)


@pytest.mark.parametrize("num_examples", [10, None])
def test_mixed_examples_have_their_share_of_every_step_and_epochs_of_their_own(num_examples):
    order = Order(num_examples, 6, 2, seed=4, mix=Mix(Fraction(1, 4), 5))
    steps = [order.indices(step, 0) + order.indices(step, 1) for step in range(40)]
    read = [index for step in steps for index in step]
    mixed, own = [~index for index in read if index < 0], [index for index in read if index >= 0]
    assert len(mixed) == 60 and {sum(index < 0 for index in step) for step in steps} == {1, 2}
    assert all(sorted(mixed[start:start + 5]) == list(range(5)) for start in range(0, 60, 5))
    plain = Order(num_examples, 6, 1, seed=4)
    assert own == [index for step in range(30) for index in plain.indices(step, 0)]
    assert [order.indices(step, 0) + order.indices(step, 1) for step in (17, 3)] == [steps[17], steps[3]]


def test_a_training_reads_windows_of_its_task_and_of_the_mixed_text(tmp_path, caplog):
    (tmp_path / "book.txt").write_text("\n\n".join(f"Ann has {index} eggs and finds 3." for index in range(90)))
    _, processor = _model("llama")
    config = RunConfig.model_validate({
        "prune": {"sparsity": 0.5}, "finetune": {"steps": 10, "batch_size": 4, "num_examples": 30},
        "task": {"name": "arithmetic", "pack": True, "max_length": 400, "mix": {"share": 0.3, "task": {
            "name": "text", "path": str(tmp_path / "book.txt"), "max_length": 40}}}})
    processor = replace(processor, positions=None)
    with caplog.at_level("INFO", logger="sparse_train"):
        data = TrainingData(SimpleNamespace(config=config), config.finetune, processor)
    assert "12 of the 40 windows of the training are of task.mix (text)" in caplog.text
    assert data.num_mixed == 12 and data.packed
    read = [index for step in range(10) for index in data.order.indices(step, 0)]
    texts = processor.tokenizer.batch_decode(data.batch(read).input_ids)
    assert [index < 0 for index in read] == ["Question" not in text for text in texts]
    assert sum(index < 0 for index in read) == 12
    assert 200 < data.batch(read).input_ids.shape[1] <= 400
