"""What a model answers: the same settings for scores, benchmarks and the command line, whatever a folder proposes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, GenerationMixin

from sparse_train.config import EvaluateConfig
from sparse_train.errors import UserError
from sparse_train.models import Processor, model_tokens
from sparse_train.tasks.batch import Batch, Example, encode, encoder_input, pad_rows, windows


def generate(model, processor: Processor, examples: Sequence[Example], spec: EvaluateConfig,
             min_new_tokens: int | None = None) -> list[str]:
    """The text that `model` answers each example with, greedily or by spec.num_beams.

    Of the model's own generation config only its tokens count: where an answer may end, and what is never said.
    """
    parts = [windows(example, processor) for example in examples]
    told = iter(_generate(model, processor, [part for several in parts for part in several], spec, min_new_tokens))
    return [" ".join(next(told) for _ in several) for several in parts]


def _generate(model, processor, examples, spec, min_new_tokens) -> list[str]:
    tokenizer = processor.tokenizer
    own = model_tokens(model.generation_config, "the model")
    settings = GenerationConfig(
        do_sample=False, num_beams=spec.num_beams, use_cache=True, max_new_tokens=spec.max_new_tokens,
        min_new_tokens=min_new_tokens, pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=next(iter(processor.decoder_prefix), None),
        eos_token_id=sorted({tokenizer.eos_token_id, *own.get("eos_token_id", ())}),
        suppress_tokens=own.get("suppress_tokens"), begin_suppress_tokens=own.get("begin_suppress_tokens"))
    if processor.decoder_prefix:
        start = torch.tensor([processor.decoder_prefix] * len(examples))
        given = Batch(start, torch.ones_like(start, dtype=torch.bool), start, encoder_input(examples, processor))
    else:
        rows, attend = pad_rows([encode(example, processor)[0] for example in examples], processor, on_left=True)
        given = Batch(rows, attend, rows)
    _require_room(given, processor, spec.max_new_tokens)
    with _without_settings(model):
        # Whisper's own generate() adds timestamps and windows; here a clip is one window.
        made = GenerationMixin.generate(model, **given.to(model.device).inputs(), generation_config=settings)
    return tokenizer.batch_decode(made[:, given.input_ids.shape[1]:], skip_special_tokens=True)


def _require_room(given: Batch, processor: Processor, new_tokens: int) -> None:
    """Raises UserError where the model lacks a position or an embedding."""
    is_text = given.encoder is not None and processor.features is None
    prompt = given.encoder.inputs if is_text else given.input_ids
    if is_text and prompt.shape[1] > (processor.encoder_positions or prompt.shape[1]):
        raise UserError(f"the prompt has {prompt.shape[1]} tokens, and the encoder {processor.encoder_positions} "
                        "positions; shorten it")
    taken, positions = given.input_ids.shape[1], processor.positions
    if positions is not None and taken + new_tokens > positions:
        remedy = f"give at most {positions - taken}" if taken < positions else "shorten it"
        raise UserError(f"the model has {positions} positions, too few for the {taken} tokens of the prompt and "
                        f"{new_tokens} new ones; {remedy}")
    if processor.num_embedded is not None and int(prompt.max()) >= processor.num_embedded:
        raise UserError(f"the prompt holds token {int(prompt.max())}, and the model's embedding has only "
                        f"{processor.num_embedded} rows; leave that token out")


@contextmanager
def _without_settings(model) -> Iterator[None]:
    """transformers fills what a given config leaves open from the model's own."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
