"""Encoder-decoders train like decoders: the ranks do not change a tensor, both stacks' features and paddings count."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from sparse_train.config import LossConfig, ModelConfig, TrainConfig, ZeroConfig
from sparse_train.models import build_model, build_processor, family_of
from sparse_train.sparse import BitmaskTensor, densify, sparsify
from sparse_train.tasks import Example
from sparse_train.tasks.batch import collate
from sparse_train.training import Hooks, TrainingRun, gathered_tensors, train
from sparse_train.training.order import Order
from tests.models import tiny_tokenizer
from tests.ranks import run_ranks
from tests.training.plain import (
    Float64,
    Lines,
    assert_as_exact,
    assert_trained_as_exact,
    squarehead_of,
    states_of,
    train_plain,
)

_LOSS = LossConfig(task_weight=1.0, logit_weight=0.5, feature_weight=1.0)


def _parts(family):
    torch.manual_seed(0)
    config = ModelConfig(family=family, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, window_seconds=0.4)
    processor = build_processor(config, tiny_tokenizer())
    student, teacher = build_model(config, processor), build_model(config, processor)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # what is dropped depends on the rank
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    sparsify(student, {name: BitmaskTensor.from_dense(linear.weight.detach(), torch.rand_like(linear.weight) < 0.5)
                       for name, linear in family_of(student).prunable_linears(student).items()})
    return student, teacher, processor


def _examples(processor):
    draw = np.random.default_rng(1)
    found = []
    for index in range(5):
        sound = draw.standard_normal(800 + 1200 * index).astype(np.float32)
        found.append(Example(f"say{' it' * index}", f" {index}{' 7' * (5 - index)}",
                             (lambda rate, s=sound: s) if processor.features else None))
    return found


def _training(family):
    """What train and train_plain begin with."""
    student, teacher, processor = _parts(family)
    examples = _examples(processor)
    config = TrainConfig(steps=4, batch_size=3, learning_rate=1e-3, warmup_steps=1, log_every=1,
                         zero=ZeroConfig(stage=3, persistence_threshold=0), activation_checkpointing=True)
    return TrainingRun(student, lambda indices: collate([examples[i] for i in indices], processor),
                       Order(len(examples), 3, 1, 0), config, loss=_LOSS, teacher=teacher)


def _train(family, folder):
    lines = Lines()
    outcome = train(_training(family), folder, Hooks(lines))
    return outcome.metrics, lines.found, dict(gathered_tensors(outcome.engine))


@pytest.mark.parametrize("family", [pytest.param("t5", marks=pytest.mark.slow), "t5-gated", "whisper"])
def test_ranks_do_not_change_what_an_encoder_decoder_learns(family, tmp_path):
    """With two ranks one has a single example; with four, one has none."""
    plain, exact = (train_plain(_training(family), dtype) for dtype in (torch.float32, torch.float64))
    for world in (1, 2, 4):
        metrics, lines, tensors = run_ranks(_train, world, family, tmp_path / str(world))[0]
        assert metrics["squarehead"].keys() == {"0", "1", "2", "3"}
        assert_trained_as_exact(lines, tensors, plain, exact)


def _squarehead(family, padding, folder, precision="fp32"):
    """The logged terms of a step that changes nothing, and the batch."""
    student, teacher, processor = _parts(family)
    batch = collate(_examples(processor), processor)
    config = TrainConfig(steps=1, batch_size=5, learning_rate=0.0, zero=ZeroConfig(stage=0), precision=precision)
    loss = LossConfig(feature_weight=1.0, encoder_padding=padding)
    outcome = train(TrainingRun(student, lambda indices: batch, Order(5, 5, 1, 0), config, loss=loss, teacher=teacher),
                    folder)
    return list(outcome.metrics["squarehead"].values()), batch


def _formula(family, padding, batch, dtype):
    student, teacher, _ = _parts(family)
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
              for name, tensor in batch.inputs().items()}
    models = [model.to(dtype).eval() for model in (densify(student), teacher)]
    with torch.no_grad(), Float64() if dtype == torch.float64 else contextlib.nullcontext():
        (_, s), (_, t) = (states_of(model, inputs) for model in models)
        attends = [batch.attends[side] for side in ("encoder", "encoder", "decoder", "decoder")]
        if padding:
            attends[:2] = map(torch.ones_like, attends[:2])
        return [float(squarehead_of(*pair)) for pair in zip(s.values(), t.values(), attends, strict=True)]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_squarehead_of_two_stacks_is_the_formula(family, padding, tmp_path):
    (found, batch), = run_ranks(_squarehead, 1, family, padding, tmp_path)
    plain, exact = (_formula(family, padding, batch, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_exact("SquareHead", found, plain, exact)


def test_audio_is_given_in_the_precision_of_the_model(tmp_path):
    (found, batch), = run_ranks(_squarehead, 1, "whisper", False, tmp_path, "bf16")
    assert found == pytest.approx(_formula("whisper", False, batch, torch.float64), rel=2.0**-5)


def test_a_batch_goes_to_a_device_whole():
    _, _, processor = _parts("t5")
    batch = collate(_examples(processor), processor)
    moved = batch.to(torch.device("meta"))
    for part in dataclasses.astuple(moved)[:3]:
        assert part.is_meta
    assert moved.encoder.inputs.is_meta and moved.encoder.attend.is_meta
