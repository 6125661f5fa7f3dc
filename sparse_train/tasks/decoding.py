"""Generation: the same settings for scores, benchmarks and the command line, whatever a model folder proposes."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from sparse_train.compat.transformers import has_usual_cache
from sparse_train.config import EvaluateConfig
from sparse_train.errors import UserError
from sparse_train.models import Processor, model_tokens
from sparse_train.tasks.batch import Batch, Example, encode_prompt, encoder_input, pad_rows, windows
from sparse_train.tasks.conversation import end_of_turn

Loop = Callable[..., torch.Tensor]
"""What transformers' generate takes as `custom_generate`: decodes the tokens after a prompt."""


def generate(model: PreTrainedModel, processor: Processor, examples: Sequence[Example], spec: EvaluateConfig, *,
             until_end: bool = True, settings: Mapping[str, Any] | None = None, stop: Sequence[str] = (),
             streamer: BaseStreamer | None = None,
             loop_for: Callable[[PreTrainedModel, int], Loop | None] = lambda *_: None) -> list[str]:
    """The text that `model` generates for each example, greedily or with spec.num_beams.

    Of the model's own generation config only its tokens count: those that end an answer, and those that are suppressed.
    `until_end` False: every answer has spec.max_new_tokens. `settings`: of transformers' GenerationConfig, such as
    do_sample. An answer ends behind the first of the texts `stop` in it as well. `streamer` gets the prompts' tokens,
    then each row's next. `loop_for` (model, longest text in tokens): the loop that decodes, None for transformers'.
    """
    parts = [windows(example, processor) for example in examples]
    prompts = _prompts([part for several in parts for part in several], processor)
    _require_room(prompts, processor, spec.max_new_tokens)
    length = prompts.input_ids.shape[1]
    loop = loop_for(model, length + spec.max_new_tokens) if spec.num_beams == 1 else None
    inputs: dict[str, Any] = {
        **prompts.to(model.device, model.dtype).inputs(),
        "generation_config": _config(model, processor, examples, spec, until_end, settings or {})}
    is_plain = until_end and spec.num_beams == 1 and not (loop or stop or settings or streamer)
    with _without_settings(model):
        if is_plain and prompts.encoder is None and has_usual_cache(model):
            answers = _greedy_answers(model, **inputs)
        else:
            inputs |= {"streamer": streamer, "custom_generate": loop and functools.partial(loop, streamer=streamer)}
            if stop:
                inputs["stopping_criteria"] = StoppingCriteriaList([_Stops(processor, length, stop)])
            answers = _run(model, **inputs)[:, length:].tolist()
    texts = (cut_behind(text, stop) for text in _decode(processor, answers))
    return [" ".join(next(texts) for _ in several) for several in parts]


def cut_behind(text: str, stop: Sequence[str]) -> str:
    """`text` up to and with the first of the texts `stop` in it."""
    return text[:min((text.index(one) + len(one) for one in stop if one in text), default=len(text))]


def end_tokens(model: PreTrainedModel, processor: Processor, is_chat: bool) -> list[int]:
    """Those that end an answer, sorted."""
    tokens = model_tokens(model.generation_config, "the model")
    ends = {processor.tokenizer.eos_token_id, *tokens.get("eos_token_id", ())}
    return sorted(ends | {end_of_turn(processor.tokenizer)} - {None} if is_chat else ends)


def _decode(processor: Processor, answers: Any) -> list[str]:
    return processor.tokenizer.batch_decode(answers, skip_special_tokens=True)


def _run(model: PreTrainedModel, **inputs: Any) -> Any:
    # Whisper's own generate() adds timestamps and windows; here a clip is one window.
    return GenerationMixin.generate(cast(Any, model), **inputs)


def _greedy_answers(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                    generation_config: GenerationConfig) -> list[list[int]]:
    """The new tokens of each row of `input_ids` (B, T), of a decoder.

    transformers computes all rows until the last one ends. Here a pass ends as soon as an eighth of its rows have
    ended, and the next pass continues the others, from what is cached of them.
    """
    settings, ids, attend, cache = copy.copy(generation_config), input_ids, attention_mask, None
    settings.return_dict_in_generate = True
    rows, length = torch.arange(len(ids)), ids.shape[1]
    last = length + cast(int, settings.max_new_tokens)
    ends = torch.tensor(settings.eos_token_id, device=ids.device)
    answers: dict[int, list[int]] = {}
    while True:
        stop = _EnoughEnded(ids.shape[1], ends)
        found = _run(model, input_ids=ids, attention_mask=attend, past_key_values=cache, generation_config=settings,
                     stopping_criteria=StoppingCriteriaList([stop]))
        ids, cache = found.sequences, found.past_key_values
        ended = stop.ended(ids) | (ids.shape[1] == last)
        answers |= {int(rows[i]): ids[i, length:].tolist() for i in ended.nonzero().flatten().tolist()}
        if ended.all():
            return [answers[row] for row in sorted(answers)]
        going_on = (~ended).nonzero().flatten()
        rows, ids = rows[going_on.cpu()], ids[going_on]
        attend = functional.pad(attend[going_on], (0, ids.shape[1] - attend.shape[1]), value=1)
        cache.reorder_cache(going_on)
        settings.max_new_tokens = last - ids.shape[1]
        settings.begin_suppress_tokens = None  # the beginning is over


class _EnoughEnded(StoppingCriteria):
    """Ends a pass that began at position `start` when an eighth of its rows have got one of `ends`."""

    def __init__(self, start: int, ends: torch.Tensor):
        self._start, self._ends = start, ends

    def ended(self, ids: torch.Tensor) -> torch.Tensor:
        """(B,) bool."""
        return torch.isin(ids[:, self._start:], self._ends).any(1)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = self.ended(input_ids)
        return torch.full_like(ended, bool(8 * ended.sum() >= len(ended)))


class _Stops(StoppingCriteria):
    """Ends a row once its text from position `start` on holds one of the texts `stop`."""

    def __init__(self, processor: Processor, start: int, stop: Sequence[str]):
        self._processor, self._start, self._stop = processor, start, stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = _decode(self._processor, input_ids[:, self._start:])
        return torch.tensor([any(one in text for one in self._stop) for text in texts], device=input_ids.device)


def _config(model: PreTrainedModel, processor: Processor, examples: Sequence[Example], spec: EvaluateConfig,
            until_end: bool, settings: Mapping[str, Any]) -> GenerationConfig:
    tokenizer = processor.tokenizer
    tokens = model_tokens(model.generation_config, "the model")
    ends = end_tokens(model, processor, any(example.history is not None for example in examples))
    return GenerationConfig(**{
        "do_sample": False, "num_beams": spec.num_beams, "use_cache": True, "max_new_tokens": spec.max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": next(iter(processor.decoder_prefix), None),
        "eos_token_id": ends if until_end else None, "suppress_tokens": tokens.get("suppress_tokens"),
        "begin_suppress_tokens": tokens.get("begin_suppress_tokens"), **settings})


def _prompts(examples: Sequence[Example], processor: Processor) -> Batch:
    if processor.decoder_prefix:
        start = torch.tensor([processor.decoder_prefix] * len(examples))
        return Batch(start, torch.ones_like(start, dtype=torch.bool), start, encoder_input(examples, processor))
    rows, attend = pad_rows([encode_prompt(example, processor) for example in examples], processor, on_left=True)
    return Batch(rows, attend, rows)


def _require_room(prompts: Batch, processor: Processor, new_tokens: int) -> None:
    """Raises UserError where the model lacks a position or an embedding."""
    prompt = prompts.input_ids
    if prompts.encoder is not None and processor.features is None:
        prompt = prompts.encoder.inputs
        if prompt.shape[1] > (processor.encoder_positions or prompt.shape[1]):
            raise UserError(f"the prompt has {prompt.shape[1]} tokens, and the encoder {processor.encoder_positions} "
                            "positions; shorten it")
    length, positions = prompts.input_ids.shape[1], processor.positions
    if positions is not None and length + new_tokens > positions:
        remedy = f"give at most {positions - length}" if length < positions else "shorten it"
        raise UserError(f"the model has {positions} positions, too few for the {length} tokens of the prompt and "
                        f"{new_tokens} new ones; {remedy}")
    if processor.num_embedded is not None and int(prompt.max()) >= processor.num_embedded:
        raise UserError(f"the prompt holds token {int(prompt.max())}, and the model's embedding has only "
                        f"{processor.num_embedded} rows; leave that token out")


@contextmanager
def _without_settings(model: PreTrainedModel) -> Iterator[None]:
    """transformers fills what the config that is passed leaves open from the model's own."""
    original, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original
