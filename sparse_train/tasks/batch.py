"""Examples as tensors. Letters: B examples, T tokens of the decoder, S states of the encoder."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from sparse_train.errors import UserError
from sparse_train.models import Processor
from sparse_train.tasks.conversation import ASSISTANT, Message, labelled_ids, prompt_ids

IGNORED = -100


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str
    sound: Callable[[int], np.ndarray] | None = None
    """Sampling rate -> mono samples; takes the prompt's place for speech models."""
    history: tuple[Message, ...] | None = None
    """The messages before the prompt, which is then a user's turn, and the answer the assistant's; all are written by
    the tokenizer's chat template, and assistants' turns in the history are answers too. None: plain text."""


@dataclass(frozen=True)
class EncoderInput:
    inputs: torch.Tensor
    """(B, S) int64 tokens, or (B, mel bins, frames) spectrograms of two frames per state."""
    attend: torch.Tensor
    """(B, S) bool: True at states of real tokens or sound."""

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "EncoderInput":
        inputs = self.inputs.to(device, dtype if self.inputs.is_floating_point() else None)
        return EncoderInput(inputs, self.attend.to(device))


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor
    """(B, T) int64: of the decoder, which a model without an encoder is."""
    attend: torch.Tensor
    """(B, T) bool: True at real tokens."""
    labels: torch.Tensor
    """(B, T) int64, -100 where nothing is predicted. Without an encoder the answer's tokens and the end of text at
    their own positions; with one, the token that each position predicts."""
    encoder: EncoderInput | None = None
    positions: torch.Tensor | None = None
    """(B, T) int64: each token's position in its example, where a row holds several (packing.py); None: a row is one
    example."""

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Batch":
        """On `device`, spectrograms in `dtype` (None: in fp32, as they are made)."""
        return Batch(self.input_ids.to(device), self.attend.to(device), self.labels.to(device),
                     self.encoder and self.encoder.to(device, dtype),
                     None if self.positions is None else self.positions.to(device))

    @property
    def targets(self) -> torch.Tensor:
        """(B, T) int64: the token that position t predicts, -100 for none."""
        if self.encoder is not None:
            return self.labels
        labels = self.labels
        if self.positions is not None:  # an example's first token is not predicted from the example before
            labels = labels.masked_fill(self.positions == 0, IGNORED)
        return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    @property
    def attends(self) -> dict[str, torch.Tensor]:
        """Side ("encoder", "decoder") -> bool mask of its states."""
        return {"decoder": self.attend} | ({} if self.encoder is None else {"encoder": self.encoder.attend})

    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model's forward."""
        if self.positions is not None:  # without a mask, transformers takes each start at 0 for another sequence
            return {"input_ids": self.input_ids, "position_ids": self.positions}
        if self.encoder is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attend.long()}
        decoder = {"decoder_input_ids": self.input_ids, "decoder_attention_mask": self.attend.long()}
        if self.encoder.inputs.is_floating_point():
            return decoder | {"input_features": self.encoder.inputs}
        return decoder | {"input_ids": self.encoder.inputs, "attention_mask": self.encoder.attend.long()}


def encode(example: Example, processor: Processor) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids with end-of-text). The prompt's do not depend on the answer: generation sees the same.

    A decoder reads both as one text: the ids are those of the joined text wherever no token spans the boundary, and
    spaces at a prompt's end count with the answer, since most tokenizers join them to the word that follows. In front
    is what the tokenizer puts before any text, such as Llama's beginning-of-text. An encoder's prompt and its answer
    are texts of their own, each with an end-of-text; sound has no prompt ids. A conversation has the special tokens
    that its template writes, and no others.
    """
    tokenizer, prompt = processor.tokenizer, encode_prompt(example, processor)
    if processor.decoder_prefix:
        return prompt, [*_tokens(tokenizer, example.answer), tokenizer.eos_token_id]
    if example.history is not None:
        return prompt, decoder_row(example, processor)[0][len(prompt):]
    head = _head(example)
    tail, start = example.prompt[len(head):] + example.answer, _tokens(tokenizer, head)
    whole = _tokens(tokenizer, head + tail)
    answer = whole[len(start):] if whole[:len(start)] == start else _continued(tokenizer, tail)
    return prompt, [*answer, tokenizer.eos_token_id]


def encode_prompt(example: Example, processor: Processor) -> list[int]:
    """The prompt ids of `encode`."""
    tokenizer = processor.tokenizer
    if example.history is not None:
        return prompt_ids(tokenizer, [*example.history, ("user", example.prompt)])
    if processor.decoder_prefix:
        return [] if example.sound else [*_tokens(tokenizer, example.prompt), tokenizer.eos_token_id]
    return [*_before_text(tokenizer), *_tokens(tokenizer, _head(example))]


def decoder_row(example: Example, processor: Processor) -> tuple[list[int], list[int]]:
    """(token ids of the decoder, their labels)."""
    if example.history is not None and not processor.decoder_prefix:
        ids, is_answer = labelled_ids(processor.tokenizer, [*example.history, ("user", example.prompt),
                                                            (ASSISTANT, example.answer)])
        return ids, [token if answered else IGNORED for token, answered in zip(ids, is_answer, strict=True)]
    prompt, answer = encode(example, processor)
    if not processor.decoder_prefix:
        return prompt + answer, [IGNORED] * len(prompt) + answer
    prefix = list(processor.decoder_prefix)
    return prefix + answer[:-1], [IGNORED] * (len(prefix) - 1) + answer


def _head(example: Example) -> str:
    return example.prompt.rstrip(" ") or example.prompt


def _tokens(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _continued(tokenizer, text: str) -> list[int]:
    """As in the middle of a text, where no tokenizer adds a space of its own."""
    for before in ("\n", "a", ".", "0"):  # the first that does not grow together with the text
        start, whole = _tokens(tokenizer, before), _tokens(tokenizer, before + text)
        if whole[:len(start)] == start:
            return whole[len(start):]
    return _tokens(tokenizer, text)


@functools.lru_cache(maxsize=4)
def _before_text(tokenizer) -> list[int]:
    """Special tokens that the tokenizer adds in front."""
    whole, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return next((whole[:start] for start in range(len(whole)) if whole[start:start + len(bare)] == bare), [])


def windows(example: Example, processor: Processor) -> list[Example]:
    """The example itself, or one per piece of a sound that is longer than the model's window.

    A piece ends at the quietest 20 ms of the window's last fifth, where a word is least likely to be cut. The last
    piece has at least 0.1 s.
    """
    if processor.features is None or example.sound is None:
        return [example]
    rate, size = processor.features.sampling_rate, processor.features.n_samples
    sound = example.sound(rate)
    if len(sound) <= size:
        return [example]
    return [replace(example, sound=_Samples(part)) for part in np.split(sound, _cuts(sound, size, rate))]


@dataclass(frozen=True)
class _Samples:
    """A piece of a decoded sound."""

    samples: np.ndarray

    def __call__(self, sampling_rate: int) -> np.ndarray:
        return self.samples


def fits_model(example: Example, processor: Processor, new_tokens: int = 0, longest: int | None = None) -> bool:
    """Whether the model has a position and an embedding for every token of an example, and positions for `new_tokens`
    after its prompt; and whether it has at most `longest` tokens.

    What a decoder starts from takes positions too: all but its last token come before the answer's. The answer to a
    sound of several windows is never laid against the model.
    """
    prompt, answer = encode(example, processor)
    before = max(0, len(processor.decoder_prefix) - 1)
    if longest is not None and before + len(prompt) + len(answer) > longest:
        return False
    if processor.num_embedded is not None and max(prompt + answer) >= processor.num_embedded:
        return False
    in_encoder, in_decoder = (len(prompt), 0) if processor.decoder_prefix else (0, len(prompt))
    answered = before + len(answer) if len(windows(example, processor)) == 1 else 0
    in_decoder += max(answered, len(processor.decoder_prefix) + new_tokens)
    return (in_encoder <= (processor.encoder_positions or in_encoder)
            and in_decoder <= (processor.positions or in_decoder))


def _cuts(sound: np.ndarray, size: int, rate: int) -> list[int]:
    """Where to cut a sound (samples,) into pieces of at most `size` samples."""
    cuts, frame, shortest = [0], rate // 50, min(rate // 10, size // 2)
    while len(sound) - cuts[-1] > size:
        latest = min(cuts[-1] + size, len(sound) - shortest)
        num_frames = max(0, latest - cuts[-1] - size + size // 5) // frame
        # From the back, so that of equally quiet places the last is taken.
        ends = sound[latest - num_frames * frame:latest].reshape(num_frames, frame)[::-1]
        quietest = int(np.square(ends, dtype=np.float64).sum(1).argmin()) if num_frames else 0
        cuts.append(latest - quietest * frame - (frame // 2 if num_frames else 0))
    return cuts[1:]


def collate(examples: Sequence[Example], processor: Processor) -> Batch:
    """Padded on the right to the longest. No examples make one row of padding: a rank without work still takes part."""
    batch = decoder_batch([decoder_row(example, processor) for example in examples], processor)
    return replace(batch, encoder=encoder_input(examples, processor)) if processor.decoder_prefix else batch


def encoder_input(examples: Sequence[Example], processor: Processor) -> EncoderInput:
    """Prompts or sounds, padded; of no examples one row of padding."""
    if processor.features is None:
        ids, attend = pad_rows([encode_prompt(example, processor) for example in examples], processor)
        return EncoderInput(ids, attend)
    rate = processor.features.sampling_rate
    return _spectrograms([example.sound(rate) for example in examples if example.sound], processor.features)


def pad_rows(rows: Sequence[list[int]], processor: Processor,
             on_left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids (B, T), attend (B, T)); of no rows one of padding."""
    longest = max(map(len, rows), default=1)
    ids = torch.full((max(1, len(rows)), longest), processor.tokenizer.pad_token_id)
    attend = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if on_left else slice(len(row))
        ids[index, place], attend[index, place] = torch.tensor(row, dtype=torch.long), True
    return ids, attend


def decoder_batch(rows: Sequence[tuple[list[int], list[int]]], processor: Processor) -> Batch:
    """Of token ids and labels, padded on the right."""
    input_ids, attend = pad_rows([ids for ids, _ in rows], processor)
    labels = torch.full_like(input_ids, IGNORED)
    for index, (_, row) in enumerate(rows):
        labels[index, :len(row)] = torch.tensor(row)
    return Batch(input_ids, attend, labels)


def _spectrograms(sounds: Sequence[np.ndarray], features) -> EncoderInput:
    window = features.n_samples
    for sound in sounds:
        if len(sound) > window:
            raise UserError(f"a clip of {len(sound) / features.sampling_rate:.1f} s is longer than the model's window "
                            f"of {window / features.sampling_rate:g} s; split it or leave it out")
    num_states = window // features.hop_length // 2
    attend = torch.zeros(max(1, len(sounds)), num_states, dtype=torch.bool)
    for row, sound in enumerate(sounds):
        attend[row, :max(1, -(-len(sound) // (2 * features.hop_length)))] = True
    if not sounds:
        return EncoderInput(torch.zeros(1, features.feature_size, 2 * num_states), attend)
    spectrograms = features(list(sounds), sampling_rate=features.sampling_rate, return_tensors="pt",
                            padding="max_length", max_length=window)
    return EncoderInput(spectrograms["input_features"], attend)
