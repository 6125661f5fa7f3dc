"""config.json of a model folder or hub name, or the header of a GGUF file, read without running anything of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from sparse_train.compat.transformers import load_generation_config
from sparse_train.errors import UserError, first_line
from sparse_train.extras import require
from sparse_train.hub import hub_answers, may_be_hub_name
from sparse_train.models.families import family_of_type
from sparse_train.models.generation import model_tokens
from sparse_train.sparse.header import KEY, METHOD, VERSION

_COUNTED, _LARGEST_COUNT = ("layer", "layers", "experts", "blocks", "labels", "heads"), 10_000
_STORED_AS = (KEY, "compression_config", "sparsity_config")
"""Keys of config.json that say how weights are stored; the last two are those of compressed-tensors before 0.7."""
_PEER = "compressed-tensors"
_PACKED = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")
"""Its formats of weights without their zeros, which it wrote before 0.15."""


def read_config(path: str | Path, packed: bool = False) -> PretrainedConfig:
    """Of a folder, a hub name or a GGUF file's header. `packed`: also accept sparse weights that are stored as
    compressed-tensors did. Raises UserError where there is none, or one whose model transformers does not have."""
    with reading(path, "a model config", "give a folder with config.json, a hub name or a GGUF file"):
        config = read_config_keys(path)
        _check_counts(path, config)
        _check_quantised(path, config)
        if not packed and (stored := packed_format(config)):
            raise UserError(f"{path} stores its weights as {stored} of {_PEER}; make a sparse folder of it: "
                            f"sparse-train import {path} FOLDER")
        family_of_type(str(config.get("model_type"))).check_config(path, config)
        if is_gguf(path):
            return AutoConfig.for_model(**config)
        built = AutoConfig.from_pretrained(path, trust_remote_code=False)
    for part in (built, getattr(built, "text_config", None)):
        for key in _STORED_AS:  # what passed the checks says nothing of a model that is saved from here
            if hasattr(part, key):
                delattr(part, key)
    return built


def read_config_keys(path: str | Path) -> dict[str, Any]:
    """As read_config, unchecked, and as plain data."""
    header = is_gguf(path)
    if header:
        require("gguf")
    elif not is_folder(path):
        hub_answers()
    source = {"gguf_file": Path(path).name} if header else {}
    config, _ = PretrainedConfig.get_config_dict(Path(path).parent if header else path, trust_remote_code=False,
                                                 **source)
    return dict(config)


def packed_format(config: Mapping[str, Any]) -> str | None:
    """The format in which compressed-tensors stored weights in `config`'s folder that it made sparse, if it did."""
    formats = (str(part.get("format")) for section in _stored_as(config)
               for part in (section, section.get("sparsity_config")) if isinstance(part, dict))
    return next((name for name in formats if name in _PACKED), None)


def read_generation(path: str | Path) -> GenerationConfig:
    """The generation config of a folder or hub name: of generation_config.json, else of config.json. Raises UserError.
    """
    with reading(path, "generation_config.json"):
        generation = load_generation_config(path)
    model_tokens(generation, path)
    return generation


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a folder; otherwise it is a hub name or a GGUF file. Raises UserError where it is neither."""
    if Path(path).is_dir():
        return True
    if is_gguf(path):
        return False
    if Path(path).exists():
        raise UserError(f"{path} is a file; give the checkpoint folder that it lies in")
    if not may_be_hub_name(str(path)):
        raise UserError(f"there is no folder {path}; give a checkpoint folder or a hub name such as mosaicml/mpt-7b")
    return False


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is a GGUF file. Raises UserError where it is named like one and is not there."""
    if not str(path).endswith(".gguf") or Path(path).is_dir():
        return False
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; a GGUF file is read from this machine: download it, and give its "
                        "path")
    return True


def _check_counts(path: str | Path, config: dict[str, Any]) -> None:
    """transformers makes lists and modules of these lengths before a tensor's shape can refute them."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(path, value)
        elif key.endswith(_COUNTED) and isinstance(value, int) and value > _LARGEST_COUNT:
            raise UserError(f"{path}: its config.json has {key}={value:.0e}, more than the {_LARGEST_COUNT:,} that "
                            "any model has; give a folder that is not damaged")


def _check_quantised(path: str | Path, config: Mapping[str, Any]) -> None:
    for section in _stored_as(config):
        method, version = section.get("quant_method", "some method"), section.get("version")
        if method == METHOD and version != VERSION:
            raise UserError(f"{path}: its config.json has version {version!r} of the sparse format, this release reads "
                            f"{VERSION}; update sparse-train")
        # compressed-tensors has its section in configs of models that are not quantised as well.
        if method not in (METHOD, _PEER) or section.get("config_groups"):
            raise UserError(f"{path} is quantised ({method}), and of quantised weights only those of sparse folders "
                            "are read; give the checkpoint that it was made from, in fp32, bf16 or fp16")


def _stored_as(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The sections of a config that say how its weights are stored."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        for key in _STORED_AS:
            if section := part.get(key):
                section = section if isinstance(section, dict) else {"quant_method": section}
                yield section if key == _STORED_AS[0] else section | {"quant_method": _PEER}


@contextmanager
def reading(folder: str | Path, what: str, remedy: str = "") -> Iterator[None]:
    """Around transformers' loaders: whatever they raise becomes a UserError of one line that names the folder."""
    try:
        yield
    except UserError:
        raise
    except StrictDataclassError as error:
        raise UserError(f"{what} of {folder} is not valid: {' '.join(str(error).split())}") from error
    except Exception as error:  # a hostile file may make them raise anything
        cause = first_line(error).rstrip(" .:")
        if "trust_remote_code" in str(error):
            cause, remedy = "it needs code of its own, and the code of a model folder is never run", ""
        raise UserError(f"cannot read {what} from {folder}: {'; '.join(filter(None, (cause, remedy)))}") from error
