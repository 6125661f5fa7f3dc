"""The lean decode path says what transformers' loop says, whatever the batch, the sampling and the ends."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicLayer, MptConfig
from transformers.generation import BaseStreamer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sparse_train.bench import decode_rows
from sparse_train.compress import export_sparse
from sparse_train.config import EvaluateConfig, PruneConfig
from sparse_train.errors import UserError
from sparse_train.inference import Runtime, load
from sparse_train.inference.decoder import PLANS, Decoder, can_decode
from sparse_train.inference.decoding import Decoders
from sparse_train.models import family_of_type, save_model
from sparse_train.models.processor import make_processor
from sparse_train.pruning import prune
from sparse_train.registry import FAMILIES
from sparse_train.sparse import sparsify
from sparse_train.tasks import Example, generate
from tests.models import tiny_examples, tiny_model, tiny_tokenizer
from tests.training.plain import Float64, assert_as_exact

_EXAMPLES = [Example(text, "") for text in ("Question: Tom has 3 eggs", "1", "How many eggs are 4 and 5?")]
_LENGTH = 30


class _Tokens(BaseStreamer):
    def __init__(self):
        self.told, self.ended = [], 0

    def put(self, value):
        self.told.append(value.clone())

    def end(self):
        self.ended += 1


def _variants():
    size = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
            "bos_token_id": None, "eos_token_id": 0}
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    yield "llama", CONFIG_MAPPING["llama"](**size, attention_bias=True, mlp_bias=True, rope_parameters=llama3)
    yield "tied", CONFIG_MAPPING["llama"](**size, head_dim=16, hidden_act="gelu", tie_word_embeddings=True)
    yield "mistral", CONFIG_MAPPING["mistral"](**size, sliding_window=None)
    yield "qwen2", CONFIG_MAPPING["qwen2"](**size)
    yield "qwen3", CONFIG_MAPPING["qwen3"](**size, head_dim=12)
    yield "mpt", MptConfig(d_model=36, n_heads=6, n_layers=2, vocab_size=300, max_seq_len=64)
    yield "clipped", MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=300, max_seq_len=64,
                               attn_config={"clip_qkv": 0.5, "softmax_scale": 0.3})
    t5 = {"vocab_size": 300, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 3, "num_decoder_layers": 2,
          "num_heads": 6, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
          "pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
    yield "t5", CONFIG_MAPPING["t5"](**t5)
    yield "mt5", CONFIG_MAPPING["mt5"](**t5, feed_forward_proj="gated-gelu")
    yield "whisper", CONFIG_MAPPING["whisper"](
        vocab_size=300, d_model=48, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=6, encoder_ffn_dim=80, decoder_ffn_dim=80, max_source_positions=20,
        max_target_positions=64, scale_embedding=True, activation_function="gelu_new", suppress_tokens=None,
        begin_suppress_tokens=None, pad_token_id=1, bos_token_id=2, eos_token_id=0, decoder_start_token_id=2)


def _model(config):
    """Weights, norms' and biases' too, that make every part of it count."""
    torch.manual_seed(0)
    model = family_of_type(config.model_type).auto_class(config).from_config(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn_like(parameter) / (1 if "embed" in name or "wte" in name else 3))
    prefix = (config.decoder_start_token_id, 5, 6) if config.is_encoder_decoder else ()
    return model, make_processor(tiny_tokenizer(), config, prefix,
                                 tiny_model("whisper")[1].features if config.model_type == "whisper" else None)


def _examples(processor):
    return tiny_examples(processor)[:3] if processor.features else _EXAMPLES


@pytest.mark.parametrize("name, config", _variants(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_decoder_computes_what_the_model_does(name, config):
    model, processor = _model(config)
    assert can_decode(model, _LENGTH + 32)
    spec = EvaluateConfig(max_new_tokens=_LENGTH)
    for settings, num_examples in (({}, 1), ({"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9}, 3),
                                   ({"repetition_penalty": 1.3, "suppress_tokens": [5, 6]}, 3)):
        said, told = [], []
        for loop in (Decoders().loop_for, lambda *_: None):
            torch.manual_seed(1)
            streamer = _Tokens()
            said.append(generate(model, processor, _examples(processor)[:num_examples], spec, settings=settings,
                                 loop_for=loop, until_end=num_examples > 1, streamer=streamer))
            assert streamer.ended == 1
            told.append(torch.cat([tokens.flatten() for tokens in streamer.told]))
        assert said[0] == said[1] and torch.equal(*told), settings


def _rounded(update):
    """The method of a cache's layer, which keeps BF16."""
    return lambda layer, keys, values, *rest, **options: update(
        layer, *(part.bfloat16().to(part.dtype) for part in (keys, values)), *rest, **options)


@pytest.mark.parametrize("kv_cache", ["fp32", "bf16"])
@pytest.mark.parametrize("name, config", _variants(), ids=lambda value: value if isinstance(value, str) else "")
@torch.no_grad()
def test_logits_of_a_step_are_those_of_the_whole_text(name, config, kv_cache, monkeypatch):
    model, _ = _model(config)
    ids = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    attend, num_states = torch.ones_like(ids), 37 * config.is_encoder_decoder
    attend[1, :5] = 0
    side = "decoder_" if num_states else ""
    inputs = {f"{side}input_ids": ids, f"{side}attention_mask": attend}
    if config.model_type in ("llama", "mistral", "qwen2", "qwen3", "whisper"):
        inputs[f"{side}position_ids"] = (attend.cumsum(1) - 1).clamp(min=0)
    states = torch.randn(2, num_states, 48, generator=torch.Generator().manual_seed(3))
    attend_encoder = None  # of a text, padded on the right, on the left and inside
    if config.model_type in ("t5", "mt5"):
        attend_encoder = torch.ones(2, num_states, dtype=torch.long)
        attend_encoder[0, 30:] = attend_encoder[1, :3] = attend_encoder[1, 20:22] = 0

    if config.model_type == "whisper":  # of the spectrogram
        attend_encoder = torch.ones(2, 2 * num_states, dtype=torch.long)
        attend_encoder[0, 60:] = 0

    def run(model, length):
        encoded = {"encoder_outputs": (states.to(model.dtype),), "attention_mask": attend_encoder} if num_states else {}
        return model(**{name: value[:, :length] for name, value in inputs.items()}, **encoded, use_cache=True)

    plain = run(model, 24).logits
    with Float64():
        exact = run(copy.deepcopy(model).double(), 24).logits
        if kv_cache == "bf16":  # what transformers computes of keys and values that are rounded
            with monkeypatch.context() as patch:
                patch.setattr(DynamicLayer, "update", _rounded(DynamicLayer.update))
                plain = run(copy.deepcopy(model).double(), 24).logits
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):  # the decoder's memory is of the weights' kind, whatever the default
            decoder = Decoder(model, 2, 24, num_states, kv_cache)
    finally:
        torch.set_default_dtype(torch.float32)
    cache = run(model, 16).past_key_values
    decoder.start(cache, attend[:, :16], attend_encoder)
    caches = [cache.self_attention_cache, cache.cross_attention_cache] if num_states else [cache]
    for layer in itertools.chain(*(each.layers for each in caches)):
        assert layer.keys is None and layer.values is None  # no second copy
    for place in range(16, 24):
        found = decoder.step(ids[:, place])
        assert_as_exact(f"logits of token {place}", found, plain[:, place], exact[:, place])
        error = (found - exact[:, place]).norm() / exact[:, place].norm()
        assert (error > 1e-5) == (kv_cache == "bf16"), error
    with pytest.raises(IndexError, match="24 tokens"):
        decoder.step(ids[:, 0])


def test_an_answer_ends_as_transformers_ends_it():
    model, processor = _model(dict(_variants())["qwen3"])
    spec = EvaluateConfig(max_new_tokens=_LENGTH)
    said = generate(model, processor, _EXAMPLES, spec, until_end=False)
    ids = [processor.tokenizer.encode(text, add_special_tokens=False) for text in said]
    ends = [ids[0][7], ids[1][2]]
    stop = [said[2][4:7]]
    never = [299]  # without an end, transformers pads no row
    for some, stops in ((ends, ()), (never, stop), (ends, stop)):
        found = [generate(model, processor, _EXAMPLES, spec, settings={"eos_token_id": some}, stop=stops, loop_for=loop)
                 for loop in (Decoders().loop_for, lambda *_: None)]
        assert found[0] == found[1] and found[0] != said
        assert some != never or stop[0] in found[0][2]


def test_an_answer_ends_behind_a_stop_which_neither_its_last_token_nor_the_prompt_completes():
    model, processor = _model(dict(_variants())["llama"])
    spec, tokenizer = EvaluateConfig(max_new_tokens=4), processor.tokenizer
    token = next(token for token in range(2, 300) if len(tokenizer.decode([token])) > 2 and tokenizer.decode([token])
                 .isalpha() and tokenizer.encode(tokenizer.decode([token])) == [token])
    said = tokenizer.decode([token])
    model.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(token), 300) * 1e4)
    for loop in (Decoders().loop_for, lambda *_: None):
        for stop, answer in ((said[:2], said[:2]), (said[-1] + said[0], said + said[0]), ("~", 4 * said)):
            streamer = _Tokens()
            assert generate(model, processor, [Example(said, "")], spec, stop=["~~", stop], streamer=streamer,
                            loop_for=loop) == [answer]
            assert len(streamer.told) - 1 == -(-len(answer) // len(said)), "goes on behind the stop"


def test_only_a_decoder_has_a_bf16_cache():
    model, processor = tiny_model("olmo2")
    assert not can_decode(model, 64)
    with pytest.raises(UserError, match="leave out kv_cache=bf16"):
        Runtime(model, processor, kv_cache="bf16").generate(_EXAMPLES, 2)


def test_which_models_have_a_decoder():
    for family in FAMILIES.entries:
        model, _ = tiny_model(family)
        assert can_decode(model, 64) == (model.config.model_type in PLANS), family
    assert {"llama", "mistral", "qwen3", "mpt"} <= PLANS.keys()
    variants = dict(_variants())
    for name, changes in (("mistral", {"sliding_window": 20}), ("llama", {"hidden_act": "tanh"}),
                          ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})):
        config = variants[name].__class__(**variants[name].to_dict() | changes)
        assert not can_decode(AutoModelForCausalLM.from_config(config), 64), changes
        if name == "mistral":
            model = AutoModelForCausalLM.from_config(config)
            assert can_decode(model, 20)
            runtime = Runtime(model, make_processor(tiny_tokenizer(), config))
            for prompt, is_decoded in (("1", True), ("Tom has 3 eggs and 4 boxes of eggs", False)):
                (row,) = decode_rows({("a", "torch", "fp32", 0.0): runtime}, Example(prompt, ""), 8, 1, 1e9)
                assert (row["outside_products"] is not None) == is_decoded
    assert not can_decode(tiny_model("llama")[0].bfloat16(), 64)


@pytest.mark.parametrize("family", ["llama", "mpt", "t5-gated", "whisper"])
def test_a_sparse_folder_says_what_its_dense_form_says(family, tmp_path):
    model, processor = tiny_model(family)
    weights = prune(model, [], PruneConfig(method="magnitude", sparsity=0.5))
    save_model(tmp_path, sparsify(model, weights), processor)
    runtime, examples = load(tmp_path), _examples(processor)
    assert runtime.is_sparse and can_decode(runtime.model, 64)
    expected = generate(model, processor, examples, EvaluateConfig(max_new_tokens=_LENGTH))
    assert runtime.generate(examples, _LENGTH) == expected


@pytest.mark.parametrize("family", ["llama", "t5", "whisper"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_an_export_says_what_transformers_loop_says_of_its_products(precision, family, tmp_path):
    model, processor = tiny_model(family)
    sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    export_sparse(model, processor, precision, tmp_path, int8_head=True)
    runtime, examples = load(tmp_path), _examples(processor)
    assert runtime.precision == precision and can_decode(runtime.model, 64)
    expected = generate(runtime.model, processor, examples, EvaluateConfig(max_new_tokens=_LENGTH))
    assert runtime.generate(examples, _LENGTH) == expected
