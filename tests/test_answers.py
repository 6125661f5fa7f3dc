"""What a model answers does not depend on a folder's taste or on the batch, and stays inside its positions."""

import json

import pytest
import torch
from transformers import GenerationConfig, MptConfig, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparse_train.config import EvaluateConfig, PruneConfig
from sparse_train.errors import UserError
from sparse_train.inference import load
from sparse_train.models import load_model, load_processor, save_model
from sparse_train.models.positions import decoder_positions, encoder_positions
from sparse_train.pruning import prune
from sparse_train.sparse import sparsify
from sparse_train.tasks import Example, generate
from sparse_train.tasks.batch import encode_prompt
from tests.models import tiny_model

_TASTE = {"do_sample": True, "temperature": 0.3, "num_return_sequences": 3, "repetition_penalty": 1.9, "num_beams": 4,
          "no_repeat_ngram_size": 2, "min_new_tokens": 9, "max_length": 3, "max_time": 0.0, "forced_eos_token_id": 5,
          "bad_words_ids": [[7]], "length_penalty": 3.0, "cache_implementation": "static", "output_scores": True,
          "return_dict_in_generate": True, "diversity_penalty": 0.5, "stop_strings": ["a"],
          "pad_token_id": -1}  # "none", as the first Llamas say it


def _describe(folder, **settings):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_folders_taste_changes_no_answer_and_stays_in_what_is_written(family, tmp_path):
    model, processor = tiny_model(family)
    examples = [Example("Question: Tom has 3 eggs\nAnswer:", ""), Example("12", "")]
    save_model(tmp_path / "plain", model, processor)
    save_model(tmp_path / "taste", model, processor)
    _describe(tmp_path / "taste", **_TASTE)
    expected = generate(load_model(tmp_path / "plain"), processor, examples, EvaluateConfig(max_new_tokens=12))
    assert generate(load_model(tmp_path / "taste"), processor, examples, EvaluateConfig(max_new_tokens=12)) == expected
    assert load(tmp_path / "taste").complete(examples[0].prompt, 12) == expected[0]
    weights = prune(model, [], PruneConfig(method="magnitude", sparsity=0.5))
    save_model(tmp_path / "sparse", sparsify(load_model(tmp_path / "taste"), weights), processor)
    written = json.loads((tmp_path / "sparse" / "generation_config.json").read_text())
    assert written.items() >= _TASTE.items()


def test_what_belongs_to_the_model_is_taken_from_its_folder(tmp_path):
    model, processor = tiny_model("llama")
    save_model(tmp_path, model, processor)
    question = "Question: Tom has 3 eggs"
    prompt = torch.tensor([processor.tokenizer.encode(question)])
    free = model.generate(prompt, attention_mask=prompt > -1, do_sample=False, max_new_tokens=8, eos_token_id=None)
    told = free[0, prompt.shape[1]:].tolist()
    place = next(i for i in range(2, 8) if told[i] not in told[:i])
    _describe(tmp_path, eos_token_id=[0, told[place]])  # a second end, as of chat models
    assert load(tmp_path).complete(question, 8) == processor.tokenizer.decode(told[:place + 1],
                                                                              skip_special_tokens=True)
    _describe(tmp_path, eos_token_id=0, suppress_tokens=[told[1]])
    assert load(tmp_path).complete(question, 8) != processor.tokenizer.decode(told, skip_special_tokens=True)
    for wrong in ("x", [1.5], [-1], True):
        _describe(tmp_path, eos_token_id=wrong)
        with pytest.raises(UserError, match=r"generation_config.json: eos_token_id=.* is no token id"):
            load(tmp_path)


def test_an_answer_starts_with_the_token_that_the_model_is_made_to_say(tmp_path):
    """BART's beginning-of-text: in training, where it was missing, as in generation."""
    model, processor = tiny_model("t5")
    save_model(tmp_path, model, processor)
    assert load_processor(tmp_path).decoder_prefix == processor.decoder_prefix
    _describe(tmp_path, forced_bos_token_id=7)
    assert load_processor(tmp_path).decoder_prefix == (*processor.decoder_prefix, 7)


def test_positions_of_families():
    def decoder(kind, **size):
        return decoder_positions(CONFIG_MAPPING[kind](**size))

    assert decoder("llama", max_position_embeddings=99) == decoder("gpt2", n_positions=99) == 99
    assert decoder("whisper", max_target_positions=99) == decoder_positions(MptConfig(max_seq_len=99)) == 99
    assert decoder("falcon", max_position_embeddings=99, alibi=False) == 99
    for endless in (decoder("falcon", alibi=True), decoder("bloom"), decoder("mamba"), decoder_positions(T5Config())):
        assert endless is None
    bart, led = CONFIG_MAPPING["bart"](max_position_embeddings=99), CONFIG_MAPPING["led"]()
    assert (encoder_positions(bart), decoder_positions(bart)) == (99, 99)
    assert (encoder_positions(led), decoder_positions(led)) == (16384, 1024)
    assert encoder_positions(T5Config()) is encoder_positions(CONFIG_MAPPING["llama"]()) is None


def test_more_tokens_than_positions_are_refused_with_the_number_that_fits(tmp_path):
    model, processor = tiny_model("mpt")
    save_model(tmp_path, model, processor)
    runtime = load(tmp_path)
    most = runtime.processor.positions - len(processor.tokenizer.encode("Tom has 3 eggs"))
    with pytest.raises(UserError, match=rf"{most + 1} new ones; give at most {most}$"):
        runtime.complete("Tom has 3 eggs", most + 1)
    runtime.complete("Tom has 3 eggs", most)
    assert runtime.complete("Tom has 3 eggs") == runtime.complete("Tom has 3 eggs", most)  # unless less was asked for
    with pytest.raises(UserError, match=r"too few for the .* tokens of the prompt and 1 new ones; shorten it"):
        runtime.complete("Tom has 3 eggs " * 200, 1)


def test_nothing_of_a_models_settings_is_lost_by_answering():
    model, processor = tiny_model("llama")
    model.generation_config = kept = GenerationConfig(repetition_penalty=1.5)
    generate(model, processor, [Example("Tom", "")], EvaluateConfig(max_new_tokens=2))
    assert model.generation_config is kept and kept.repetition_penalty == 1.5


@pytest.mark.parametrize("family", ["llama", "mpt", "opt"])
def test_answers_that_have_ended_leave_the_batch_and_the_others_go_on_as_they_would_alone(family):
    model, processor = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that predictions are decisive
    examples = [Example("Tom has 3 eggs"[:length], "") for length in range(1, 15)]
    spec = EvaluateConfig(max_new_tokens=24)

    def tell(example):
        prompt = torch.tensor([encode_prompt(example, processor)])
        told = model.generate(prompt, attention_mask=prompt > -1, do_sample=False, max_new_tokens=24, min_new_tokens=24)
        return told[0, prompt.shape[1]:].tolist()

    model.generation_config.begin_suppress_tokens = list({token for example in examples for token in tell(example)[9:]})
    alone = [tell(example) for example in examples]
    # The token at which the answers end at the most different places.
    end = max({token for told in alone for token in told},
              key=lambda token: len({told.index(token) for told in alone if token in told}))
    model.generation_config.eos_token_id = [0, end]
    answers = [told[:told.index(end) + 1] if end in told else told for told in alone]
    computed = []
    model.register_forward_pre_hook(lambda module, args, inputs: computed.append(len(inputs["input_ids"])),
                                    with_kwargs=True)
    found = generate(model, processor, examples, spec)
    assert found == [processor.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    lengths = sorted(map(len, answers))
    assert len(set(lengths)) > 3 and len(computed) == lengths[-1], lengths
    # Never is more than an eighth of the rows computed for nothing.
    going_on = [sum(length > step for length in lengths) for step in range(lengths[-1])]
    assert all(rows < needed + rows / 8 for rows, needed in zip(computed, going_on, strict=True)), (computed, going_on)
