"""Logits of predicted tokens alone, in parts; perplexity and divergence on general text against plain computations."""

import math

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FSMTConfig,
    FSMTForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    MarianConfig,
    MarianMTModel,
)

from sparse_train.config import EvaluateConfig, TaskConfig
from sparse_train.tasks import Batch, build_task, likelihood
from sparse_train.tasks.batch import IGNORED, EncoderInput, collate
from sparse_train.tasks.general_text import GeneralText
from sparse_train.tasks.likelihood import ScoringHead, like_lengths
from tests.models import tiny_examples, tiny_model

_SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, "pad_token_id": 0}


def _behind_the_head():
    """Models that cap, scale and shift their logits after the head, and one whose head is not where others have it."""
    torch.manual_seed(0)
    yield Gemma2ForCausalLM(Gemma2Config(**_SIZE, final_logit_softcapping=0.5))
    yield CohereForCausalLM(CohereConfig(**_SIZE, logit_scale=0.3))
    marian = MarianMTModel(MarianConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                        decoder_attention_heads=2, vocab_size=320, pad_token_id=0))
    marian.final_logits_bias.normal_()
    yield marian
    yield FSMTForConditionalGeneration(FSMTConfig(  # its output embedding is no head
        langs=["en", "de"], src_vocab_size=320, tgt_vocab_size=320, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64))


@torch.no_grad()
def test_the_head_gives_the_logits_of_what_is_predicted():
    models = {family: tiny_model(family) for family in ("mpt", "llama", "opt", "t5", "t5-gated", "whisper")}
    cases = [(model, collate(tiny_examples(processor), processor)) for model, processor in models.values()]
    rows = torch.randint(3, 320, (3, 7))
    labels = rows.masked_fill(torch.rand(rows.shape) < 0.4, IGNORED)
    text = Batch(rows, torch.ones_like(rows, dtype=torch.bool), labels)
    for model in _behind_the_head():
        encoder = EncoderInput(rows, text.attend) if model.config.is_encoder_decoder else None
        cases.append((model.eval(), Batch(rows, text.attend, labels, encoder)))
    for model, batch in cases:
        head = ScoringHead(model)
        expected = model(**batch.inputs(), use_cache=False).logits[batch.targets != IGNORED]
        found = torch.cat([logits for _, logits in head.parts(head.states(batch))])
        torch.testing.assert_close(found, expected, msg=lambda text, model=model: f"{type(model).__name__}: {text}")
        assert not torch.equal(found[0], found[-1])


def test_examples_of_like_length_share_a_batch_and_none_is_lost(monkeypatch):
    processor = tiny_model("llama")[1]
    examples = [example for _ in range(3) for example in tiny_examples(processor)]
    monkeypatch.setattr(likelihood, "_MOST_TOKENS", 40)
    groups = list(like_lengths(examples, processor, 5))
    assert sorted(map(id, examples)) == sorted(id(example) for group in groups for example in group)
    for group in groups:
        assert len(group) <= 5 and (len(group) == 1 or collate(group, processor).input_ids.numel() <= 40)
    assert max(map(len, groups)) > 1


@pytest.fixture
def texts(tmp_path):
    lines = [f"{i} " + "the quick brown fox jumps over it " * (1 + i % 3) for i in range(30)]
    (tmp_path / "train.txt").write_text("unused")
    (tmp_path / "test.txt").write_text("\n\n".join(lines))
    return TaskConfig(name="text", path=str(tmp_path), max_length=20)


@torch.no_grad()
def test_perplexity_and_divergence_are_those_of_each_text_alone(texts, monkeypatch):
    dense, processor = tiny_model("llama")
    sparse, _ = tiny_model("llama")
    for one, other in zip(dense.parameters(), sparse.parameters(), strict=True):
        one.mul_(4 if one.ndim > 1 else 1)  # so that predictions are decisive
        other.copy_(one + 0.05 * torch.randn_like(one))
    sums = {"dense": 0.0, "sparse": 0.0, "kl": 0.0}
    count = 0
    for example in build_task(texts).examples("test", 9):
        ids = torch.tensor([processor.tokenizer.encode(example.answer)])
        logs = {name: model.double()(input_ids=ids).logits[0, :-1].log_softmax(-1)
                for name, model in (("dense", dense), ("sparse", sparse))}
        for name, values in logs.items():
            sums[name] -= values.gather(1, ids[0, 1:, None]).sum().item()
        sums["kl"] += (logs["dense"].exp() * (logs["dense"] - logs["sparse"])).sum().item()
        count += ids.shape[1] - 1
    dense.float(), sparse.float()
    for batch_size, most_logits in ((1, 1 << 24), (4, 1 << 24), (50, 1000)):
        monkeypatch.setattr(likelihood, "_MOST_LOGITS", most_logits)
        text = GeneralText(texts, processor, EvaluateConfig(batch_size=batch_size, num_texts=9))
        for name, model, kl in (("dense", dense, 0), ("sparse", sparse, sums["kl"] / count)):
            metrics = text.score(model)
            assert metrics["num_tokens"] == count and metrics["num_left_out"] == 0
            assert math.log(metrics["perplexity"]) == pytest.approx(sums[name] / count, rel=1e-6)
            assert metrics["kl"] == pytest.approx(kl, rel=1e-5, abs=0)
    assert sums["kl"] / count > 0.02
