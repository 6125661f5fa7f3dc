"""A tokenizer for a model that starts from nothing: byte-level BPE on the task's text, one token per digit."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparse_train.tasks.task import Task

_NUM_TEXTS = 5_000
_END, _PAD = "<|endoftext|>", "<|pad|>"


def build_tokenizer(task: Task, vocab_size: int) -> PreTrainedTokenizerBase:
    """At most `vocab_size` tokens, at least the 256 bytes; any text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[_END, _PAD], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    examples = task.examples("train")
    texts = (examples[i].prompt + examples[i].answer for i in range(min(_NUM_TEXTS, len(examples))))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, bos_token=_END, pad_token=_PAD,
                                   clean_up_tokenization_spaces=False)
