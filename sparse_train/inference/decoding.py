"""The loop of generation over a Decoder. transformers prepares it (custom_generate of its `generate`), so that prompts,
sampling and ends of text are its own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from sparse_train.config.base import Precision
from sparse_train.errors import UserError
from sparse_train.inference.decoder import Decoder, can_decode

_STEP = 256
"""Tokens, or states of an encoder, by which the Decoders of a GPU are larger than one another."""


class Decoders:
    """Those of a model. On a GPU the last one is kept for the next batch of as many texts that it has room for, since
    its graph is captured at the speed of Python; it has the weights that the model had then."""

    def __init__(self) -> None:
        self._last: Decoder | None = None

    def loop_for(self, model: PreTrainedModel, capacity: int,
                 kv_cache: Precision = "fp32") -> Callable[..., torch.Tensor] | None:
        """The loop for texts of at most `capacity` tokens; None: transformers' own, where no Decoder computes the
        model. Raises UserError for a `kv_cache` that transformers' has not."""
        if can_decode(model, capacity):
            return functools.partial(decode, self, kv_cache=kv_cache)
        if kv_cache != "fp32":
            raise UserError(f"transformers decodes this model with texts of {capacity} tokens, and its KV cache is of "
                            f"the activations' type; leave out kv_cache={kv_cache}")
        return None

    def get(self, model: Any, num_rows: int, capacity: int, num_states: int,
            kv_cache: Precision = "fp32") -> Decoder:
        """As Decoder's arguments. It is at its beginning once it is started."""
        if model.device.type == "cpu":
            return Decoder(model, num_rows, capacity, num_states, kv_cache)
        last = self._last
        if last is None or last.num_rows != num_rows or last.capacity < capacity or last.num_states < num_states:
            capacity, num_states = (-(-size // _STEP) * _STEP for size in (capacity, num_states))
            self._last = last = None  # its memory may be needed
            self._last = last = Decoder(model, num_rows, capacity, num_states)
        return last


def decode(decoders: Decoders, model: Any, input_ids: Any, logits_processor: LogitsProcessorList,
           stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig,
           streamer: BaseStreamer | None = None, kv_cache: Precision = "fp32", **model_inputs: Any) -> torch.Tensor:
    """Greedy or sampled tokens (B, T + new), padded behind a row's end: those of transformers' own loop."""
    num_rows, length = input_ids.shape
    most = generation_config.max_length
    ends = {end for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)
            for end in criterion.eos_token_id.tolist()}
    padding = next(iter(ends), 0) if generation_config.pad_token_id is None else generation_config.pad_token_id
    others = StoppingCriteriaList(criterion for criterion in stopping_criteria
                                  if not isinstance(criterion, EosTokenCriteria | MaxLengthCriteria))
    ids: Any = torch.cat([input_ids, input_ids.new_full((num_rows, most - length), padding)], dim=1)
    columns: tuple[torch.Tensor, ...] = ids.unbind(1)
    states, mask = model_inputs.get("encoder_outputs"), model_inputs.get("attention_mask")
    masks = (model_inputs.get("decoder_attention_mask"), mask) if states else (mask,)
    prompt = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_inputs)
    outputs = model(**prompt, return_dict=True)
    logits, cache = outputs.logits[:, -1].float(), outputs.past_key_values
    del outputs
    decoder, is_done = None, [False] * num_rows
    while True:
        scores = logits_processor(ids[:, :length], logits) if logits_processor else logits
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        elif scores.device.type == "cpu":  # numpy's takes an eighth of torch's time, a hundredth of a small token's
            tokens = torch.from_numpy(scores.numpy().argmax(-1))
        else:
            tokens = scores.argmax(-1)
        if any(is_done):
            tokens = tokens.masked_fill(torch.tensor(is_done, device=tokens.device), padding)
        columns[length].copy_(tokens)
        length += 1
        if streamer is not None:
            streamer.put(tokens.cpu())
        if ends:
            is_done = [done or token in ends for done, token in zip(is_done, tokens.tolist(), strict=True)]
        if others:
            stops = others(ids[:, :length], scores).tolist()
            is_done = [done or stop for done, stop in zip(is_done, stops, strict=True)]
        if length == most or all(is_done):
            break
        if decoder is None:
            decoder = decoders.get(model, num_rows, most, states[0].shape[1] if states else 0, kv_cache)
            decoder.start(cache, *masks)
        logits = decoder.step(tokens).float()
    if streamer is not None:
        streamer.end()
    return ids[:, :length]
