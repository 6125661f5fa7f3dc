"""GGUF files: the first use of one makes a dense folder of it, which every stage and rank reads from then on.

The folder is kept where huggingface_hub lets libraries keep files (below HF_HOME), under a name that changes with the
file. transformers reads the architectures that it knows, and the gguf package dequantises. Both take four bytes per
parameter, in memory and on disk.
"""

import functools
import logging
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from filelock import FileLock
from huggingface_hub import cached_assets_path
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparse_train import artifacts
from sparse_train.compat.transformers import gguf_text_splits
from sparse_train.errors import UserError
from sparse_train.extras import require
from sparse_train.models.config import is_gguf, read_config, reading
from sparse_train.models.empty import own_tensors
from sparse_train.models.families import family_of_type
from sparse_train.models.names import as_stored
from sparse_train.sparse import write_tensors

log = logging.getLogger(__name__)

_REMEDY = "give the checkpoint that it was made from"
_BYTES = 4  # fp32: the scales of blocks make values that bf16 does not have
_DIGITS_APART = {"command-r", "refact", "smollm", "starcoder"}
"""Splits of text that are GPT-2's with each digit by itself; transformers reads them as GPT-2's."""
_AS_GPT2 = {"default", "gpt-2"}
_CONVERSION = 1
"""To be raised when the folder of a file becomes another: earlier ones are then no longer used."""


@functools.cache
def as_folder(path: str | Path) -> str | Path:
    """The dense folder that a GGUF file was converted to; any other path as it is.

    One process converts while the others wait. What was dequantised is logged once per process. Raises UserError for a
    file that is damaged, incomplete, or not read in full by transformers, and where there is no room for the folder.
    """
    if not is_gguf(path):
        return path
    file = Path(path).resolve()
    stat = file.stat()
    version = artifacts.digest([_CONVERSION, str(file), stat.st_size, stat.st_mtime_ns, transformers.__version__])
    folder = cached_assets_path("sparse-train", "gguf", f"{file.stem}-{version[:12]}")
    with FileLock(f"{folder}.lock"):
        if artifacts.read_manifest(folder) is None:
            require("gguf")
            _convert(file, folder)
    tensors = artifacts.require_manifest(folder)["tensors"]
    log.warning("%s: dequantised to fp32 from %s; the model is in %s", path, _describe(tensors), folder)
    return folder


def _describe(tensors: dict[str, int]) -> str:
    """`tensors`: type -> how many, such as "Q4_1 (210 tensors), F32 (61)"."""
    most = sorted(tensors.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} ({count}{' tensors' * (index == 0)})" for index, (name, count) in enumerate(most))


def _convert(file: Path, folder: Path) -> None:
    with reading(file, "a GGUF file", "it is damaged, or incomplete"):
        from gguf import GGUFReader

        header = GGUFReader(file)
    _check_header(file, header)
    _require_room(file, _BYTES * sum(int(tensor.n_elements) for tensor in header.tensors), folder)
    with tempfile.TemporaryDirectory() as alone, reading(file, "the model", _REMEDY):  # from what may lie beside it
        (Path(alone) / file.name).symlink_to(file)
        model = _dequantise(Path(alone) / file.name, header)
        tokenizer = _read_tokenizer(Path(alone) / file.name, header)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(partial)
    own = own_tensors(model)
    write_tensors(partial, as_stored(model, own.items(), own), {})
    tensors = Counter(tensor.tensor_type.name for tensor in header.tensors)
    artifacts.publish(partial, folder, {"stage": "gguf", "source": str(file), "tensors": dict(tensors)})


def _check_header(file: Path, header: Any) -> None:
    """Refuse what transformers would pass over in silence."""
    if _value(header, "split.count", 1) > 1:
        raise UserError(f"{file} is one of {_value(header, 'split.count')} parts; merge them into one file "
                        "(llama-gguf-split --merge)")
    architecture = _value(header, "general.architecture", "")
    scaling = _value(header, f"{architecture}.rope.scaling.type", "none")
    scaled = [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_f")]
    if scaled or (scaling != "none" and architecture != "gpt-oss"):
        raise UserError(f"{file}: its rotary frequencies are scaled ({scaled[0] if scaled else scaling}), which "
                        f"transformers does not read from GGUF; {_REMEDY}")


def _require_room(file: Path, needed: int, folder: Path) -> None:
    for place, free in (("memory", psutil.virtual_memory().available), (folder, shutil.disk_usage(folder).free)):
        if needed > free:
            raise UserError(f"{file} becomes a model of {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB "
                            "free; convert it on a larger machine, or set HF_HOME to a larger disk")


def _dequantise(file: Path, header: Any) -> PreTrainedModel:
    config = read_config(file)
    # Without GgufConfig, transformers may look for kernels on the hub, to keep the blocks.
    model, found = family_of_type(config.model_type).auto_class(config).from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=torch.float32, trust_remote_code=False,
        quantization_config=GgufConfig(dequantize=True), output_loading_info=True)
    sizes = {tensor.name: int(tensor.n_elements) for tensor in header.tensors}
    unread = sum(sizes.values()) - sum(tensor.numel() for tensor in own_tensors(model).values())
    if found["missing_keys"]:
        raise UserError(f"{file.name} lacks {len(found['missing_keys'])} tensors of a {config.model_type} model, such "
                        f"as {min(found['missing_keys'])}; {_REMEDY}")
    if unread > (sizes.get("output.weight", 0) if config.tie_word_embeddings else 0):
        raise UserError(f"{file.name} holds {unread:,} numbers that transformers does not read into a "
                        f"{config.model_type} model; {_REMEDY}")
    return model


def _read_tokenizer(file: Path, header: Any) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    if _value(header, "tokenizer.ggml.model") == "gpt2":
        split = _value(header, "tokenizer.ggml.pre", "default")
        if split in _DIGITS_APART:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        elif split not in _AS_GPT2 | gguf_text_splits().keys():
            log.warning("%s: text is split before it is tokenised as %r does, which transformers does not know; it is "
                        "split as GPT-2 does, so some tokens may differ", file.name, split)
    return tokenizer


def _value(header: Any, key: str, default: Any = None) -> Any:
    return header.fields[key].contents() if key in header.fields else default
