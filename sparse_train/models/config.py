"""config.json of a model folder or hub name, or the header of a GGUF file, read without running anything of it."""

from collections.abc import Iterator
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
from sparse_train.sparse.header import METHOD, VERSION

_COUNTED, _LARGEST_COUNT = ("layer", "layers", "experts", "blocks", "labels", "heads"), 10_000


def read_config(path: str | Path) -> PretrainedConfig:
    """Of a folder, a hub name or a GGUF file's header. Raises UserError where there is none, or one whose model
    transformers does not have."""
    header = is_gguf(path)
    if header:
        require("gguf")
    elif not is_folder(path):
        hub_answers()
    with reading(path, "a model config", "give a folder with config.json, a hub name or a GGUF file"):
        source = {"gguf_file": Path(path).name} if header else {}
        config, _ = PretrainedConfig.get_config_dict(Path(path).parent if header else path, trust_remote_code=False,
                                                     **source)
        _check_counts(path, config)
        _check_quantised(path, config)
        family_of_type(str(config.get("model_type"))).check_config(path, config)
        if header:
            return AutoConfig.for_model(**config)
        read = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if hasattr(read, "quantization_config"):  # of a sparse folder, which says so in its tensors as well
            del read.quantization_config
        return read


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


def _check_quantised(path: str | Path, config: dict[str, Any]) -> None:
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and (quantisation := section.get("quantization_config")):
            facts = quantisation if isinstance(quantisation, dict) else {"quant_method": quantisation}
            method, version = facts.get("quant_method", "some method"), facts.get("version")
            if method != METHOD:
                raise UserError(f"{path} is quantised ({method}), and quantised weights are not pruned or trained; "
                                "give the checkpoint that it was made from, in fp32, bf16 or fp16")
            if version != VERSION:
                raise UserError(f"{path}: its config.json has version {version!r} of the sparse format, this release "
                                f"reads {VERSION}; update sparse-train")


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
        cause = first_line(error)
        if "trust_remote_code" in str(error):
            cause, remedy = "it needs code of its own, and the code of a model folder is never run", ""
        raise UserError(f"cannot read {what} from {folder}: {cause}{'; ' if remedy else ''}{remedy}") from error
