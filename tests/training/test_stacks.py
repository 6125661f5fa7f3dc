"""Encoder-decoders train like decoders: the ranks do not change a tensor, both stacks' features and paddings count."""

import dataclasses

import numpy as np
import pytest
import torch

from sparse_train.config import LossConfig, ModelConfig, TrainConfig, ZeroConfig
from sparse_train.models import build_model, build_processor, family_of
from sparse_train.models.family import block_output
from sparse_train.sparse import BitmaskTensor, sparsify
from sparse_train.tasks import Example
from sparse_train.tasks.batch import collate
from sparse_train.training import gathered_tensors, train
from sparse_train.training.order import Order
from tests.models import tiny_tokenizer
from tests.ranks import run_ranks

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


def _train(family, folder):
    student, teacher, processor = _parts(family)
    examples = _examples(processor)
    config = TrainConfig(steps=4, batch_size=3, learning_rate=1e-3, warmup_steps=1,
                         zero=ZeroConfig(stage=3, persistence_threshold=0), activation_checkpointing=True)
    outcome = train(student, teacher, lambda indices: collate([examples[i] for i in indices], processor),
                    Order(len(examples), 3, 1, 0), config, _LOSS, folder)
    return outcome.metrics, dict(gathered_tensors(outcome.engine))


@pytest.mark.parametrize("family", ["t5", "t5-gated", "whisper"])
def test_ranks_do_not_change_what_an_encoder_decoder_learns(family, tmp_path):
    """With two ranks one has a single example; with four, one has none."""
    (metrics, alone), = run_ranks(_train, 1, family, tmp_path / "1")
    for world in (2, 4):
        found = run_ranks(_train, world, family, tmp_path / str(world))[0]
        assert found[0]["squarehead"].keys() == {"0", "1", "2", "3"}
        assert found[0]["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
        for name, tensor in alone.items():
            torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-5 if tensor.is_floating_point() else 0,
                                       msg=lambda m, name=name: f"{name}: {m}")


def _squarehead(family, padding, folder):
    """(the logged terms, the formula's)."""
    student, teacher, processor = _parts(family)
    student.eval(), teacher.eval()
    batch = collate(_examples(processor), processor)

    def states(model):
        found = []
        handles = [block.register_forward_hook(lambda m, i, o: found.append(block_output(o)))
                   for block in family_of(model).blocks(model).values()]
        with torch.no_grad():
            model(**batch.inputs())
        for handle in handles:
            handle.remove()
        return found

    wanted = []
    for index, (s, t) in enumerate(zip(states(student), states(teacher), strict=True)):
        real = (batch.attends["encoder" if index < 2 else "decoder"])[..., None].float()
        if padding and index < 2:
            real = torch.ones_like(real)
        wanted.append(float(((s - t) ** 2 * real).sum() / (t**2 * real).sum()))
    config = TrainConfig(steps=1, batch_size=5, learning_rate=0.0, zero=ZeroConfig(stage=0))
    outcome = train(student, teacher, lambda indices: batch, Order(5, 5, 1, 0), config,
                    LossConfig(feature_weight=1.0, encoder_padding=padding), folder)
    return list(outcome.metrics["squarehead"].values()), wanted


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_squarehead_of_two_stacks_is_the_formula(family, padding, tmp_path):
    (found, wanted), = run_ranks(_squarehead, 1, family, padding, tmp_path)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_batch_goes_to_a_device_whole():
    _, _, processor = _parts("t5")
    batch = collate(_examples(processor), processor)
    moved = batch.to(torch.device("meta"))
    for part in dataclasses.astuple(moved)[:3]:
        assert part.is_meta
    assert moved.encoder.inputs.is_meta and moved.encoder.attend.is_meta
